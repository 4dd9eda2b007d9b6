"""What a step refuses, what it forgets, and what it leaves alone."""

import time
from datetime import timedelta

import pytest
import torch

from gpt4lib.distributed import checkpoint
from gpt4lib.distributed.data import AdamW
from gpt4lib.distributed.launch import launch
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.specs import ModelSpec
from gpt4lib.specs.workload import ParallelPlan

SPEC = ModelSpec("small", n_layers=2, d_model=16, n_heads=4, n_kv_heads=1, d_ff=24, vocab_size=37, context=16, n_experts=4, top_k=2,
                 out_bias=True)
BATCH = torch.arange(4 * 9).view(4, 9) % SPEC.vocab_size
PLANS = [ParallelPlan(dp=2, micro_batch=2, zero_stage=z) for z in (0, 1, 3)]


def trainer(plan, **how):
    return Trainer(SPEC, plan, 8, dtype=torch.float64, adamw=AdamW(lr=1e-2), **how)


def poisoned(plan):
    it = trainer(plan)
    it.step(BATCH)
    before = {name: t.clone() for name, t in it.optimizer.state("weight").items()}
    norm = it.stages[0].final_norm
    hook = norm.register_full_backward_pre_hook(lambda _, grads: tuple(g * float("nan") for g in grads))
    with pytest.raises(FloatingPointError, match="norm is nan at step 2, with a loss of 3"):
        it.step(BATCH)
    same = all(torch.equal(t, before[name]) for name, t in it.optimizer.state("weight").items())
    hook.remove()
    return same and it.steps == 1, it.step(BATCH)[1]


def twice(plan, folder):
    """Norms of the first backward pass, of a second one, and of one after loading a checkpoint over its gradients."""
    it = trainer(plan)
    checkpoint.save(folder, it)
    norms = [it.backward(BATCH)[1].gradient_norm for _ in range(2)]
    checkpoint.load(checkpoint.latest(folder), it)
    return [*norms, it.step(BATCH)[1].gradient_norm]


@pytest.mark.parametrize("plan", PLANS, ids="zero 0,zero 1,zero 3".split(","))
def test_a_gradient_that_is_not_finite_changes_nothing(plan):
    for same, after in launch(2, poisoned, plan):
        assert same and after.loss == after.loss


@pytest.mark.parametrize("plan", PLANS, ids="zero 0,zero 1,zero 3".split(","))
def test_an_abandoned_gradient_is_forgotten(plan, tmp_path):
    for norms in launch(2, twice, plan, tmp_path):
        assert norms[0] == norms[1] == norms[2]


def overlapped(plan):
    """How many buckets had started before the backward pass was over, of how many."""
    it, seen = trainer(plan, bucket_bytes=2048), []
    reduce = it.optimizer.reduce
    it.optimizer.reduce = lambda: seen.append([(len(f.works), len(f.buckets)) for f in it.optimizer.flats]) or reduce()
    it.step(BATCH)
    return seen[0]


@pytest.mark.parametrize("split", [False, True])
def test_buckets_overlap_with_the_backward_pass_under_tensor_parallelism_too(split):
    """Only what is partial waits: router, biases, the shared key/value head; norms with sequence parallelism."""
    for ((started, buckets),) in launch(4, overlapped, ParallelPlan(tp=2, dp=2, micro_batch=2, sequence_parallel=split)):
        assert buckets > 10 and started >= buckets * 2 // 3


def silent():
    """The second stage never answers; the first waits for its gradient in a group of two."""
    from torch import distributed as dist
    it = trainer(ParallelPlan(pp=2, micro_batch=4), timeout=timedelta(seconds=8))
    if dist.get_rank():
        time.sleep(60)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="(?i)tim(ed )?(e)?out|closed"):
        it.step(BATCH)
    assert time.monotonic() - start < 40
    raise RuntimeError("noticed")


def test_a_silent_peer_is_an_error_in_every_group():
    with pytest.raises(RuntimeError, match="rank 0 of 2 raised(.|\n)*noticed"):
        launch(2, silent)


def refusals():
    it = trainer(ParallelPlan(micro_batch=4))
    for batch, words in ((BATCH + 30, "from 30 to 65"), (BATCH - 1, "from -1 to 34"), (BATCH[:, :5], "sequences of 5 tokens"),
                         (BATCH[:3], "a batch of 3 is not micro_batch=4 x n_micro_batches=1 x dp=1")):
        with pytest.raises(ValueError, match=words):
            it.step(batch)
    with pytest.raises(ValueError, match="bucket_bytes=0"):
        trainer(ParallelPlan(), bucket_bytes=0)
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    it.step(BATCH)
    return it.steps == 1 and torch.equal(torch.rand(3), first)


def test_bad_batches_are_named_and_the_callers_noise_is_left_alone():
    assert launch(1, refusals) == [True]


def abandoned(folder):
    it = trainer(ParallelPlan(micro_batch=4))
    checkpoint.save(folder, it)
    for _ in range(2):
        it.step(BATCH)
    checkpoint.save(folder, it)
    it.steps = 1
    with pytest.raises(ValueError, match="holds step-00000002, later than step 1; give another folder"):
        checkpoint.save(folder, it)
    with pytest.raises(ValueError, match="is not a checkpoint; give a folder named step-NNNNNNNN"):
        checkpoint.load(folder, it)


def test_a_save_never_hides_behind_a_later_one(tmp_path):
    launch(1, abandoned, tmp_path)


def noisy(folder):
    """Losses of steps 2 and 3, straight on and after resuming from step 1, with a router that jitters its input."""
    found = []
    for resumed in (False, True):
        it = trainer(ParallelPlan(tp=2, dp=2, micro_batch=2, zero_stage=1))
        for layer in it.stages[0].layers.values():
            layer.moe.router.jitter = 0.3
        if resumed:
            torch.manual_seed(99)                          # the caller's noise is somewhere else by then
            checkpoint.load(checkpoint.latest(folder), it)
        else:
            it.step(BATCH)
            checkpoint.save(folder, it)
        found.append([it.step(BATCH)[1].loss for _ in range(2)])
    return found


def test_a_resumed_run_draws_the_same_noise(tmp_path):
    for straight, resumed in launch(4, noisy, tmp_path):
        assert straight == resumed and straight[0] != straight[1]
