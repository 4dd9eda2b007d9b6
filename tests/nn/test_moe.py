"""The mixture of experts: the router's conventions, its losses, capacity, and what a layer may depend on."""

import pytest
import torch
import torch.nn.functional as F

from gpt4lib.kernels.experts import combine, dispatch, reference, within_capacity
from gpt4lib.nn.moe import Router, Routing, balance_loss, routings, z_loss
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import ModelSpec

SPEC = ModelSpec("mixed", n_layers=2, d_model=24, n_heads=4, d_ff=40, vocab_size=50, context=32,
                 n_experts=4, top_k=2, d_expert=16)
EXACT = dict(rtol=0, atol=1e-12)      # fp64: only the order of sums differs


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moe(**changes):
    return Transformer(SPEC.with_(**changes), seed=2).double().layers[0].moe


def route(logits, top_k=2):
    top, chosen = logits.topk(top_k)
    return Routing(logits, chosen, top.softmax(-1))


# --- the layer ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [{}, dict(gated_ffn=True), dict(gated_ffn=True, expert_bias=True, router_bias=True), dict(top_k=1),
                                  dict(d_shared=8), dict(d_shared=8, shared_gate=True, gated_ffn=True)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_layer_equals_the_loop_over_experts(kind, tokens):
    layer, x = moe(**kind), numbers(tokens, 24)
    for i, p in enumerate(layer.parameters()):
        p.data = numbers(*p.shape, seed=i)
    e = layer.experts
    _, chosen, gates = layer.router(x)
    expected = reference(x, chosen, gates, e.w_in, e.w_out, e.in_bias, e.out_bias, e.activation)
    if layer.shared is not None:
        s = layer.shared
        up = x @ s.up.weight.t()
        h = torch.nn.functional.gelu(up) if s.gate is None else torch.nn.functional.silu(x @ s.gate.weight.t()) * up
        gate = 1 if layer.shared_gate is None else torch.sigmoid(x @ layer.shared_gate.weight.t())
        expected = expected + gate * (h @ s.down.weight.t())
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_a_token_s_output_does_not_depend_on_the_others():
    layer, x = moe(d_shared=8, shared_gate=True), numbers(9, 24)
    torch.testing.assert_close(layer(x)[3:4], layer(x[3:4]), **EXACT)


def test_an_expert_without_tokens_gets_a_zero_gradient_not_none_or_nan():
    layer = moe()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:2] += 1.0
    layer(torch.ones(3, 24, dtype=torch.float64)).sum().backward()
    for weight in (layer.experts.w_in, layer.experts.w_out):
        assert torch.isfinite(weight.grad).all()
        assert weight.grad[:2].abs().amax((1, 2)).gt(0).all() and not weight.grad[2:].any()


def test_all_tokens_on_one_expert():
    layer, x = moe(top_k=1), numbers(7, 24).abs()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0
    chosen = layer.router(x).chosen
    e = layer.experts
    torch.testing.assert_close(layer(x), F.gelu(x @ e.w_in[2].t()) @ e.w_out[2].t(), **EXACT)
    assert (chosen == 2).all()


def test_stacked_weights_are_used_whole_in_every_step():
    """One parameter for all experts: a sharded optimizer never meets a parameter without a gradient."""
    layer = moe(d_shared=8)
    layer(numbers(1, 24)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


# --- the router --------------------------------------------------------------------------------------------
def test_topk_then_softmax_equals_softmax_then_topk_renormalised():
    router, x = Router(SPEC).double(), numbers(9, 24)
    logits, chosen, gates = router(x)
    probabilities = logits.softmax(-1).gather(1, chosen)
    torch.testing.assert_close(gates, probabilities / probabilities.sum(-1, keepdim=True), **EXACT)


def test_without_renormalising_the_gates_are_still_probabilities():
    router, x = Router(SPEC, renormalise=False).double(), numbers(9, 24)
    logits, chosen, gates = router(x)
    torch.testing.assert_close(gates, logits.softmax(-1).gather(1, chosen), **EXACT)
    assert (gates > 0).all() and (gates.sum(-1) < 1).all()


def test_the_router_decides_in_fp32_even_for_a_bf16_model():
    """Logits computed in bfloat16 send some tokens elsewhere; ours are those of an fp32 router on the same input."""
    router, x = Router(SPEC).bfloat16(), numbers(2000, 24, seed=1, dtype=torch.bfloat16)
    logits, chosen, gates = router(x)
    wide = F.linear(x.float(), router.weight.float())
    assert logits.dtype == gates.dtype == torch.float32 and torch.equal(chosen, wide.topk(2).indices)
    narrow = F.linear(x, router.weight).topk(2).indices
    assert (narrow.sort().values != chosen.sort().values).any()


def test_jitter_stays_within_its_bounds():
    """A one-hot router reads the jittered input itself."""
    router = Router(SPEC, jitter=0.1).double()
    router.weight.data.zero_()[:, 0] = 1
    seen = torch.cat([router(torch.ones(200, 24, dtype=torch.float64)).logits[:, 0] for _ in range(5)])
    assert 0.9 <= seen.min() < 0.91 and 1.09 < seen.max() <= 1.1


def test_the_router_stays_in_fp32_under_autocast():
    router, x = Router(SPEC), torch.randn(64, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x).logits
    assert logits.dtype == torch.float32 and torch.equal(logits, router(x).logits)


def test_jitter_moves_the_logits_in_training_only():
    router, x = Router(SPEC, jitter=0.1).double(), numbers(9, 24)
    torch.manual_seed(0)
    noisy = router(x).logits
    still = router.eval()(x).logits
    assert not torch.equal(noisy, still) and torch.equal(still, F.linear(x, router.weight))


# --- dispatch, combine, capacity ---------------------------------------------------------------------------
def test_dispatch_sorts_slots_and_combine_undoes_it():
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    order, ends = dispatch(chosen, 5)
    assert order.tolist() == [1, 4, 0, 2, 5, 3] and ends.tolist() == [2, 2, 5, 6, 6]
    rows, gates = numbers(6, 3), numbers(3, 2)
    expected = (rows.view(3, 2, 3) * gates[..., None]).sum(1)
    torch.testing.assert_close(combine(rows, gates), expected, **EXACT)


def test_combine_adds_in_fp32():
    """1 + 2^-9 - 1 + 2^-9 in bfloat16: a bfloat16 sum would lose both small terms."""
    slots = torch.tensor([1.0, 2.0 ** -9] * 2, dtype=torch.bfloat16)[:, None]
    out = combine(slots.repeat(1, 4), torch.tensor([[1.0, 1.0, -1.0, 1.0]]))
    assert out.dtype == torch.bfloat16 and (out == 2.0 ** -8).all()


def test_capacity_drops_in_a_stated_order_first_choices_then_earlier_tokens():
    chosen = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]])
    # expert 0, capacity 2: first choices of tokens 0 and 1 stay, that of token 3 and the second of token 2 go
    # expert 1, capacity 2: the first choice of token 2 comes before the second choices of tokens 0 and 1
    assert within_capacity(chosen, 3, 2).tolist() == [[0, 1], [0, 3], [1, 3], [3, 2]]


