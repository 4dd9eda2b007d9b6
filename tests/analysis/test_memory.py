"""Bytes against published figures, and the errors other calculators are known for."""

import pytest

from gpt4lib.analysis import memory
from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs import ClusterSpec, DeviceSpec, LatentAttention, ModelSpec, ParallelPlan

GPT4, MHA = ModelSpec.preset("gpt-4"), ModelSpec.preset("gpt-4-mha")


def test_kv_bytes_per_token_of_both_gpt4_shapes():
    assert memory.kv_cache_bytes(GPT4, 1, 1) == 120 * 2 * 128 * 2 == 61_440
    assert memory.kv_cache_bytes(MHA, 1, 1) == 120 * 2 * 10_752 * 2 == 5_160_960


def test_the_3_tb_cache_belongs_to_palm_with_48_heads():
    """Pope et al. 2022, arXiv:2211.05102, section 2.1: 3 TB at batch 512 and context 2048."""
    palm = ModelSpec.preset("palm-540b").with_(n_kv_heads=48, head_dim=128)
    assert memory.kv_cache_bytes(palm, 512, 2048) == pytest.approx(3.04e12, rel=2e-3)       # printed: 3 TB


def test_keys_and_values_both_count_and_heads_are_grouped():
    """Elsewhere: no factor of two and no grouping, 5.00 GiB a device for Llama-2-70B at 4k; it is 1.25 in all."""
    spec = ModelSpec.preset("llama-2-70b")
    assert memory.kv_cache_bytes(spec, 1, 4096) == 1.25 * 2**30
    assert memory.kv_cache_bytes(spec, 1, 4096, tp=8) == 1.25 * 2**30 / 8


def test_head_dim_need_not_be_d_model_over_heads():
    """Elsewhere: always d_model / n_heads, which for 168 heads of 128 on 10,752 would be 64."""
    assert GPT4.head_dim == 128 != GPT4.d_model // GPT4.n_heads
    assert memory.kv_cache_bytes(GPT4.with_(head_dim=64), 1, 1) == 61_440 / 2


def test_fewer_heads_than_ranks_are_replicated_in_memory():
    assert memory.kv_cache_bytes(GPT4, 1, 1, tp=8) == memory.kv_cache_bytes(GPT4, 1, 1)
    assert memory.kv_cache_bytes(ModelSpec.preset("llama-2-70b"), 1, 1, tp=16) == (
        memory.kv_cache_bytes(ModelSpec.preset("llama-2-70b"), 1, 1, tp=8))


def test_a_window_caps_the_cache():
    """Elsewhere: linear in the context, 40 to 67 % too much for windowed models."""
    spec = ModelSpec.preset("mixtral-8x7b").with_(window=4096)
    assert memory.kv_cache_bytes(spec, 1, 32_768) == memory.kv_cache_bytes(spec, 1, 4096)


def test_latent_attention_caches_the_latent_only():
    """DeepSeek-V3, arXiv:2412.19437: 512 + 64 numbers a token and layer."""
    assert memory.kv_cache_bytes(ModelSpec.preset("deepseek-v3"), 1, 1) == 61 * 576 * 2


def test_linear_layers_keep_a_state_instead():
    spec = ModelSpec.from_hf({"model_type": "qwen3_5_text", "hidden_size": 64, "num_hidden_layers": 4,
                              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                              "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 64,
                              "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                              "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4})
    assert memory.kv_cache_bytes(spec, 1, 10) == 1 * 10 * 2 * 2 * 16 * 2
    state, convolution = 4 * 8 * 16, (4 - 1) * (2 * 2 * 8 + 4 * 16)
    assert memory.linear_state_bytes(spec, 1) == 3 * (state + convolution) * 4
    assert memory.linear_state_bytes(spec, 6, tp=2) == 3 * memory.linear_state_bytes(spec, 1)
    assert memory.serving(spec, ParallelPlan(), 6, 10).by_part["linear_state"] == memory.linear_state_bytes(spec, 6)


