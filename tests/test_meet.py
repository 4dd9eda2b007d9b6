"""Where the two witnesses meet: what the formulas predict is what the running model has, exactly."""

import pytest
import torch

from gpt4lib.analysis import flops, memory
from gpt4lib.analysis.parameters import parameters
from gpt4lib.nn.cache import KVCache
from gpt4lib.nn.transformer import Transformer
from gpt4lib.profiling import count_flop, count_parameters, experts_touched, kv_cache_bytes
from gpt4lib.specs import LatentAttention, ModelSpec

BASE = ModelSpec("base", n_layers=3, d_model=24, n_heads=4, head_dim=6, d_ff=40, vocab_size=50, context=32)
LATENT = LatentAttention(kv_rank=10, rope_dim=4, nope_dim=6, v_dim=8, q_rank=12)
GRID = {
    "multi-head": {},
    "grouped": dict(n_kv_heads=2),
    "multi-query": dict(n_kv_heads=1),
    "wide queries": dict(n_kv_heads=1, n_heads=8),
    "untied": dict(tied=False),
    "biases": dict(qkv_bias=True, out_bias=True, ffn_bias=True, head_bias=True),
    "learned positions": dict(positions="learned", position_offset=2),
    "gated": dict(gated_ffn=True, norm="rmsnorm"),
    "parallel": dict(norms_per_layer=1, norm="layernorm_nobias"),
    "four norms": dict(norms_per_layer=4, norm="rmsnorm"),
    "query-key norms": dict(qk_norm="head"),
    "full query-key norms": dict(qk_norm="full", n_kv_heads=2),
    "gate and sinks": dict(attention_gate=True, sinks=True),
    "experts": dict(n_experts=4, top_k=2, d_expert=16),
    "experts, some layers": dict(n_experts=4, top_k=1, d_expert=16, moe_layers=(1,), gated_ffn=True),
    "shared experts": dict(n_experts=4, top_k=2, d_expert=8, d_shared=12, shared_gate=True, router_bias=True,
                           expert_bias=True, gated_ffn=True),
    "window": dict(window=5),
    "alternating windows": dict(window=5, layer_kinds=("window", "full", "window")),
    "latent": dict(latent=LATENT, head_dim=10),
    "latent, direct queries": dict(latent=LatentAttention(kv_rank=10, rope_dim=4, nope_dim=6, v_dim=8), head_dim=10),
}
grid = pytest.mark.parametrize("spec", [BASE.with_(name=n, **c) for n, c in GRID.items()], ids=GRID)


@grid
def test_parameters(spec):
    predicted, counted = parameters(spec), count_parameters(Transformer(spec))
    assert {p: n for p, n in predicted.by_part.items()} == {p: counted[p] for p in predicted.by_part}
    assert predicted.total == counted["total"]


@grid
@pytest.mark.parametrize("batch, n", [(1, 1), (2, 7)])
def test_flop_of_a_forward_pass(spec, batch, n):
    """The counter sees the full rectangle of scores, so causal=False is its convention."""
    model = Transformer(spec).double()
    tokens = torch.arange(batch * n).view(batch, n) % spec.vocab_size
    assert count_flop(model, tokens) == flops.forward(spec, batch, n, causal=False).total


@grid
@pytest.mark.parametrize("n", [1, 3])
def test_flop_of_a_cached_step(spec, n):
    model, cache = Transformer(spec).double(), KVCache()
    with torch.no_grad():
        model(torch.zeros(2, 9, dtype=torch.long), cache)
    counted = count_flop(model, torch.zeros(2, n, dtype=torch.long), cache)
    assert counted == flops.forward(spec, 2, n, causal=False, context=9).total
    if n == 1 and "window" not in spec.layer_kinds:         # a window's counter also sees the key that is masked out
        assert counted == flops.decode(spec, 2, 9).total


@grid
@pytest.mark.parametrize("n", [3, 11])
def test_kv_cache_bytes(spec, n):
    model, cache = Transformer(spec), KVCache()
    with torch.no_grad():
        model(torch.zeros(2, n, dtype=torch.long), cache)
    assert kv_cache_bytes(cache) == memory.kv_cache_bytes(spec, 2, n, "fp32")


def test_active_parameters_are_those_one_token_touches():
    spec = BASE.with_(n_experts=4, top_k=2, d_expert=16, moe_layers=(0, 2))
    model = Transformer(spec).double()
    touched = experts_touched(model, torch.tensor([[3]]))
    one = sum(p[0].numel() for p in model.layers[0].moe.experts.parameters())
    idle = sum(spec.n_experts - t for t in touched) * one
    assert touched == [2, 2] and count_parameters(model)["total"] - idle == parameters(spec).active


def test_a_window_is_kept_where_it_is_set():
    assert BASE.with_(window=5).layer_kinds == ("window",) * 3
    assert memory.kv_cache_bytes(BASE.with_(window=5), 1, 11) < memory.kv_cache_bytes(BASE, 1, 11)


def test_the_counters_would_notice():
    """A model with one more channel disagrees with the prediction for the original, in every count."""
    other, spec = Transformer(BASE.with_(d_ff=41)), BASE
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert count_parameters(other)["total"] != parameters(spec).total
    assert count_flop(other, tokens) != flops.forward(spec, 1, 4, causal=False).total
