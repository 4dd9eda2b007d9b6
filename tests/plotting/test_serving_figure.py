"""A server's timeline: every seat's work at its place, two tones of one hue, a cross where somebody gave way."""

import re
import subprocess
import sys

import pytest
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from gpt4lib import plotting
from gpt4lib.plotting import style
from gpt4lib.plotting.serving import MARK, TONES, runs, svg
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence
from gpt4lib.serving.timeline import Slot, Timeline
from tests.plotting.timelines import assert_legible, blocks, texts

SHAPES = [(6 + i, 10 + 2 * i) for i in range(6)]
CASES = {"roomy": dict(n_blocks=100), "tight": dict(n_blocks=14), "static": dict(n_blocks=100, continuous=False),
         "long": dict(n_blocks=600, max_running=8, shapes=[(5 * (i % 5) + 4, (17 * i) % 61 + 1) for i in range(24)]),
         "many seats": dict(n_blocks=600, max_running=20, max_batched_tokens=40, shapes=SHAPES * 6),
         "one": dict(n_blocks=4, max_running=1, shapes=[(3, 1)])}


def play(n_blocks, max_running=4, max_batched_tokens=16, shapes=SHAPES, **options):
    scheduler = Scheduler(BlockPool(n_blocks, 4), max_running, max_batched_tokens=max_batched_tokens, **options)
    for i, (prompt, new) in enumerate(shapes):
        scheduler.add(Sequence(range(100 * i, 100 * i + prompt), new))
    timeline = Timeline(scheduler)
    while (step := scheduler.schedule()).work:
        timeline.record(step)
        for group in scheduler.advance(step):
            for sequence in group:
                scheduler.append(sequence, 0)
    return timeline


@pytest.fixture(scope="module", params=CASES)
def drawn(request):
    t = play(**CASES[request.param])
    figure = plotting.timeline(t)
    style.svg(figure)
    return t, figure


def crosses(figure):
    return [a for a in figure.findobj(Line2D) if (a.get_gid() or "").startswith("preempted")]


def test_every_slot_lies_in_one_block_of_its_seat_and_kind(drawn):
    t, figure = drawn
    covered = []
    for gid, block in blocks(figure).items():
        seat, kind, sequence = gid.partition("@")[0].split(":")
        assert int(seat) < block.get_y() < block.get_y() + block.get_height() < int(seat) + 1
        assert to_hex(block.get_facecolor()) == TONES[kind]
        steps = round(block.get_width() + 0.45)                     # a seam is missing, of at most a fifth of a step
        covered += [(int(seat), step, int(sequence), kind) for step in range(int(block.get_x()), int(block.get_x()) + steps)]
    assert sorted(covered) == sorted((s.seat, s.step, s.sequence, s.kind) for s in t.slots)


def test_tokens_join_and_pieces_of_a_prompt_do_not():
    slots = [Slot(0, 0, 7, 4, False), Slot(0, 1, 7, 4, True), Slot(0, 2, 7, 1, True), Slot(0, 3, 7, 1, True), Slot(0, 5, 7, 1, True),
             Slot(0, 6, 8, 1, True)]
    assert [(r.kind, r.sequence, r.start, r.steps) for r in runs(slots)] == [
        ("prefill", 7, 0, 1), ("prefill", 7, 1, 1), ("decode", 7, 2, 2), ("decode", 7, 5, 1), ("decode", 8, 6, 1)]


def test_a_cross_ends_the_stay_of_each_that_gave_way(drawn):
    t, figure = drawn
    assert len(crosses(figure)) == len(t.preempted)
    for (step, sequence), cross in zip(t.preempted, crosses(figure)):
        (x,), (y,) = cross.get_xdata(), cross.get_ydata()
        assert cross.get_marker() == "x" and cross.get_color() == style.COLORS["failure"]
        assert max(s.step for s in t.slots if s.sequence == sequence and s.step < step) == x - 1
        assert (int(y), x - 1, sequence) in {(s.seat, s.step, s.sequence) for s in t.slots}
    assert (MARK in {x.get_text() for x in texts(figure)}) == bool(t.preempted)


def test_somebody_gives_way_in_the_tight_case_and_nobody_in_the_roomy_one():
    assert play(**CASES["tight"]).preempted and not play(**CASES["roomy"]).preempted


def test_text_is_legible_stays_on_the_canvas_and_numbers_stay_in_their_blocks(drawn):
    _, figure = drawn
    assert_legible(figure)


def test_the_tones_are_named_where_they_first_appear():
    words = {t.get_text(): t for t in texts(plotting.timeline(play(**CASES["tight"])))}
    assert {"prefill", "decode", "idle", "steps", MARK, "seat 0", "seat 3"} <= set(words)
    assert words["prefill"].get_color() == TONES["prefill"] and words["decode"].get_color() == TONES["decode"]
    assert words[MARK].get_color() == style.COLORS["failure"]


def test_only_the_palette_is_used_and_the_page_shows_through():
    text = svg(play(**CASES["tight"]))
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text)) <= {*TONES.values(), style.GREY, style.COLORS["failure"],
                                                                        "#000000", "#ffffff"}
    assert 'style="fill: none"' in text.split('<g id="patch_1">')[1].split("</g>")[0] and "<dc:date>" not in text


def test_a_timeline_draws_itself_the_same_in_a_fresh_process_without_torch():
    code = ("import sys; sys.path.insert(0, 'tests/plotting'); import test_serving_figure as t\n"
            "print(t.play(**t.CASES['tight'])._repr_svg_(), end=''); assert 'torch' not in sys.modules")
    fresh = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "HOME": "/nonexistent"}).stdout for seed in "12"]
    assert fresh[0] == fresh[1] == svg(play(**CASES["tight"]))


def test_what_cannot_be_drawn_is_refused_in_one_line():
    with pytest.raises(ValueError, match="without steps cannot be drawn"):
        plotting.timeline(Timeline(Scheduler(BlockPool(4, 4), 1)))
