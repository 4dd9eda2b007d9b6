"""Mistakes that published calculators of inference make, one test each: what this one says instead.

Each was seen in a tool: llm-analysis 0.2.2, GenZ, LLM-Viewer, llm-flops, mlsysim, InferSim, llmfit, AIConfigurator, EleutherAI's cookbook,
LM Studio. GiB = 2^30 bytes.
"""

import pytest

from gpt4lib import ClusterSpec, DeviceSpec, ModelSpec, ParallelPlan, ServingEstimator, flops, inference, memory, parameters
from gpt4lib.specs.model import LinearAttention

GIB = 2 ** 30
A100, H100 = ClusterSpec.preset("dgx-a100"), ClusterSpec.preset("dgx-h100")
MIXTRAL, GPT4, LLAMA, LLAMA70 = (ModelSpec.preset(n) for n in ("mixtral-8x7b", "gpt-4", "llama-3.1-8b", "llama-2-70b"))


def serve(spec, plan=ParallelPlan(), cluster=H100, dtype="bf16", **more):
    return ServingEstimator(spec, cluster, plan, dtype, **more)


# --- mixtures of experts ------------------------------------------------------------------------------
def test_mixtral_at_batch_64_reads_nearly_all_experts():
    """GenZ: top-2 at any batch, 8.65 ms on two A100s, where reading takes 22.9 ms at least; llm-flops: 10.4 ms on an H100 for 27.9."""
    assert serve(MIXTRAL, ParallelPlan(tp=2), A100).decode_step(64, 1).seconds > 22.8e-3
    assert serve(MIXTRAL).decode_step(64, 1).seconds > 27.8e-3


def test_gpt_4_grows_with_the_batch():
    """GenZ: 34.28 ms in matrices from one sequence to 128, "unused weights 395 GB"."""
    one, many = (serve(GPT4, ParallelPlan(tp=8, pp=16), A100).decode_step(b, 1).terms.experts for b in (1, 128))
    assert many > 7 * one


def test_mixtral_alone_reads_two_experts():
    """llm-analysis, mlsysim and InferSim read all eight for one sequence: 28.3 ms a token on an H100, where 7.7 are needed."""
    assert 7.7e-3 < serve(MIXTRAL).decode_step(1, 1).seconds < 13e-3


def test_a_prompt_costs_active_parameters():
    """mlsysim: 2 x 46.7 B a token of a prompt, 391 ms where 110 are needed."""
    found = serve(MIXTRAL).prefill(2048)
    dense = serve(MIXTRAL.with_(n_experts=0, top_k=0, d_expert=None, d_ff=8 * 14336)).prefill(2048)
    assert found.terms.experts < dense.terms.products


def test_memory_is_total_arithmetic_active_and_bytes_distinct():
    """llmfit #230, #474: memory from active parameters, time from all of them."""
    e, count = serve(MIXTRAL), parameters(MIXTRAL)
    assert e.memory(1, 1).by_part["weights"] == 2 * count.total
    w = e.works[0]
    assert (w.flop + w.expert_flop + w.head_flop) / 2 < count.active < count.total
    assert w.weights + w.head + w.experts * (1 - 0.75 ** 4) == pytest.approx(2 * inference.weights_read(MIXTRAL, 4), rel=1e-12)


def test_experts_spread_over_expert_ranks():
    """AIConfigurator #1390: every GPU with all experts, eight times too many."""
    deepseek = ModelSpec.preset("deepseek-v3")
    one, eight = (serve(deepseek, ParallelPlan(dp=ep, ep=ep), dtype="fp8").works[0].experts for ep in (1, 8))
    assert one == 8 * eight


# --- caches and attention --------------------------------------------------------------------------------
def test_keys_and_values_both_count_and_heads_divide():
    """cookbook: 5.00 GiB a GPU for Llama-2-70B at 4,096 tokens and tp 8, with one of the two and without GQA or tp; it is 0.156."""
    assert serve(LLAMA70, ParallelPlan(tp=8)).memory(1, 4096).by_part["kv_cache"] / GIB == pytest.approx(0.15625)


def test_gpt_4_has_one_key_value_head():
    """mlsysim, GenZ: multi-head, 7.86 MB a token; the article's multi-query is 61.4 kB, a 128th."""
    assert memory.kv_cache_bytes(GPT4, 1, 1) == 61_440


def test_grouped_heads_are_read_once():
    """LLM-Viewer #12: the cache of grouped heads read once for each query head, eight times."""
    many = LLAMA70.with_(n_kv_heads=64)
    assert serve(many).works[0].cache[0] == 8 * serve(LLAMA70).works[0].cache[0]


def test_a_prompts_scores_stay_on_the_chip():
    """LLM-Viewer: FlashAttention writes s^2 scores, 275 GB at 32k tokens, so that it gains nothing."""
    e, n = serve(LLAMA70), 32_768
    scores = flops.forward(LLAMA70, 1, n, causal=True).by_part["scores"]
    assert e.prefill(n).terms.prompt == pytest.approx(scores / e.attention, rel=1e-9)


