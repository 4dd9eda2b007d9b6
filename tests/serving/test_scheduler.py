"""The scheduler and its pool: nothing lost, nobody starved, continuous never slower than static."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence

TOTAL = 12


def run(lengths, max_running, continuous, n_blocks=TOTAL):
    """Steps until all sequences are done; checks the pool at every step."""
    pool = BlockPool(n_blocks, block_size=4)
    scheduler = Scheduler(pool, max_running, continuous)
    sequences = [Sequence(list(range(p)), n) for p, n in lengths]
    for s in sequences:
        scheduler.add(s)
    steps, finished = 0, []
    while batch := scheduler.schedule():
        assert len(batch) <= max_running
        held = sum(len(s.blocks) for s in scheduler.running)
        assert held + pool.n_free == n_blocks
        assert all(pool.blocks_for(s.n_tokens) <= len(s.blocks) for s in batch)
        finished += scheduler.update({s: 0 for s in batch})
        steps += 1
        assert steps <= sum(n for _, n in lengths)
    assert not scheduler.waiting and pool.n_free == n_blocks
    assert sorted(map(id, finished)) == sorted(map(id, sequences))
    assert all(len(s.generated) == s.max_new_tokens for s in sequences)
    return steps


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12), st.integers(1, 6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_sequence_finishes_and_every_block_returns(lengths, max_running):
    assert run(lengths, max_running, True) <= run(lengths, max_running, False)


def test_static_batches_wait_for_their_longest():
    dice = random.Random(0)
    lengths = [(4, min(1 + int(dice.expovariate(1 / 50)), 200)) for _ in range(64)]
    static, continuous = (run(lengths, 8, c, n_blocks=1000) for c in (False, True))
    assert static == sum(max(n for _, n in lengths[i:i + 8]) for i in range(0, 64, 8))
    assert continuous < 0.6 * static


@given(st.lists(st.sampled_from(["allocate", "share", "release"]), max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_pool_counts_references(operations, dice):
    pool, held = BlockPool(5, 2), []
    for op in operations:
        if op == "allocate" and pool.n_free:
            held.append(pool.allocate())
        elif op == "share" and held:
            held.append(dice.choice(held))
            pool.share(held[-1])
        elif op == "release" and held:
            pool.release(held.pop(dice.randrange(len(held))))
        assert pool.n_free == 5 - len(set(held))


@pytest.mark.parametrize("act, words", [
    (lambda: BlockPool(0, 4), "n_blocks=0"), (lambda: BlockPool(1, 4).release(0), "block 0 is already free"),
    (lambda: BlockPool(1, 4).share(0), "block 0 is free and cannot be shared"),
    (lambda: [BlockPool(1, 4).allocate() and None, *map(lambda p: (p.allocate(), p.allocate()), [BlockPool(1, 4)])],
     "no free block among 1"),
    (lambda: Sequence([], 1), "prompt is empty"), (lambda: Sequence([1], 0), "max_new_tokens=0"),
    (lambda: Scheduler(BlockPool(2, 4), 1).add(Sequence([1] * 5, 4)), "needs 3 blocks of 4, the pool has 2")])
def test_misuse_is_named(act, words):
    with pytest.raises(ValueError, match=words):
        act()
