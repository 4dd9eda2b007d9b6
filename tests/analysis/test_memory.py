"""Bytes against published figures, and the errors other calculators are known for."""

import pytest

from gpt4lib.analysis import memory
from gpt4lib.specs import DeviceSpec, LatentAttention, ModelSpec, ParallelPlan

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
    assert memory.linear_state_bytes(spec, 1) == 3 * 4 * 8 * 16 * 4


def test_zero_1_of_gpt4_needs_62_gb_with_16_bit_gradients():
    """Claim P4. The fullest of 15 stages holds 8 layers and an embedding; fp32 gradients no longer fit."""
    plan = ParallelPlan(tp=8, pp=15, dp=208, zero_stage=1)
    state = memory.training_state(GPT4, plan)
    assert sum(state.values()) == pytest.approx(62.5e9, rel=5e-3)
    assert sum(state.values()) < DeviceSpec.preset("a100-80gb").memory_bytes
    assert sum(memory.training_state(GPT4, plan, gradient_dtype="fp32").values()) > 80e9


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
    embedding = (50_257 + 2048) * 12_288                        # sits whole on the first of 16 stages
    assert state["gradients"] == pytest.approx(2 * ((174_604_259_328 - embedding) / 16 + embedding) / 8, rel=1e-6)


def test_activations_follow_korthikanti():
    """arXiv:2205.05198, equation 1, less its dropout masks: 34 becomes 32, and 5 a s / h becomes 2 a s / h."""
    spec, s = ModelSpec.preset("gpt-3-175b"), 2048
    d = spec.d_model
    whole = memory.layer_activation_bytes(spec, ParallelPlan(), s)
    assert whole == s * d * 32 + 2 * spec.n_heads * s * s
    selective = ParallelPlan(recompute="selective", tp=8, sequence_parallel=True)
    assert memory.layer_activation_bytes(spec, selective, s) == s * d * 32 / 8
    assert memory.layer_activation_bytes(spec, ParallelPlan(recompute="full"), s) == 2 * s * d


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
    (ParallelPlan(tp=5), "n_heads=168 is not divisible by tp=5"), (ParallelPlan(pp=121), "pp=121 is more than"),
    (ParallelPlan(dp=5, ep=5), "n_experts=16 is not divisible by ep=5")])
def test_a_plan_that_cannot_hold_the_model_says_why(plan, words):
    with pytest.raises(ValueError, match=words):
        memory.training(GPT4, plan, 8192)


def test_layers_are_never_dropped_on_uneven_stages():
    """Elsewhere: 120 layers on 16 stages counted as 112."""
    stages = ParallelPlan(pp=16).layers_per_stage(120)
    assert sum(stages) == 120 and set(stages) == {7, 8}


def test_device_parameters_add_up():
    """Every part is on some stage: with one stage a device holds the model divided by tp."""
    for spec in (GPT4, ModelSpec.preset("llama-2-7b")):
        from gpt4lib.analysis.parameters import parameters
        assert memory.device_parameters(spec, ParallelPlan(tp=8)) == pytest.approx(parameters(spec).total / 8)


def test_latent_needs_a_cache_even_without_rotary_part():
    with pytest.raises(ValueError, match="latent.kv_rank=0"):
        LatentAttention(kv_rank=0, rope_dim=4, nope_dim=4, v_dim=4)
