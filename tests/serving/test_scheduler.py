"""Who runs in the next step: nobody starves, and nobody computes what is there already."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence
from gpt4lib.serving.timeline import Timeline

TOTAL = 12


def play(scheduler, token=lambda s: 0):
    """The steps until nothing is left to do."""
    steps = []
    while (step := scheduler.schedule()).work:
        steps.append(step)
        for group in scheduler.advance(step):
            for sequence in group:
                scheduler.append(sequence, token(sequence))
        assert len(steps) < 10_000
    return steps


def sequences(*shapes, **more):
    return [Sequence(list(range(100 * i, 100 * i + p)), n, **more) for i, (p, n) in enumerate(shapes)]


def scheduler_for(*added, n_blocks=TOTAL, size=4, max_running=4, **options):
    scheduler = Scheduler(BlockPool(n_blocks, size), max_running, **options)
    for s in added:
        scheduler.add(s)
    return scheduler


def ranges(step):
    return [(w.start, w.stop) for w in step.work]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12), st.integers(1, 6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_sequence_finishes_and_every_block_returns(lengths, max_running):
    for continuous in (True, False):
        added = sequences(*lengths)
        scheduler = scheduler_for(*added, max_running=max_running, max_batched_tokens=max_running + 3, continuous=continuous)
        play(scheduler)
        assert all(s.finish_reason == "length" and len(s.generated) == s.max_new_tokens for s in added)
        assert not scheduler.running and not scheduler.waiting and scheduler.pool.n_free == TOTAL


def test_static_batches_wait_for_their_longest():
    dice = random.Random(0)
    lengths = [(4, min(1 + int(dice.expovariate(1 / 50)), 200)) for _ in range(64)]
    static, continuous = (len(play(scheduler_for(*sequences(*lengths), n_blocks=1000, max_running=8, continuous=c)))
                          for c in (False, True))
    assert static == sum(max(n for _, n in lengths[i:i + 8]) for i in range(0, 64, 8))
    assert continuous < 0.6 * static


def test_a_static_batch_reserves_its_longest_possible_answers():
    scheduler = scheduler_for(*sequences((4, 12), (4, 12), (4, 12), (4, 12)), continuous=False)
    assert len(scheduler.schedule().work) == 3                      # 4 blocks each, of 12
    assert len(scheduler_for(*sequences((4, 12), (4, 12), (4, 12), (4, 12))).schedule().work) == 4


def test_the_budget_goes_to_decodes_first_then_to_prompts_in_chunks():
    a, b, c = sequences((3, 9), (10, 1), (10, 1))
    scheduler = scheduler_for(a, max_batched_tokens=6)
    advance(scheduler)
    scheduler.add(b), scheduler.add(c)
    step = advance(scheduler)
    assert [(w.sequence, w.start, w.stop) for w in step.work] == [(a, 3, 4), (b, 0, 5)]
    step = advance(scheduler)
    assert [(w.sequence, w.start, w.stop) for w in step.work] == [(a, 4, 5), (b, 5, 10)] and b.finish_reason
    assert ranges(advance(scheduler)) == [(5, 6), (0, 5)]


def advance(scheduler, token=7):
    step = scheduler.schedule()
    for group in scheduler.advance(step):
        for s in group:
            scheduler.append(s, token)
    return step


def test_a_request_may_finish_with_its_prompt():
    (a,) = sequences((5, 1))
    scheduler = scheduler_for(a)
    assert ranges(advance(scheduler)) == [(0, 5)]
    assert a.finish_reason == "length" and scheduler.pool.n_free == TOTAL and not scheduler.schedule().work


@pytest.mark.parametrize("prompt", [4, 8, 9, 3])
def test_a_fully_cached_prompt_still_computes_its_last_token(prompt):
    """A multiple of the block size is the trap: all of it is cached, and zero tokens would be left to compute."""
    a, b = Sequence(list(range(prompt)), 1), Sequence(list(range(prompt)), 1)
    scheduler = scheduler_for(a)
    advance(scheduler)
    scheduler.add(b)
    cached = (prompt - 1) // 4 * 4
    assert ranges(advance(scheduler)) == [(cached, prompt)] and b.n_cached == cached and b.finish_reason


def test_two_identical_prompts_in_one_step_do_not_read_what_is_not_there_yet():
    a, b = Sequence(list(range(9)), 2), Sequence(list(range(9)), 2)
    scheduler = scheduler_for(a, b)
    step = advance(scheduler)
    assert ranges(step) == [(0, 9), (0, 9)] and not set(a.blocks) & set(b.blocks)


def test_a_block_is_found_only_when_all_of_it_is_computed():
    a, b = Sequence(list(range(12)), 2), Sequence(list(range(12)), 2)
    scheduler = scheduler_for(a, max_batched_tokens=6, max_running=2)
    advance(scheduler)                                              # six tokens: one block full, one half
    scheduler.add(b)
    scheduler.max_batched_tokens = 100
    step = scheduler.schedule()
    assert [(w.start, w.stop) for w in step.work if w.sequence is b] == [(4, 12)]


def test_only_what_is_equal_from_the_start_is_shared():
    a, b = Sequence([1, 2, 3, 4, 5, 6, 7, 8, 9], 1), Sequence([9, 2, 3, 4, 5, 6, 7, 8, 9], 1)
    scheduler = scheduler_for(a)
    advance(scheduler)
    scheduler.add(b)
    advance(scheduler)
    assert b.n_cached == 0


def test_answers_are_cached_too():
    a = Sequence([1, 2, 3], 6)
    scheduler = scheduler_for(a)
    play(scheduler, token=lambda s: 5)
    b = Sequence([1, 2, 3, 5, 5, 5, 5, 5, 5], 1)
    scheduler.add(b)
    advance(scheduler)
    assert b.n_cached == 8


def test_without_a_prefix_cache_every_prompt_is_computed_from_its_start():
    a, b = Sequence(list(range(9)), 1), Sequence(list(range(9)), 1)
    scheduler = scheduler_for(a, prefix_cache=False)
    advance(scheduler)
    scheduler.add(b)
    assert ranges(scheduler.schedule()) == [(0, 9)] and not a.keys


def test_the_last_in_rank_gives_way_and_resumes_where_its_blocks_still_are():
    """Preempted and resumed with a prefix hit: the trap is to take the resumed prompt for a decode, or to count the cached
    tokens past the end."""
    a, b = sequences((8, 12), (8, 12))
    scheduler = scheduler_for(a, b, n_blocks=7)
    steps = play(scheduler)
    assert b.preemptions == 1 and a.preemptions == 0 and scheduler.pool.n_free == 7
    out = next(i for i, s in enumerate(steps) if s.preempted)
    before, after = ([(w.start, w.stop) for s in part for w in s.work if w.sequence is b] for part in (steps[:out], steps[out:]))
    assert before == [(0, 8), *((n, n + 1) for n in range(8, before[-1][1]))]
    assert after[0] == (b.n_cached, before[-1][1] + 1) and 0 < b.n_cached < before[-1][1]       # with the token it had last
    assert after[1:] == [(n, n + 1) for n in range(after[0][1], 19)]
    assert len(a.generated) == len(b.generated) == 12


def test_the_first_in_rank_is_never_preempted_and_priority_is_rank():
    plain, urgent = sequences((8, 12), (8, 12))
    urgent.priority = -1
    scheduler = scheduler_for(plain, n_blocks=7)
    advance(scheduler)
    scheduler.add(urgent)
    play(scheduler)
    assert plain.preemptions == 1 and urgent.preemptions == 0


def test_waiting_sequences_are_admitted_by_priority_then_arrival():
    a, b, c, d = sequences((4, 1), (4, 1), (4, 1), (4, 1))
    c.priority = -1
    b.priority = 1
    scheduler = scheduler_for(a, b, c, d, max_running=1)
    assert [s.work[0].sequence for s in play(scheduler)] == [c, a, d, b]


def test_nobody_is_admitted_who_might_have_to_give_way_at_once():
    for shapes, n_blocks, together in (((16, 4), (12, 4)), 8, 1), (((8, 8), (4, 12)), 4, 1), (((16, 4), (12, 4)), 9, 2):
        scheduler = scheduler_for(*sequences(*shapes), n_blocks=n_blocks)
        assert len(scheduler.schedule().work) == together               # of what is free each needs one block to grow into
        assert not any(s.preempted for s in play(scheduler_for(*sequences(*shapes), n_blocks=n_blocks)))
    (a,) = sequences((16, 4))
    b = Sequence(list(range(12)), 4, forks=[Sequence(list(range(12)), 4) for _ in range(2)])
    for n_blocks, together in (10, 1), (11, 2):
        assert len(scheduler_for(a, b, n_blocks=n_blocks).schedule().work) == together
        a.blocks, b.blocks, a.n_computed, b.n_computed = [], [], 0, 0


def test_forks_share_the_prompt_and_copy_only_a_partial_tail_when_they_write():
    (a,) = sequences((6, 4))
    b, c = (Sequence(a.prompt, 4) for _ in "bc")
    a.forks = [b, c]
    scheduler = scheduler_for(a, max_running=3)
    advance(scheduler)
    assert a.blocks == b.blocks == c.blocks and scheduler.pool.references(a.blocks[1]) == 3 and not a.forks
    step = advance(scheduler)
    assert len(step.copies) == 2                                        # the last writer keeps the tail itself
    assert len({s.blocks[0] for s in (a, b, c)}) == 1 and len({s.blocks[1] for s in (a, b, c)}) == 3
    assert not advance(scheduler).copies
    play(scheduler)
    assert scheduler.pool.n_free == TOTAL


def test_forks_of_a_prompt_that_fills_its_blocks_copy_nothing():
    (a,) = sequences((8, 4))
    a.forks = [Sequence(a.prompt, 4)]
    scheduler = scheduler_for(a)
    assert not any(s.copies for s in play(scheduler)) and scheduler.pool.n_free == TOTAL


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_cancelled_sequence_leaves_nothing_behind(when):
    """Waiting, in the middle of its prompt, and decoding; its forks end with it."""
    (a,) = sequences((10, 5))
    a.forks = [Sequence(a.prompt, 5)]
    fork = a.forks[0]
    scheduler = scheduler_for(a, max_batched_tokens=6)
    for _ in range(when):
        advance(scheduler)
    for s in (a, fork):
        if not s.finish_reason:
            scheduler.finish(s, "cancelled")
    assert scheduler.pool.n_free == TOTAL and not scheduler.waiting and not scheduler.running
    assert a.finish_reason == fork.finish_reason == "cancelled"


def test_a_static_batch_keeps_the_seats_of_those_who_are_done():
    scheduler = scheduler_for(*sequences((4, 1), (4, 3), (4, 2)), max_running=2, continuous=False)
    timeline = Timeline(scheduler)
    while (step := scheduler.schedule()).work:
        timeline.record(step)
        for (s,) in scheduler.advance(step):
            scheduler.append(s, 0)
    assert [(t.seat, t.step, t.sequence, t.kind) for t in timeline.slots] == [
        (0, 0, 0, "prefill"), (1, 0, 1, "prefill"), (1, 1, 1, "decode"), (1, 2, 1, "decode"), (0, 3, 2, "prefill"), (0, 4, 2, "decode")]
    assert timeline.utilisation == 6 / 10


def test_a_timeline_gives_free_seats_away_and_notes_who_was_preempted():
    scheduler = scheduler_for(*sequences((8, 12), (8, 12), (2, 2)), n_blocks=7)
    timeline = Timeline(scheduler)
    while (step := scheduler.schedule()).work:
        timeline.record(step)
        for (s,) in scheduler.advance(step):
            scheduler.append(s, 0)
    seats = [(t.step, t.seat) for t in timeline.slots]
    assert len(seats) == len(set(seats)) and [n for _, n in timeline.preempted] == [1]


@pytest.mark.parametrize("act, words", [
    (lambda: Sequence([], 1), "prompt is empty"), (lambda: Sequence([1], 0), "max_new_tokens=0"),
    (lambda: scheduler_for(Sequence([1] * 5, 4), n_blocks=2), "needs 3 blocks of 4, the pool has 2"),
    (lambda: scheduler_for(Sequence([1], 1, forks=[Sequence([1], 1)]), max_running=1), "2 samples of one prompt"),
    (lambda: scheduler_for(max_running=0), "max_running=0"), (lambda: scheduler_for(max_batched_tokens=3), "max_batched_tokens=3"),
    (lambda: scheduler_for(Sequence([1], 1, forks=[Sequence([1], 1)]), continuous=False), "not for static batching")])
def test_misuse_is_named(act, words):
    with pytest.raises(ValueError, match=words):
        act()
