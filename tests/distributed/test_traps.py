"""The known ways in which tensor and pipeline parallelism go wrong without a word, one test each.

Workers only collect; what they return is judged by the tests.
"""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gpt4lib.distributed import pipeline
from gpt4lib.distributed.schedule import Schedule
from gpt4lib.distributed.tensor import enter, leave, vocab_parallel_cross_entropy
from gpt4lib.nn.moe import routings
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs.workload import ParallelPlan as Plan
from tests.distributed import oracle
from tests.distributed.oracle import BIASED, DENSE, MIXED, alone, data, on_a_rank, same_rows, trainer, unreduced

CLOSE = dict(rtol=0, atol=1e-13)              # fp64, one step: only the order of sums differs
TP = Plan(tp=2, n_micro_batches=2)
workers = oracle.Workers(__name__)


# --- tensor parallelism --------------------------------------------------------------------------------------
@workers.on(2)
def before_and_after_the_sum():
    found = []
    for sp in (False, True):
        it = trainer(DENSE, Plan(tp=2, sequence_parallel=sp))
        micro = it.rows(data(DENSE, 1, 1)[0])
        it.pipeline.step([m[:, :-1] for m in micro], [m[:, 1:] for m in micro])
        before = unreduced(it)
        it.optimizer.reduce()
        found.append((before, oracle.gradients(it)))
    return found


NORMS = ["layers.0.norms.0.weight", "layers.1.norms.1.bias", "layers.3.norms.0.weight", "final_norm.weight", "final_norm.bias"]


@pytest.mark.parametrize("name", NORMS)
def test_replicated_parameters_have_the_same_gradient_on_all_ranks_and_not_twice(name):
    """Outside regions, without sequence parallelism, the backward pass itself is replicated: the same bits, no sum."""
    (before, after), (other, _) = (rank[0] for rank in before_and_after_the_sum())
    assert torch.equal(before[name], other[name]) and torch.equal(before[name], after[name])


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_norms_under_sequence_parallelism_are_summed(name):
    """Each rank saw its tokens only, so the parts differ; their sum is the gradient without sequence parallelism."""
    (plain, _), ((a, summed), (b, other)) = before_and_after_the_sum()[0][0], (rank[1] for rank in before_and_after_the_sum())
    assert not torch.equal(a[name], b[name]) and torch.equal(summed[name], other[name])
    torch.testing.assert_close(a[name] + b[name], plain[name], **CLOSE)
    torch.testing.assert_close(summed[name], plain[name], **CLOSE)


@workers.on(2)
def biases():
    it, whole = trainer(BIASED, TP), Transformer(BIASED).double()
    for name, p in whole.named_parameters():
        if name.endswith("bias"):
            p.data = torch.linspace(-1, 1, len(p), dtype=p.dtype)
            it.stages[0].get_parameter(name).data.copy_(it.pieces[name].take(p.data))
    tokens = data(DENSE, 2, 1)[0]
    return it.stages[0](tokens).detach(), whole(tokens).detach()


def test_a_bias_is_added_once():
    """Biases of many values, not zero as at first nor alike, which a layer norm takes out: added twice, they move the logits."""
    (left, whole), (right, _) = biases()
    torch.testing.assert_close(torch.cat([left, right], -1)[..., :37], whole, **CLOSE)


@workers.on(2)
def losses_of_bf16_logits():
    full = (30 * torch.randn(6, 37, generator=torch.Generator().manual_seed(1))).bfloat16()
    mine = F.pad(full, (0, 1), value=1e4).chunk(2, 1)[dist.get_rank()].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, torch.tensor([0, 18, 19, 36, 5, 30]), None, 37)
    loss.mean().backward()
    return full, loss.detach(), mine.grad


def test_vocabulary_parallel_loss_is_fp32_and_blind_to_padding():
    """The padding holds 1e4, larger than any logit; 1e-5 is fp32 at losses of 100, where bfloat16 is off by up to 0.25."""
    ranks = losses_of_bf16_logits()
    full = ranks[0][0].float().requires_grad_()
    expected = F.cross_entropy(full, torch.tensor([0, 18, 19, 36, 5, 30]), reduction="none")
    expected.mean().backward()
    for _, loss, grad in ranks:
        assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
    grad = torch.cat([r[2] for r in ranks], 1)
    assert torch.equal(grad[:, :37], full.grad.bfloat16()) and not grad[:, 37:].any()