def test_zero_1_of_gpt4_needs_62_gb_with_16_bit_gradients():
    """Claim P4, tensor 8, pipeline 15, data 208: 61.9 GB when averaged over stages of 8 layers each. The first
    and last also hold an eighth of the embedding, the fullest 62.6. fp32 gradients would not fit 80 GB."""
    plan = ParallelPlan(tp=8, pp=15, dp=208, zero_stage=1)
    assert plan.layers_per_stage(120) == (8,) * 15
    average = parameters(GPT4).total / 120 * (2 + 2 + 12 / 208)
    assert average == pytest.approx(61.9e9, rel=2e-3)                         # three printed digits
    state = memory.training_state(GPT4, plan, "fp16", "fp16")
    assert sum(state.values()) == pytest.approx(62.56e9, rel=1e-3)
    middle = sum(memory.stage_parameters(GPT4, plan, 7).values())
    assert middle * (4 + 12 / 208) == pytest.approx(average, rel=2e-3)        # the average spreads the embedding
    assert sum(state.values()) < DeviceSpec.preset("a100-80gb").memory_bytes
    assert sum(memory.training_state(GPT4, plan, "fp16", "fp32").values()) > 80e9


def test_gpt4_state_agrees_with_a_simulator():
    """SimuMax v1.2 for a GPT-4 of 1.817e12 parameters, tensor 8, pipeline 15, data 8, ZeRO-1, fp32 gradients:
    28.5 + 56.9 + 21.4 GiB. Ours has 0.9 % more parameters, hence 1.5 %."""
    state = memory.training_state(GPT4, ParallelPlan(tp=8, pp=15, dp=8, zero_stage=1), gradient_dtype="fp32")
    for part, gib in (("weights", 28.5), ("gradients", 56.9), ("optimizer", 21.4)):
        assert state[part] / 2**30 == pytest.approx(gib, rel=0.015)


def test_zero_shards_one_thing_more_at_each_stage():
    """Elsewhere: stage 1 left out, stage 2 with whole gradients, stage 3 divided by all devices."""
    spec = ModelSpec.preset("llama-2-7b")
    plans = [ParallelPlan(dp=8, zero_stage=z) for z in range(4)]
    n = memory.device_parameters(spec, plans[0])
    assert n == 6_738_415_616
    expected = [n * 16, n * (4 + 12 / 8), n * (2 + 14 / 8), n * 16 / 8]
    assert [sum(memory.training_state(spec, p).values()) for p in plans] == expected


