"""FLOP against hand counts and published figures, and the errors other calculators are known for."""

import pytest

from gpt4lib.analysis import flops
from gpt4lib.specs import ModelSpec


def brute_pairs(n, context, window):
    return sum(1 for i in range(n) for j in range(context + n)
               if j <= context + i and (window is None or j > context + i - window))


@pytest.mark.parametrize("n, context", [(1, 0), (5, 0), (3, 7), (8, 2)])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_pairs_are_those_a_mask_lets_through(n, context, window):
    assert flops.pairs(n, context, True, window) == brute_pairs(n, context, window)
    assert flops.pairs(n, context, False) == n * (n + context)


def test_top_k_experts_work_not_one_and_not_all():
    """Elsewhere: Mixtral at 14.2 GFLOP a token (top-k ignored) or from all 46.7e9 parameters."""
    spec = ModelSpec.preset("mixtral-8x7b")
    linear = flops.forward(spec, 1, 1, causal=True)
    assert linear.total - linear.by_part["scores"] == pytest.approx(25.498e9, rel=1e-3)


def test_dense_layers_between_expert_layers_are_kept():
    spec = ModelSpec.preset("deepseek-v3")
    assert flops.forward(spec, 1, 1, causal=True).by_part["ffn"] == 3 * 6 * 7168 * 18432


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