def test_a_capacity_above_the_number_of_tokens_changes_nothing():
    chosen = numbers(9, 4).topk(2).indices
    assert torch.equal(within_capacity(chosen, 4, 9), chosen) and torch.equal(within_capacity(chosen, 4, 10**6), chosen)


def test_dropped_tokens_are_counted_and_pass_through_the_residual_only():
    layer, x = moe(), numbers(8, 24).abs()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:2] = torch.tensor([2.0, 1.0])[:, None]          # everybody wants experts 0 and 1
    layer.router.capacity_factor = 1.0                                       # 8 * 2 / 4 = 4 slots an expert
    with routings(layer) as seen:
        out = layer(x)
    assert seen[0].dropped == 8 and out[:4].abs().amax(1).gt(0).all() and not out[4:].any()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_capacity_is_never_used_at_inference():
    layer, x = moe(), numbers(8, 24).abs()
    layer.router.capacity_factor = 0.25
    assert layer.router(x).dropped > 0 and layer.eval().router(x).dropped == 0


# --- losses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_balanced_router_scores_exactly_one(top_k):
    """Every expert equally likely, and chosen equally often."""
    chosen = torch.stack([(torch.arange(8) + k) % 8 for k in range(top_k)], 1)
    assert balance_loss(Routing(torch.zeros(8, 8), chosen, torch.zeros(8, top_k))).item() == 1.0


def test_a_collapsed_router_scores_n_experts_over_top_k():
    logits = torch.full((16, 8), -1e9)
    logits[:, :2] = 0.0
    assert balance_loss(route(logits)).item() == pytest.approx(8 / 2)


def test_pooling_layers_would_score_total_collapse_as_perfect():
    """Two layers, each collapsed on its own experts: pooled over layers they look balanced (1), apart they score 2."""
    a, b = torch.full((2, 16, 4), -1e9).unbind(0)
    a[:, :2], b[:, 2:] = 0.0, 0.0
    pooled = balance_loss(route(torch.cat([a, b])))
    per_layer = torch.stack([balance_loss(route(a)), balance_loss(route(b))]).mean()
    assert pooled.item() == pytest.approx(1.0) and per_layer.item() == pytest.approx(2.0)


def test_padding_is_left_out_of_the_losses():
    logits, mask = numbers(12, 4), torch.arange(12) < 7
    for loss in (balance_loss, z_loss):
        torch.testing.assert_close(loss(route(logits), mask), loss(route(logits[:7])), **EXACT)


def test_z_loss_is_the_mean_square_of_the_log_partition():
    logits = numbers(6, 4)
    assert z_loss(route(logits)).item() == pytest.approx((logits.exp().sum(-1).log() ** 2).mean().item())


def test_the_losses_reach_the_router_s_weights_through_the_recorded_graph():
    model = Transformer(SPEC).double()
    with routings(model) as seen:
        model(torch.arange(8)[None])
    assert len(seen) == 2
    sum(map(balance_loss, seen)).backward()
    assert all(layer.moe.router.weight.grad.any() for layer in model.layers)
    with routings(model) as later:
        pass
    model(torch.arange(8)[None])
    assert not later


def test_training_on_the_loss_balances_a_collapsed_router():
    layer, x = moe(), numbers(256, 24)
    with torch.no_grad():
        layer.router.weight[0] = 5 * x.mean(0).sign()
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = balance_loss(layer.router(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[-1] and losses[-1] < 1.05


def _balance_on_a_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    logits = numbers(10, 4)
    part = logits[:4] if rank == 0 else logits[4:]
    loss = balance_loss(route(part), group=dist.group.WORLD)
    torch.save(loss, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_counts_of_all_ranks_make_the_loss_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_balance_on_a_rank, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(sum(both) / 2, balance_loss(route(numbers(10, 4))), **EXACT)