def test_gradients_are_split_over_tensor_and_pipeline_ranks():
    """Elsewhere: GPT-3 at tp 8, pp 16 with 653 GiB of gradients a device."""
    state = memory.training_state(ModelSpec.preset("gpt-3-175b"), ParallelPlan(tp=8, pp=16, zero_stage=1))
    # The first of 16 stages: 6 layers and the tables. Matrices and their column biases over 8 ranks; what is
    # added after the sum (two biases of d), the norms and the position table whole on each.
    d = 12_288
    layer = (12 * d * d + 7 * d) // 8 + 2 * d + 4 * d
    assert state["gradients"] == 2 * (6 * layer + -(-50_257 // 8) * d + 2048 * d)


GPT3, S = ModelSpec.preset("gpt-3-175b"), 2048
SBH, A, H = S * GPT3.d_model, GPT3.n_heads, GPT3.d_model


@pytest.mark.parametrize("plan, printed", [
    (ParallelPlan(), SBH * 34 + 5 * A * S * S),                                                  # equation 1
    (ParallelPlan(tp=8), SBH * 10 + SBH * 24 / 8 + 5 * A * S * S / 8),                           # equation 2
    (ParallelPlan(tp=8, sequence_parallel=True), (SBH * 34 + 5 * A * S * S) / 8),                # equation 4
    (ParallelPlan(tp=8, sequence_parallel=True, recompute="selective"), SBH * 34 / 8),           # equation 6
    (ParallelPlan(recompute="full"), 2 * SBH)])
def test_activations_are_those_of_korthikanti(plan, printed):
    """arXiv:2205.05198, Table 2: multi-head attention, a 4h block, dropout, batch 1."""
    assert memory.layer_activation_bytes(GPT3, plan, S, dropout=True) == printed


def test_without_dropout_34_becomes_32_and_5_becomes_2():
    assert memory.layer_activation_bytes(GPT3, ParallelPlan(), S) == SBH * 32 + 2 * A * S * S
    assert memory.layer_activation_bytes(GPT3, ParallelPlan(micro_batch=3, cp=4), S) == 3 / 4 * (
        SBH * 32 + 2 * A * S * S)


def test_full_recomputation_keeps_2sbh_a_layer_and_divides_by_stages():
    """Elsewhere: 34 s b h for each of all layers, never divided by pp. One micro-batch in flight here."""
    use = memory.training(GPT3, ParallelPlan(pp=8, recompute="full"), S)
    assert use.by_part["activations"] == 96 / 8 * 2 * SBH


def test_the_first_stage_holds_one_micro_batch_for_each_stage():
    plans = [ParallelPlan(pp=8, n_micro_batches=m, recompute="full") for m in (1, 5, 8, 64)]
    held = [memory.training(GPT3, p, S).by_part["activations"] / (96 / 8 * 2 * SBH) for p in plans]
    assert held == [1, 5, 8, 8]


def test_experts_change_what_a_layer_keeps():
    """Elsewhere: activations of a mixture as if it were dense. Top-2 keeps two blocks and the routed copies."""
    spec = ModelSpec("x", n_layers=2, d_model=8, n_heads=2, d_ff=16, vocab_size=9, context=32,
                     n_experts=4, top_k=2, d_expert=12, moe_layers=(1,))
    plan = ParallelPlan(recompute="selective")
    dense, mixture = (memory.layer_activation_bytes(spec, plan, 1, layer=i) for i in (0, 1))
    assert dense == 2 * (4 * 8 + 4 * 8 + 2 * 16)
    assert mixture == 2 * (4 * 8 + 4 * 8 + 2 * 2 * 12 + 2 * 2 * 8 + 2 * 4)


def test_latent_and_windowed_layers_keep_what_they_use():
    latent = ModelSpec.preset("deepseek-v3")
    m, plan = latent.latent, ParallelPlan(recompute="selective")
    kept = 4 * 7168 + 1536 + 576 + 2 * 128 * (m.nope_dim + m.rope_dim + m.v_dim) + 3 * 18432
    assert memory.layer_activation_bytes(latent, plan, 1) == 2 * kept
    windowed = GPT3.with_(window=100)
    assert memory.layer_activation_bytes(windowed, ParallelPlan(), S) == SBH * 32 + 2 * A * S * 100


@pytest.mark.parametrize("n_layers, d, heads, pp, printed", [
    (48, 6144, 64, 1, 45.6), (96, 12_288, 96, 8, 45.6), (105, 20_480, 128, 35, 31.6), (128, 25_600, 160, 64, 33.0)])
def test_parameters_and_optimizer_of_megatron(n_layers, d, heads, pp, printed):
    """The four models of Korthikanti et al. 2022, arXiv:2205.05198, Table 3, tensor 8, with fp32 gradients: GiB a
    device by the paper's formula, as Calculon's validation records them. That is an average over stages,
    within 1.5 % of ours; a middle stage holds less and the ends, with the tables, more."""
    spec = ModelSpec("megatron", n_layers=n_layers, d_model=d, n_heads=heads, d_ff=4 * d, vocab_size=51_200,
                     context=2048, positions="learned", qkv_bias=True, out_bias=True, ffn_bias=True)
    plan = ParallelPlan(tp=8, pp=pp)
    fullest = sum(memory.training_state(spec, plan, gradient_dtype="fp32").values()) / 2**30
    middle = 18 * sum(memory.stage_parameters(spec, plan, pp // 2).values()) / 2**30
    average = 18 * parameters(spec).total / (8 * pp) / 2**30
    assert average == pytest.approx(printed, rel=0.015)
    assert pp == 1 or middle < average < fullest


def test_memory_follows_all_experts_not_the_active_ones():
    spec = ModelSpec.preset("mixtral-8x7b")
    assert memory.weight_bytes(spec) == 2 * 46_702_792_704


@pytest.mark.parametrize("change, words", [
    (dict(tp=0), "tp=0 is not accepted"), (dict(zero_stage=4), "zero_stage=4 is not accepted; give 0, 1, 2 or 3"),
    (dict(recompute="some"), "recompute='some' is not known"), (dict(dp=3, ep=2), "dp=3 is not divisible by ep=2")])
def test_an_impossible_plan_says_why(change, words):
    with pytest.raises(ValueError, match=words):
        ParallelPlan(**change)


@pytest.mark.parametrize("plan, words", [
    (ParallelPlan(tp=16), "n_heads=168 is not divisible by tp=16"),
    (ParallelPlan(tp=5), "n_heads=168 is not divisible by tp=5"), (ParallelPlan(pp=121), "pp=121 is more than"),
    (ParallelPlan(dp=5, ep=5), "n_experts=16 is not divisible by ep=5")])
def test_a_plan_that_cannot_hold_the_model_says_why(plan, words):
    with pytest.raises(ValueError, match=words):
        memory.training(GPT4, plan, 8192)


def test_layers_are_never_dropped_on_uneven_stages():
    """Elsewhere: 120 layers on 16 stages counted as 112."""
    stages = ParallelPlan(pp=16).layers_per_stage(120)
    assert sum(stages) == 120 and set(stages) == {7, 8}


@pytest.mark.parametrize("name, copied", [("llama-2-7b", 0), ("gpt-4-mha", 0), ("gpt-4", 120 * 2 * 128 * 10_752)])
@pytest.mark.parametrize("tp, pp", [(8, 1), (4, 3), (1, 16)])
def test_the_devices_of_a_replica_hold_the_model_once(name, copied, tp, pp):
    """What is split adds up to the model; norms and routers are on every rank, a tied head once more on the
    last stage, and a single key/value head on all ranks, without changing the total of the model."""
    spec = ModelSpec.preset(name).with_(vocab_size=51_200)        # divisible by tp, so nothing is padded
    plan, whole = ParallelPlan(tp=tp, pp=pp), parameters(spec)
    stages = [memory.stage_parameters(spec, plan, s) for s in range(pp)]
    replicated = sum(s["norms"] + s["router"] for s in stages)
    split = tp * (sum(sum(s.values()) for s in stages) - replicated)
    assert replicated == whole.by_part["norms"] + whole.by_part["router"]
    tied_copy = whole.by_part["embedding"] if spec.tied and pp > 1 else 0
    assert split + replicated == whole.total + tied_copy + copied * (tp - 1)


def test_experts_are_divided_by_ep_and_the_rest_is_not():
    """Elsewhere: all experts on every device, 8 times too much. Their optimizer has dp / ep replicas to share."""
    spec = ModelSpec.preset("mixtral-8x7b")
    one, eight = (memory.stage_parameters(spec, ParallelPlan(dp=8, ep=ep), 0) for ep in (1, 8))
    assert eight["experts"] * 8 == one["experts"]
    assert {p: n for p, n in one.items() if p != "experts"} == {p: n for p, n in eight.items() if p != "experts"}
    shared = [memory.training_state(spec, ParallelPlan(dp=8, ep=ep, zero_stage=1))["optimizer"] for ep in (1, 8)]
    assert shared[0] == shared[1] == 12 * parameters(spec).total / 8


def test_dense_first_layers_make_stages_unlike():
    """DeepSeek-V3 has three dense layers first: its first stage is the lightest, not an average."""
    spec = ModelSpec.preset("deepseek-v3")
    plan = ParallelPlan(pp=16)
    held = [sum(memory.stage_parameters(spec, plan, s).values()) for s in range(16)]
    assert held[0] == min(held) and memory.device_parameters(spec, plan) == max(held[1:])


def test_serving_gpt4_on_128_devices():
    """16-bit weights at tensor 8 and pipeline 16: 31 GB on a device with 8 of the 120 layers. A batch of 64
    at 8k fits 40 GB with one key/value head, and does not with 96."""
    plan = ParallelPlan(tp=8, pp=16)
    use = memory.serving(GPT4, plan, batch=64, context=8192)
    assert use.by_part["kv_cache"] == 64 * 8192 * 61_440 * 8 / 120
    assert use.by_part["weights"] == 2 * memory.device_parameters(GPT4, plan)
    assert use.fits(DeviceSpec.preset("a100-40gb"))
    assert not memory.serving(MHA, plan, batch=64, context=8192).fits(DeviceSpec.preset("a100-40gb"))
    halves = memory.serving(GPT4, ParallelPlan(tp=8, pp=16, cp=2, dp=4), batch=64, context=8192)
    assert halves.by_part["kv_cache"] * 8 == use.by_part["kv_cache"]


def test_latent_needs_a_cache_even_without_rotary_part():
    with pytest.raises(ValueError, match="latent.kv_rank=0"):
        LatentAttention(kv_rank=0, rope_dim=4, nope_dim=4, v_dim=4)


@pytest.mark.parametrize("name", ["gpt-4", "gpt-3-175b", "deepseek-v3", "llama-2-7b"])
@pytest.mark.parametrize("pp", [1, 2, 7, 16])
def test_looking_at_distinct_stages_only_misses_nothing(name, pp, monkeypatch):
    spec, plan = ModelSpec.preset(name), ParallelPlan(pp=pp, n_micro_batches=3)
    few = memory.distinct_stages(spec, plan)
    fast = (memory.device_parameters(spec, plan), memory.training(spec, plan, 2048),
            memory.serving(spec, plan, 4, 2048), memory.training_state(spec, plan))
    monkeypatch.setattr(memory, "distinct_stages", lambda spec, plan: list(range(plan.pp)))
    every = (memory.device_parameters(spec, plan), memory.training(spec, plan, 2048),
             memory.serving(spec, plan, 4, 2048), memory.training_state(spec, plan))
    assert fast == every and len(few) <= min(pp, 6) and {0, pp - 1} <= set(few)
