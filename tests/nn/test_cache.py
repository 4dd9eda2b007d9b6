"""Contiguous and paged caches give what the full pass gives."""

import pytest
import torch

from gpt4lib.nn.cache import KVCache, PagedKVCache, Pages, RaggedKVCache
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import LatentAttention, ModelSpec

BASE = ModelSpec("base", n_layers=2, d_model=24, n_heads=4, head_dim=6, d_ff=40, vocab_size=50, context=64)
KINDS = {"multi-head": {}, "multi-query": dict(n_kv_heads=1), "grouped": dict(n_kv_heads=2, gated_ffn=True),
         "learned": dict(positions="learned"), "window": dict(window=6), "experts": dict(n_experts=4, top_k=2, n_kv_heads=1)}
EXACT = dict(rtol=0, atol=1e-12)      # fp64: only the order of sums differs


@pytest.fixture(params=KINDS)
def model(request):
    return Transformer(BASE.with_(**KINDS[request.param]), seed=1).double()


def tokens(batch, n, seed=0):
    return torch.randint(50, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_sequences_of_different_lengths_decode_together(model):
    """Prefilled one by one into scattered pages, then decoded as one batch: each row is its own full pass."""
    prompts, x = (3, 8, 13), tokens(3, 20)
    table = torch.randperm(15, generator=torch.Generator().manual_seed(2)).int().view(3, 5)
    cache = PagedKVCache(model.spec, 15, 4, table, torch.float64)
    for b, n in enumerate(prompts):
        model(x[b:b + 1, :n], cache.rows(b, b + 1))
    assert cache.lengths.tolist() == [3, 8, 13] and cache.length == 13
    for step, n in enumerate((1, 1, 3)):                        # the last pass verifies three tokens at once
        at = [p + min(step, 2) for p in prompts]
        part = torch.stack([x[b, a:a + n] for b, a in enumerate(at)])
        logits = model(part, cache)
        for b, a in enumerate(at):
            torch.testing.assert_close(logits[b], model(x[b:b + 1, :a + n])[0, a:], **EXACT)


@torch.no_grad()
def test_two_sequences_may_share_the_pages_of_a_common_prefix():
    model, x = Transformer(BASE, seed=1).double(), tokens(2, 12)
    x[1, :8] = x[0, :8]
    table = torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32)
    cache = PagedKVCache(BASE, 4, 4, table, torch.float64)
    model(x[:1, :8], cache.rows(0, 1))
    cache.lengths[1] = 8                                        # the prefix is there already
    torch.testing.assert_close(model(x[:, 8:], cache), model(x)[:, 8:], **EXACT)


@torch.no_grad()
def test_a_cache_grows_without_copying_every_step():
    cache, held = KVCache(), set()
    for n in [5] + [1] * 40:
        k, _ = cache.append(0, torch.full((1, 1, n, 2), float(n)), torch.zeros(1, 1, n, 2))
        held.add(k.data_ptr())
    assert k.shape[2] == 45 and (k[:, :, :5] == 5).all() and (k[:, :, 5:] == 1).all()
    assert len(held) <= 5 and cache.bytes == 2 * 45 * 2 * 4


def test_a_step_with_gradients_between_two_without_loses_nothing():
    cache = KVCache()
    for value, grad in enumerate([False, False, True, False, False]):
        new = torch.full((1, 1, 1, 2), float(value)).requires_grad_(grad)
        keys, _ = cache.append(0, new, torch.zeros(1, 1, 1, 2))
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]


def test_pages_do_not_join_the_graph_and_keep_their_own_dtype():
    model = Transformer(BASE)
    cache = PagedKVCache(BASE, 4, 4, torch.arange(4, dtype=torch.int32)[None], torch.float16)
    logits = model(tokens(1, 5), cache)
    assert not cache.pages.pools[0].requires_grad and cache.pages.pools[0].dtype == torch.float16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(tokens(1, 5)), rtol=0, atol=1e-3)        # fp16 keeps 11 bits


def test_gradients_flow_through_a_cached_pass():
    model, x = Transformer(BASE).double(), tokens(1, 6)
    cache = KVCache()
    torch.cat([model(x[:, :4], cache), model(x[:, 4:], cache)], 1).square().sum().backward()
    cached = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, p in zip(cached, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-12)


def test_what_pages_cannot_hold_is_refused():
    table = torch.zeros(1, 1, dtype=torch.int32)
    for spec in (BASE.with_(sinks=True), BASE.with_(head_dim=10, latent=LatentAttention(10, 4, 6, 8))):
        with pytest.raises(ValueError, match="need a KVCache"):
            PagedKVCache(spec, 1, 4, table)
    cache = PagedKVCache(BASE, 20, 4, torch.arange(20, dtype=torch.int32)[None])
    cache.lengths += 62
    with pytest.raises(ValueError, match="65 tokens do not fit in context=64"):
        Transformer(BASE)(tokens(1, 3), cache)


RAGGED = {**KINDS, "sinks": dict(sinks=True, n_kv_heads=2), "windowed sinks": dict(sinks=True, window=6),
          "latent": dict(latent=LatentAttention(q_rank=None, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=6))}


@pytest.mark.parametrize("kind", RAGGED)
@torch.no_grad()
def test_pieces_of_different_sequences_in_one_pass_are_each_their_own_full_pass(kind):
    """Whole prompts, chunks of prompts and single tokens side by side, over permuted pages."""
    model, x = Transformer(BASE.with_(**RAGGED[kind]), seed=1).double(), tokens(4, 20)
    pages = Pages(model.spec, 25, 4, torch.float64)
    table = torch.randperm(24, generator=torch.Generator().manual_seed(3)).view(4, 6).tolist()
    passes = [[(0, 0, 7), (1, 0, 1), (2, 0, 4)], [(3, 0, 5), (0, 7, 8), (1, 1, 2), (2, 4, 9)],
              [(0, 8, 9), (1, 2, 3), (2, 9, 10), (3, 5, 10)], [(2, 10, 20), (3, 10, 20), (0, 9, 20)]]
    for pieces in passes:
        cache = RaggedKVCache(pages, [(table[b], start, stop) for b, start, stop in pieces], spare=24)
        logits = model(torch.cat([x[b, start:stop] for b, start, stop in pieces])[None], cache)[0]
        for (b, start, stop), found in zip(pieces, logits.split([stop - start for _, start, stop in pieces])):
            torch.testing.assert_close(found, model(x[b:b + 1, :stop])[0, start:], **EXACT)


@torch.no_grad()
def test_only_the_wanted_logits_are_computed():
    model, x = Transformer(BASE, seed=1), tokens(2, 6)
    torch.testing.assert_close(model(x, only=torch.tensor([1, 5])), model(x)[:, [1, 5]], rtol=1e-5, atol=1e-6)
    assert model(x, only=torch.tensor([], dtype=torch.int64)).shape == (2, 0, 50)


def test_pages_are_copied_and_cleared_whole():
    pages = Pages(BASE, 4, 2)
    for pool in pages.pools:
        pool.copy_(torch.arange(4.0)[:, None, None, None])
    pages.copy([(3, 0), (2, 1)])
    pages.clear([2])
    pages.copy([])
    for pool in pages.pools:
        assert pool.flatten(2).unique(dim=2).squeeze(2).tolist() == [[3, 2, 0, 3]] * BASE.n_layers
    assert len(Pages(BASE.with_(latent=RAGGED["latent"]["latent"]), 4, 2).pools) == 1
