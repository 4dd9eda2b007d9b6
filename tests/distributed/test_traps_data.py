"""The known ways in which data and expert parallelism go wrong without a word, one test each.

Workers only collect; what they return is judged by the tests.
"""

import pytest
import torch
import torch.distributed as dist

from gpt4lib.distributed.layout import window
from gpt4lib.nn.moe import routings
from gpt4lib.nn.transformer import Transformer
from gpt4lib.profiling.wire import count_wire
from gpt4lib.specs.workload import ParallelPlan as Plan
from tests.distributed import oracle
from tests.distributed.oracle import BIASED, DENSE, MIXED, alone, data, on_a_rank, trainer, unreduced

CLOSE = dict(rtol=0, atol=1e-13)              # fp64, one step: only the order of sums differs
ROUTED = MIXED.with_(router_bias=True)
workers = oracle.Workers(__name__)


# --- data parallelism ----------------------------------------------------------------------------------------
@workers.on(2)
def clipped():
    found = []
    for zero in (0, 1, 3):
        it = trainer(DENSE, Plan(dp=2, zero_stage=zero), adamw=oracle.ADAMW._replace(clip=0.1))
        parts, reduce = [], it.optimizer.reduce
        it.optimizer.reduce = lambda: parts.append(reduce()) or parts[0]
        _, result = it.step(data(DENSE, 2, 1)[0])
        found.append((parts[0].item(), result.gradient_norm, it.optimizer.state("exp_avg")))
    return found


@pytest.mark.parametrize("i, zero", [(0, 0), (1, 1), (2, 3)])
def test_gradients_are_clipped_by_the_norm_over_all_shards(i, zero):
    """After one step the first moment is (1 - 0.9) times the clipped gradient; each rank's own norm would clip less."""
    expected = alone(DENSE, data(DENSE, 2, 1), 1)
    (a, norm, moments), (b, other, _) = (rank[i] for rank in clipped())
    assert norm == other == pytest.approx(expected.norms[0], rel=1e-13) and a + b == pytest.approx(norm ** 2, rel=1e-13)
    assert min(a, b) > 0 if zero else b == 0
    for name, moment in moments.items():
        torch.testing.assert_close(moment, 0.1 * expected.gradients[name] * 0.1 / (norm + 1e-6), **CLOSE)


ODD = DENSE.with_(head_bias=True)


@workers.on(3)
def shards_that_do_not_fit():
    return [on_a_rank(ODD, Plan(dp=3, zero_stage=zero, n_micro_batches=2), 3, bucket_bytes=1000) for zero in (0, 1, 3)]


@pytest.mark.parametrize("i, zero", [(0, 0), (1, 1), (2, 3)])
def test_parameters_that_three_ranks_do_not_divide(i, zero):
    """Neither the total nor the embedding's rows divide by 3, and buckets of 1000 bytes cut parameters anywhere."""
    assert sum(p.numel() for p in Transformer(ODD).parameters()) % 3 and ODD.vocab_size % 3
    oracle.compare([rank[i] for rank in shards_that_do_not_fit()], alone(ODD, data(ODD, 6, 3), 2), atol=1e-12)


@workers.on(2)
def wire():
    found = {}
    for zero in (0, 1, 3):
        for n in (1, 4):
            it = trainer(DENSE, Plan(dp=2, zero_stage=zero, n_micro_batches=n))
            with count_wire() as seen:
                it.step(data(DENSE, 2 * n, 1)[0])
            found[zero, n] = [call[:2] for call in seen.calls if call.kind in ("all_reduce", "reduce_scatter")]
    return found


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_gradients_are_reduced_once_a_step_not_once_a_micro_batch(zero):
    """The same reductions, of the same sizes, with four micro-batches as with one; more than the three numbers of the log."""
    for rank in wire():
        assert rank[zero, 4] == rank[zero, 1] and sum(size for _, size in rank[zero, 1]) > 24
        assert {kind for kind, _ in rank[zero, 1]} == ({"all_reduce", "reduce_scatter"} if zero else {"all_reduce"})


@workers.on(2)
def fresh_states():
    plans = [Plan(tp=2), Plan(pp=2), *(Plan(dp=2, zero_stage=zero, ep=ep) for zero in (0, 1, 3) for ep in (1, 2))]
    its = [trainer(BIASED if plan.tp > 1 else MIXED, plan, seed=7) for plan in plans]
    return [(oracle.weights(it), it.pieces) for it in its]