def test_half_of_the_square_is_causal():
    """llm-analysis, LLM-Viewer, GenZ, mlsysim, cookbook, llm-flops: the whole square of a prompt's scores, 57.5 TFLOP where it is 39.9."""
    e = serve(LLAMA)
    whole = flops.forward(LLAMA, 1, 8192, causal=False).by_part["scores"] / e.attention
    assert e.prefill(8192).terms.prompt == pytest.approx(whole / 2, rel=1e-3)


def test_the_cache_is_read_once_and_at_its_length():
    """llm-analysis: loaded and stored whole each step, at the final length; arithmetic the same at 128 tokens and at 4,000."""
    e = serve(LLAMA)
    extra = e.decode_step(1, 4000).terms.cache - e.decode_step(1, 128).terms.cache
    read = memory.kv_cache_bytes(LLAMA, 1, 4000 - 128) / e.bandwidth
    assert read < extra < 1.2 * read and flops.decode(LLAMA, 1, 4000).total > flops.decode(LLAMA, 1, 128).total


def test_heads_below_tp_are_copied():
    """llm-analysis: 21.80 B parameters become 22.27 B at tp 8. Each rank keeps one head; the model has no more parameters."""
    spec = ModelSpec.preset("starcoder-15b")
    one, eight = (serve(spec, ParallelPlan(tp=tp)).works[0].cache[0] for tp in (1, 8))
    assert one == eight and parameters(spec).total == 15_517_456_384


def test_windows_and_linear_layers_stop_growing():
    """LM Studio #1862: every layer grows with the context, 40 to 67 % too much."""
    lin = LinearAttention(n_key_heads=16, n_value_heads=32, key_dim=128, value_dim=128, conv_kernel=4)
    for spec in (LLAMA.with_(window=4096), LLAMA.with_(layer_kinds=("linear",) * 32, linear=lin)):
        assert serve(spec).decode_step(4, 4096).seconds == serve(spec).decode_step(4, 100_000).seconds


def test_latent_caches_are_whole_on_every_rank_and_split_by_data_parallelism():
    deepseek = ModelSpec.preset("deepseek-v3")
    tensor, data = serve(deepseek, ParallelPlan(tp=8), dtype="fp8"), serve(deepseek, ParallelPlan(dp=8, ep=8), dtype="fp8")
    assert tensor.works[0].cache == data.works[0].cache and tensor.works[0].cache[0] == 61 * 576 * 2
    assert data.step(64, 8000).terms.cache < tensor.step(64, 8000).terms.cache


# --- pipelines --------------------------------------------------------------------------------------------
def test_a_token_passes_every_stage():
    """llm-analysis: GPT-4's decode step at tp 8 x pp 16 takes 15.9 ms, one stage of 16, which has 7 of 7.5 layers."""
    one, sixteen = (serve(GPT4, ParallelPlan(tp=8, pp=pp), A100).decode_step(1, 1000) for pp in (1, 16))
    assert sixteen.seconds > one.seconds and sixteen.turn < sixteen.seconds / 14
    assert sum(w.kernels for w in serve(GPT4, ParallelPlan(tp=8, pp=16)).works) == serve(GPT4, ParallelPlan(tp=8)).works[0].kernels


def test_throughput_is_that_of_the_slowest_stage():
    """AIConfigurator #1459: pp stages are pp times as fast. The head's stage is not: 6.65 times at pp 8, not 8."""
    spec = LLAMA.with_(vocab_size=512_000)
    one, eight = (serve(spec, ParallelPlan(pp=pp)).decode_step(256, 1000) for pp in (1, 8))
    assert one.turn / eight.turn < 6.65
    uneven = serve(LLAMA.with_(n_layers=33), ParallelPlan(pp=4)).decode_step(1, 1000)
    assert uneven.turn > 1.05 * uneven.seconds / 4                              # nine layers, eight, eight, eight


# --- time -------------------------------------------------------------------------------------------------
def test_a_large_batch_is_bound_by_arithmetic():
    """mlsysim: decoding has no arithmetic, 4,096 sequences are still bound by memory."""
    e = serve(LLAMA)
    assert e.step(4096, 1).terms.products > 4 * e.step(1, 1).terms.products


def test_launches_and_all_reduces_have_a_floor():
    """LLM-Viewer, mlsysim, GenZ: bytes and arithmetic alone, a third too fast; eight devices are not eight times as fast."""
    one, eight = (serve(LLAMA, ParallelPlan(tp=tp)).decode_step(1, 1000) for tp in (1, 8))
    assert one.seconds / eight.seconds < 5 and eight.terms.kernels + eight.terms.tensor > 0.3 * eight.seconds


def test_the_embedding_is_looked_up_and_an_untied_head_is_read():
    """llm-analysis reads the embedding table each step; calculon and LLM-Viewer have no head."""
    small, large = (serve(LLAMA.with_(vocab_size=v)) for v in (1_000, 101_000))
    assert large.works[0].weights == small.works[0].weights and large.works[0].head - small.works[0].head == 2 * 100_000 * 4096


def test_a_narrow_type_does_not_use_sparse_peaks():
    """GenZ, the ML systems book: twice the dense peak."""
    assert serve(LLAMA, dtype="fp8").matmul < DeviceSpec.preset("h100-sxm").peak["fp8"] < 2000e12
