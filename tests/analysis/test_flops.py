"""FLOP against hand counts and published figures, and the errors other calculators are known for."""

import pytest

from gpt4lib.analysis import flops
from gpt4lib.specs import LinearAttention, ModelSpec


def brute_pairs(n, context, window):
    return sum(1 for i in range(n) for j in range(context + n)
               if j <= context + i and (window is None or j > context + i - window))


@pytest.mark.parametrize("n, context", [(1, 0), (5, 0), (3, 7), (8, 2)])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_pairs_are_those_a_mask_lets_through(n, context, window):
    assert flops.pairs(n, context, True, window) == brute_pairs(n, context, window)
    assert flops.pairs(n, context, False, window) == n * (n + min(context, window or context))


def test_top_k_experts_work_not_one_and_not_all():
    """Elsewhere: Mixtral at 14.2 GFLOP a token (top-k ignored) or from all 46.7e9 parameters."""
    spec = ModelSpec.preset("mixtral-8x7b")
    linear = flops.forward(spec, 1, 1, causal=True)
    assert linear.total - linear.by_part["scores"] == pytest.approx(25.498e9, rel=1e-3)


def test_dense_layers_between_expert_layers_are_kept():
    """Elsewhere: shared experts and dense layers dropped."""
    by_part = flops.forward(ModelSpec.preset("deepseek-v3"), 1, 1, causal=True).by_part
    assert by_part["ffn"] == 3 * 6 * 7168 * 18432
    assert by_part["experts"] == 8 * by_part["shared_experts"] == 58 * 8 * 6 * 7168 * 2048
    assert by_part["router"] == 58 * 2 * 7168 * 256


def test_context_costs_something_in_decode():
    """Elsewhere: 13.21 GFLOP for Llama-2-7B at context 128 and at 4,000 alike."""
    spec = ModelSpec.preset("llama-2-7b")
    near, far = (flops.decode(spec, 1, c).by_part["scores"] for c in (128, 4000))
    assert far - near == (4000 - 128) * 4 * 4096 * 32


def test_causal_is_about_half_of_the_square_and_has_to_be_chosen():
    spec = ModelSpec.preset("gpt-3-175b")
    half, full = (flops.prefill(spec, 1, 2048, causal=c).by_part["scores"] for c in (True, False))
    assert half / full == (2048 + 1) / (2 * 2048)
    with pytest.raises(TypeError, match="causal"):
        flops.forward(spec, 1, 1)


def test_gpt3_training_compute():
    """Brown et al. 2020, arXiv:2005.14165, Table D.1: 3.14e23 FLOP for 300e9 tokens."""
    assert flops.training(174.6e9, 300e9) == pytest.approx(3.14e23, rel=2e-3)


def test_the_rule_of_thumb_is_close_where_the_embedding_is_small():
    spec = ModelSpec.preset("gpt-4")
    exact = flops.forward(spec, 1, 1, causal=True).total
    assert flops.rule_of_thumb(spec) / exact == pytest.approx(1, abs=2e-3)


def test_backward_is_twice_forward():
    one = flops.forward(ModelSpec.preset("gpt-2"), 1, 8, causal=True)
    assert flops.backward(one).total == 2 * one.total == sum(flops.backward(one).by_part.values())


def test_parts_add_up_and_scale_with_the_batch():
    spec = ModelSpec.preset("deepseek-v3")
    one, three = (flops.forward(spec, b, 5, causal=True, context=9) for b in (1, 3))
    assert one.total == sum(one.by_part.values()) and three.total == 3 * one.total


def test_absorbed_latent_attention_pays_in_scores_not_in_rebuilding():
    """DeepSeek-V2, arXiv:2405.04434, section 2.1.2. Rebuilding every cached key and value for one token
    costs as much as the whole model many times over; one absorbed key is 512 + 64 wide, its value 512."""
    spec = ModelSpec.preset("deepseek-v3")
    plain, absorbed = (flops.decode(spec, 1, 4095, absorbed=a).by_part for a in (False, True))
    assert absorbed["scores"] == 61 * 2 * 4096 * 128 * (576 + 512)
    assert plain["scores"] == 61 * 2 * 4096 * 128 * (192 + 128)
    assert plain["attention"] - absorbed["attention"] == 61 * 2 * 4095 * 512 * 128 * 256
    fresh = [flops.decode(spec, 1, 0, absorbed=a).by_part["attention"] for a in (False, True)]
    assert fresh[0] == fresh[1]


def test_looking_up_an_embedding_is_free_and_the_head_is_not():
    """Elsewhere: the embedding as a matrix product, or a head that takes no time."""
    spec = ModelSpec.preset("llama-2-7b")
    by_part = flops.forward(spec, 1, 1, causal=True).by_part
    assert by_part["embedding"] == 0 and by_part["head"] == 2 * 32_000 * 4096


def test_an_embedding_narrower_than_the_model_is_projected():
    spec = ModelSpec("narrow", n_layers=1, d_model=8, n_heads=2, d_ff=4, vocab_size=10, context=4, d_embed=3)
    by_part = flops.forward(spec, 1, 2, causal=True).by_part
    assert by_part["embedding"] == 2 * 2 * 3 * 8 and by_part["head"] == 2 * 2 * (3 * 8 + 3 * 10)


def test_a_window_caps_what_a_decode_step_sees():
    spec = ModelSpec.preset("mixtral-8x7b").with_(window=4096)
    assert flops.decode(spec, 1, 100_000).total == flops.decode(spec, 1, 4095).total


def test_linear_attention_does_not_grow_with_context():
    spec = ModelSpec("linear", n_layers=2, d_model=8, n_heads=2, d_ff=4, vocab_size=10, context=64,
                     linear=LinearAttention(1, 2, 4, 4, 3), layer_kinds=("linear", "linear"))
    near, far = (flops.decode(spec, 1, c).by_part["scores"] for c in (1, 1000))
    state, convolution = 3 * 2 * 4 * 4, 3 * (2 * 4 + 8)             # two value heads of 4 x 4
    assert near == far == 2 * 2 * (state + convolution)
