"""Schedules are legal, hold and idle as the closed forms say, and their simulation is what a real run replays."""

from itertools import product

import pytest

from gpt4lib.analysis import pipeline
from gpt4lib.distributed.schedule import Action, Schedule
from gpt4lib.specs.workload import ParallelPlan

EVERY = [Schedule(p, m, kind, v) for p, m, (kind, v) in product(
    range(1, 9), (1, 2, 3, 5, 7, 8, 9, 16, 19, 35), (("1f1b", 1), ("gpipe", 1), ("1f1b", 2), ("1f1b", 3), ("1f1b", 4)))]


def test_every_schedule_can_be_run():
    for schedule in EVERY:
        schedule.check()


@pytest.mark.parametrize("forward, backward", [(1, 1), (1, 2), (3, 5)])
def test_idle_slots_are_the_closed_form(forward, backward):
    """Simulated == predicted, for every stage, fewer micro-batches than stages and rounds that do not divide too."""
    for s in EVERY:
        if s.n_stages == 1:
            continue                                  # chunks of one stage wait for nobody
        expected = pipeline.idle_slots(s.n_stages, s.n_micro, s.n_chunks, forward, backward)
        assert {s.idle(stage, forward, backward) for stage in range(s.n_stages)} == {expected}, s
        busy = s.n_micro * s.n_chunks * (forward + backward)
        assert expected / busy == pytest.approx(pipeline.bubble_overhead(s.n_stages, s.n_micro, s.n_chunks), abs=0, rel=1e-12)


def test_activations_in_flight_are_the_closed_form():
    for s in EVERY:
        for stage in range(s.n_stages if s.n_stages > 1 or s.n_chunks == 1 else 0):
            assert s.in_flight(stage) == pipeline.in_flight(s.n_stages, s.n_micro, stage, s.n_chunks, s.kind), (s, stage)


def test_one_forward_one_backward_holds_less_than_gpipe_at_the_same_bubble():
    one, all_first = Schedule(4, 12), Schedule(4, 12, "gpipe")
    assert one.idle(0) == all_first.idle(0) and (one.in_flight(0), all_first.in_flight(0)) == (4, 12)


def test_gpt4s_fifteen_stages():
    """14 turns lost of 49 at 35 micro-batches; in two chunks, of 84."""
    for chunks, turns in ((1, 49), (2, 84)):
        s = Schedule(15, 35, n_chunks=chunks)
        assert max(span.end for span in s.simulate()) == 3 * turns and s.idle(0) == 3 * 14
        assert pipeline.bubble_fraction(15, 35, chunks) == pytest.approx(14 / turns)


def test_uneven_stages_go_at_the_pace_of_the_slowest():
    """120 layers on 16 stages: each further micro-batch costs the 8 layers of the fullest, not 7.5."""
    layers = ParallelPlan(pp=16).layers_per_chunk(120)
    end = {(m, x): max(s.end for s in Schedule(16, m).simulate(layers=x)) for m in (32, 64) for x in (layers, (7.5,) * 16)}
    assert sorted(set(layers)) == [7, 8]
    assert [end[64, x] - end[32, x] for x in (layers, (7.5,) * 16)] == [32 * 3 * 8, 32 * 3 * 7.5]


class Broken(Schedule):
    """One stage runs its first backward before its first forward."""

    def order(self, stage):
        first, *rest = super().order(stage)
        i = rest.index(Action("B", 0))
        return super().order(stage) if stage != 1 else [rest[i], first, *rest[:i], *rest[i + 1:]]


class Forgetful(Schedule):
    def order(self, stage):
        return super().order(stage)[:-1] if stage == 2 else super().order(stage)


@pytest.mark.parametrize("schedule, words", [(Broken(3, 4), "deadlock: stage 0 waits at B0, stage 1 waits at B0, stage 2"),
                                             (Forgetful(3, 4), "stage 2 does not run every forward and backward")])
def test_an_illegal_schedule_is_told_in_words(schedule, words):
    with pytest.raises(ValueError, match=words):
        schedule.check()


@pytest.mark.parametrize("arguments, words", [((0, 1), "n_stages=0"), ((1, 2.5), "n_micro=2.5"), ((2, 2, "2f2b"), "schedule='2f2b'")])
def test_misuse_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Schedule(*arguments)