@pytest.mark.parametrize("i", range(8))
def test_the_state_gathers_back_to_the_weights_of_one_process(i):
    """Before the first step, put together from all ranks' pieces: the same bits as `Transformer(spec, seed)`."""
    whole = Transformer(MIXED if i else BIASED, seed=7).double().state_dict()
    gathered = {name: torch.full_like(p, torch.nan) for name, p in whole.items()}
    for weights, pieces in (rank[i] for rank in fresh_states()):
        for name, mine in weights.items():
            for box in pieces[name].chunks():
                window(gathered[name], box.offsets, box.sizes).copy_(window(mine, box.local, box.sizes))
    assert all(torch.equal(gathered[name], p) for name, p in whole.items())


# --- expert parallelism --------------------------------------------------------------------------------------
def lopsided(model, bias):
    """Routers that prefer experts by so much that the tokens do not matter."""
    for name, p in model.named_parameters():
        if name.endswith("router.bias"):
            p.data.copy_(torch.tensor(bias))


SKEWED = {"nothing for rank 1": [9., 8., 0., 0.], "nothing for rank 0": [0., 0., 8., 9.], "three to one": [9., 0., .02, 0.]}


@workers.on(2)
def uneven():
    found = {}
    for name, bias in SKEWED.items():
        it = trainer(ROUTED, Plan(dp=2, ep=2))
        lopsided(it.stages[0], bias)
        with routings(it.stages[0]) as seen:
            it.backward(data(ROUTED, 2, 1)[0])
        found[name] = [torch.bincount(r.chosen.flatten(), minlength=4) for r in seen], oracle.gradients(it), it.pieces
    return found


@pytest.mark.parametrize("name", SKEWED)
def test_any_number_of_tokens_to_a_rank_none_too(name):
    """The backward pass runs on a rank whose experts got nothing, and leaves zeros there; elsewhere the oracle's gradients."""
    model = Transformer(ROUTED).double()
    lopsided(model, SKEWED[name])
    expected = alone(ROUTED, data(ROUTED, 2, 1), 1, model=model).gradients
    ranks = [rank[name] for rank in uneven()]
    counts = sum(sum(counts) for counts, *_ in ranks).view(2, 2).sum(1).tolist()
    assert name != "three to one" and 0 in counts or name == "three to one" and counts[0] != counts[1] and min(counts) > 0
    for rank, (_, gradients, pieces) in enumerate(ranks):
        for key, grad in gradients.items():
            torch.testing.assert_close(grad, pieces[key].take(expected[key]), **CLOSE)
            assert counts[rank] or ".experts." not in key or not grad.any()


@workers.on(2)
def routers_and_capacity():
    """One micro-batch of two, so that nothing is reduced yet: what this rank's backward pass leaves."""
    it, whole = trainer(MIXED, Plan(dp=2, ep=2, n_micro_batches=2)), Transformer(MIXED).double()
    for layer in (*it.stages[0].layers.values(), *whole.layers):
        if layer.moe is not None:
            layer.moe.router.capacity_factor = 0.75
    tokens = data(MIXED, 2, 1)[0].chunk(2)[dist.get_rank()]
    found = []
    for model in (it.stages[0], whole):
        with routings(model) as seen:
            out = model(tokens)
        out.square().mean().backward()
        found += [out.detach(), sum(r.dropped for r in seen)]
    mine, theirs = unreduced(it), {name: p.grad for name, p in whole.named_parameters()}
    return found, mine, theirs, it.pieces


def test_capacity_with_experts_elsewhere_drops_what_the_local_layer_drops():
    for (out, dropped, expected, local), *_ in routers_and_capacity():
        torch.testing.assert_close(out, expected, **CLOSE)
        assert dropped == local > 0


def test_experts_see_the_tokens_of_all_ranks_and_routers_their_own():
    """Before any reduction: a router's gradient is the local model's, an expert's the sum over both ranks' local models."""
    ranks = routers_and_capacity()
    total = {name: sum(theirs[name] for _, _, theirs, _ in ranks) for name in ranks[0][2]}
    for _, mine, theirs, pieces in ranks:
        for name, grad in mine.items():
            torch.testing.assert_close(grad, pieces[name].take((total if ".experts." in name else theirs)[name]), **CLOSE)


@workers.on(2)
def one_step_of_experts():
    return [on_a_rank(MIXED, Plan(dp=2, ep=2, zero_stage=zero), 1) for zero in (0, 1, 3)]


@pytest.mark.parametrize("i", range(3))
def test_gradients_of_routers_are_averaged_over_ranks(i):
    """Both ranks hold the mean, which no rank's own sequence gives."""
    whole = alone(MIXED, data(MIXED, 2, 1), 1).gradients
    own = alone(MIXED, [data(MIXED, 2, 1)[0][:1]], 1).gradients
    a, b = (rank[i].gradients for rank in one_step_of_experts())
    for name in (name for name in whole if ".router." in name):
        assert torch.equal(a[name], b[name]) and (own[name] - whole[name]).abs().max() > 1e-4
        torch.testing.assert_close(a[name], whole[name], **CLOSE)