@workers.on(2)
def one_key_value_head():
    return on_a_rank(DENSE.with_(n_kv_heads=1), TP, 1)


def test_the_gradient_norm_counts_replicated_parameters_once():
    """Norms and the shared key/value head are on both ranks; counted twice, the norm would be inflated visibly."""
    ranks, expected = one_key_value_head(), alone(DENSE.with_(n_kv_heads=1), data(DENSE, 2, 1), 2)
    twice = sum(g.square().sum() for run in ranks for g in run.gradients.values()).sqrt().item()
    assert ranks[0].norms == ranks[1].norms == pytest.approx(expected.norms, rel=1e-13)
    assert twice > 1.01 * expected.norms[0]


@workers.on(2)
def what_backward_is_given():
    found = []
    for region, sp in ((enter, False), (leave, False), (enter, True), (leave, True)):
        x = torch.ones(1, 4, 2, requires_grad=True)
        y = region(x, None, sp)
        given = torch.ones_like(y)
        y.backward(given)
        found.append((x.detach().clone(), given, x.grad))
    return found


def test_neither_inputs_nor_incoming_gradients_are_reduced_in_place():
    """Autograd may hand the same tensor to others; a sum of ones over two ranks would turn it into twos."""
    for rank in what_backward_is_given():
        assert all((t == 1).all() for x, given, _ in rank for t in (x, given))
        assert [grad.unique().tolist() for _, _, grad in rank] == [[2.0], [1.0], [2.0], [1.0]]


@workers.on(2)
def noise():
    found = {}
    for key, plan in (("tp", TP), ("dp", Plan(dp=2)), ("recomputed", Plan(dp=2, recompute="full"))):
        it = trainer(MIXED, plan)
        for layer in it.stages[0].layers.values():
            if layer.moe is not None:
                layer.moe.router.jitter = 0.3
        with routings(it.stages[0]) as seen:
            it.backward(same_rows(plan))
        found[key] = [r.logits.detach() for r in seen], oracle.gradients(it)
    return found


def test_noise_is_the_same_on_tensor_parallel_ranks_and_different_on_replicas():
    """All rows are the same, so that only the routers' jitter can tell replicas apart."""
    a, b = noise()
    assert all(torch.equal(x, y) for x, y in zip(a["tp"][0], b["tp"][0]))
    assert not any(torch.equal(x, y) for x, y in zip(a["dp"][0], b["dp"][0]))
    assert not torch.equal(a["tp"][0][0], a["tp"][0][3])                 # nor is it the same for the next micro-batch


def test_a_recomputed_layer_draws_its_noise_again():
    """The same bits: the recomputed forward pass is the same program on the same numbers."""
    for rank in noise():
        assert len(rank["recomputed"][0]) == 2 * len(rank["dp"][0])
        assert all(torch.equal(g, rank["dp"][1][name]) for name, g in rank["recomputed"][1].items())


# --- pipeline parallelism ------------------------------------------------------------------------------------
@workers.on(2)
def micro_batches_one_and_four():
    """Gradients of the same sequence in one or four micro-batches, on one or two replicas."""
    found = {}
    kinds = dict(pipeline=dict(pp=2), replicas=dict(dp=2), zero1=dict(dp=2, zero_stage=1),
                 zero3=dict(dp=2, zero_stage=3), experts=dict(dp=2, ep=2), experts3=dict(dp=2, ep=2, zero_stage=3))
    for kind, degrees in kinds.items():
        for n in (1, 4):
            plan = Plan(**degrees, n_micro_batches=n)
            it = trainer(MIXED, plan)
            record, result = it.backward(same_rows(plan))
            found[kind, n] = record.loss, result, oracle.gradients(it), it.pieces
    return found


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", ["pipeline", "replicas", "zero1", "zero3", "experts", "experts3"])
def test_the_loss_is_scaled_once_and_gradients_are_a_mean_not_a_sum(kind, n):
    """One sequence, however often and on however many ranks, has one gradient; experts' are divided by ep just once."""
    expected = alone(MIXED, [same_rows(Plan())], 1)
    for rank in micro_batches_one_and_four():
        _, result, gradients, pieces = rank[kind, n]
        assert [*result] == pytest.approx([expected.losses[0], expected.balances[0], expected.norms[0]], rel=1e-13)
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, pieces[name].take(expected.gradients[name]), **CLOSE)


