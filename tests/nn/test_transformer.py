"""The running model: cached decoding equals the full pass, and what it depends on is what it should."""

import pytest
import torch

from gpt4lib.kernels import attention as kernel
from gpt4lib.nn.cache import KVCache
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import LatentAttention, LinearAttention, ModelSpec

BASE = ModelSpec("base", n_layers=2, d_model=24, n_heads=4, head_dim=6, d_ff=40, vocab_size=50, context=32)
KINDS = {
    "multi-head": {}, "multi-query": dict(n_kv_heads=1), "grouped": dict(n_kv_heads=2),
    "learned": dict(positions="learned"), "window": dict(window=4), "sinks": dict(sinks=True),
    "experts": dict(n_experts=4, top_k=2), "latent": dict(head_dim=10, latent=LatentAttention(10, 4, 6, 8, 12)),
    "parallel": dict(norms_per_layer=1), "gated": dict(attention_gate=True, gated_ffn=True, qk_norm="full"),
}
EXACT = dict(rtol=0, atol=1e-12)      # fp64: only the order of sums differs between the two ways


@pytest.fixture(params=KINDS)
def model(request):
    return Transformer(BASE.with_(**KINDS[request.param]), seed=1).double()


def tokens(batch, n, seed=0):
    return torch.randint(50, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [(6,), (1,) * 14, (5, 1, 1, 7)], ids=["whole and rest", "one by one", "chunks"])
def test_prefill_and_decode_equal_the_full_pass(model, cuts):
    x = tokens(2, 14)
    sizes = [*cuts, 14 - sum(cuts)] if sum(cuts) < 14 else cuts
    cache, parts = KVCache(), []
    with torch.no_grad():
        for part in x.split(sizes, 1):
            parts.append(model(part, cache))
        torch.testing.assert_close(torch.cat(parts, 1), model(x), **EXACT)
    assert cache.length == 14


def test_no_token_sees_the_future(model):
    x = tokens(1, 10)
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 50
    with torch.no_grad():
        a, b = model(x), model(y)
    torch.testing.assert_close(a[:, :7], b[:, :7], **EXACT)    # experts multiply other numbers of rows
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-6


def test_a_window_forgets():
    """With one layer and a window of 4, position 9 cannot depend on position 5."""
    model = Transformer(BASE.with_(n_layers=1, window=4)).double()
    x = tokens(1, 10)
    y = x.clone()
    y[0, 5] = (y[0, 5] + 1) % 50
    with torch.no_grad():
        a, b = model(x), model(y)
    assert torch.equal(a[:, 9], b[:, 9]) and not torch.equal(a[:, 8], b[:, 8])


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    a = Transformer(BASE, seed=3).state_dict()
    torch.manual_seed(2)
    b, c = Transformer(BASE, seed=3).state_dict(), Transformer(BASE, seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_generate_is_greedy_or_seeded(model):
    x = tokens(2, 5)
    greedy = model.generate(x, 4)
    with torch.no_grad():
        for i in range(4):
            assert torch.equal(greedy[:, 5 + i], model(greedy[:, :5 + i])[:, -1].argmax(-1))
    draws = [model.generate(x, 6, 1.0, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_too_many_tokens_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="33 tokens do not fit in context=32"):
        Transformer(BASE)(tokens(1, 33))


@pytest.mark.parametrize("change, words", [
    (dict(positions="alibi"), "positions='alibi' can be counted but is not built"),
    (dict(norms_per_layer=3), "norms_per_layer=3"), (dict(head_dim=5), "head_dim=5 with rotary"),
    (dict(layer_kinds=("linear", "full"), linear=LinearAttention(1, 1, 4, 4, 2)), "linear"), (dict(d_embed=8), "d_embed=8")])
def test_what_is_not_built_says_so(change, words):
    with pytest.raises(ValueError, match=words):
        Transformer(BASE.with_(**change))


# --- attention -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_kv", [1, 2, 6])
@pytest.mark.parametrize("n_queries", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 3])
def test_every_path_equals_the_reference(n_kv, n_queries, window):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, n_queries, 5, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, n_kv, 8, w, generator=g, dtype=torch.float64) for w in (5, 7))
    mask = kernel.visible(n_queries, 8, window, q.device)
    expected = kernel.reference(q, k, v, mask)
    torch.testing.assert_close(kernel.attention(q, k, v, window=window), expected, **EXACT)
    torch.testing.assert_close(kernel.folded(q, k, v, mask), expected, **EXACT)


def test_the_choice_can_be_asked_for():
    q, k = torch.zeros(1, 4, 8, 2), torch.zeros(1, 4, 8, 2)
    assert kernel.choose(q, k, None, None)[0] == "causal"
    assert kernel.choose(q[:, :, :1], k[:, :1], None, None)[0] == "folded"
    assert kernel.choose(q, k, 3, None)[0] == "folded"
    path, reason = kernel.choose(q, k, None, torch.zeros(4))
    assert path == "reference" and "sinks" in reason


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="n_heads=4 is not divisible by n_kv_heads=3"):
        kernel.attention(torch.zeros(1, 4, 1, 2), torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