def test_only_the_last_stage_has_a_loss_and_all_ranks_report_it():
    (first, told, *_), (last, result, *_) = (rank["pipeline", 4] for rank in micro_batches_one_and_four())
    assert first == 0.0 and last > 3 and told == result and result.loss == pytest.approx(last)


@workers.on(2)
def losses_in_order():
    plan, seen = Plan(pp=2, n_micro_batches=4, n_chunks=2), []
    it = trainer(DENSE, plan)
    last = it.stages[-1]
    loss = last.loss
    last.loss = lambda logits, targets: seen.append(loss(logits, targets)) or seen[-1]
    it.backward(data(DENSE, 4, 1)[0])
    return [x.item() for x in seen]


def test_every_micro_batch_meets_its_own_labels():
    """Micro-batch by micro-batch, the losses on the last stage are those of the whole model; all differ."""
    first, last = losses_in_order()
    model = Transformer(DENSE).double()
    expected = [F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in data(DENSE, 4, 1)[0]]
    assert not first and [last[[m for k, m, c in Schedule(2, 4, n_chunks=2).order(1) if k == "F" and c == 1].index(i)]
                          for i in range(4)] == pytest.approx(expected, rel=1e-13) and len(set(expected)) == 4


@workers.on(2)
def buffers():
    alive, real = [], dist.isend

    class Watched:
        def __init__(self, x, *where, **group):
            self.x, self.copy = weakref.ref(x), x.clone()          # the transfer itself must not be what keeps x
            self.work = real(self.copy, *where, **group)

        def wait(self):
            alive.append(self.x() is not None)
            self.work.wait()

    pipeline.dist.isend = Watched
    try:
        trainer(DENSE, Plan(pp=2, n_micro_batches=3, n_chunks=2)).backward(data(DENSE, 3, 1)[0])
    finally:
        pipeline.dist.isend = real
    return alive


def test_send_buffers_live_until_their_transfer_is_waited_for():
    assert buffers() == [[True] * 9, [True] * 9]      # 3 micro-batches over 3 links both ways, by 2 ranks


@workers.on(4)
def few_micro_batches():
    found = []
    for n in (1, 2, 8):
        record, result = trainer(DENSE, Plan(pp=4, n_micro_batches=n)).backward(same_rows(Plan(n_micro_batches=n)))
        found.append((record.in_flight, result.gradient_norm))
    return found


def test_fewer_micro_batches_than_stages_and_a_single_one():
    """No deadlock, the same norm, and stage s of 4 holds no more than 4 - s micro-batches."""
    for stage, rank in enumerate(few_micro_batches()):
        assert [held for held, _ in rank] == [min(n, 4 - stage) for n in (1, 2, 8)]
        assert [norm for _, norm in rank] == pytest.approx([rank[0][1]] * 3, rel=1e-13)


@workers.on(4)
def tied_ends():
    found = []
    for zero in (0, 1, 3):
        it = trainer(DENSE, Plan(pp=2, dp=2, n_micro_batches=2, zero_stage=zero))
        micro = it.rows(data(DENSE, 4, 1)[0])
        it.pipeline.step([m[:, :-1] for m in micro], [m[:, 1:] for m in micro])
        before = {} if zero == 3 else unreduced(it)
        it.optimizer.reduce()
        found.append((before.get("embedding.weight"), oracle.gradients(it)["embedding.weight"]))
    return found


@pytest.mark.parametrize("i, zero", [(0, 0), (1, 1), (2, 3)])
def test_both_ends_of_the_pipeline_get_the_whole_gradient_of_a_tied_embedding(i, zero):
    """Neither end sees it alone; the sum of both over stages comes before, or with, the mean over replicas."""
    ranks, expected = [rank[i] for rank in tied_ends()], alone(DENSE, data(DENSE, 4, 1), 2).gradients["embedding.weight"]
    for _, after in ranks:
        assert torch.equal(after, ranks[0][1])
        torch.testing.assert_close(after, expected, **CLOSE)
    if zero < 3:
        assert all((before - expected).abs().max() > 1e-3 for before, _ in ranks)
        torch.testing.assert_close(sum(before for before, _ in ranks) / 2, expected, **CLOSE)
