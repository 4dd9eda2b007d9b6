"""A pipeline's timeline: every action at its place and time, two tones of one hue, and the same bytes each time."""

import re
import subprocess
import sys

import pytest
from matplotlib.colors import to_hex, to_rgb

from gpt4lib import plotting
from gpt4lib.distributed.schedule import Action, Schedule, Span
from gpt4lib.plotting import style
from gpt4lib.plotting.pipeline import svg
from tests.plotting.timelines import assert_legible, blocks, texts

SCHEDULES = {"1f1b": Schedule(4, 8), "gpipe": Schedule(4, 8, "gpipe"), "interleaved": Schedule(4, 8, n_chunks=2),
             "long": Schedule(15, 35), "one": Schedule(1, 1), "two": Schedule(2, 2, n_chunks=3)}
TONES = {tone for pair in style.PASSES.values() for tone in pair}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_drawn_once_in_its_row_at_its_time(name):
    spans = SCHEDULES[name].simulate()
    drawn = blocks(plotting.pipeline(spans))
    assert len(drawn) == len(spans)
    for stage, (kind, micro, chunk), start, end in spans:
        block = drawn[f"{stage}:{kind}{micro}.{chunk}"]
        assert block.get_x() == start and stage < block.get_y() < block.get_y() + block.get_height() < stage + 1
        assert 0.8 * (end - start) <= block.get_width() < end - start       # a seam, so that neighbours are told apart
        assert to_hex(block.get_facecolor()) == style.PASSES[kind][chunk % 2]


def test_a_recording_starts_at_zero_in_milliseconds():
    spans = [Span(0, Action("F", 0), 7.25, 7.5), Span(0, Action("B", 0), 7.5, 8.0)]
    figure = plotting.pipeline(spans, "ms")
    assert figure.axes[0].get_xlim() == (0, 750) and figure.axes[0].get_xlabel() == "ms"
    assert blocks(figure)["0:B0.0"].get_x() == 250


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_legible_stays_on_the_canvas_and_numbers_stay_in_their_blocks(name):
    figure = plotting.pipeline(SCHEDULES[name].simulate())
    style.svg(figure)
    assert_legible(figure)


def test_rows_of_many_stages_do_not_touch():
    figure = plotting.pipeline(SCHEDULES["long"].simulate())
    style.svg(figure)
    names = sorted((t.get_window_extent() for t in texts(figure) if t.get_text().startswith("stage")), key=lambda b: b.y0)
    assert len(names) == 15 and all(a.y1 <= b.y0 + 2 for a, b in zip(names, names[1:]))     # px of 96 a inch, descenders


def test_tones_and_idle_time_are_named_beside_them():
    words = {t.get_text(): t for t in texts(plotting.pipeline(SCHEDULES["gpipe"].simulate()))}
    assert {"forward", "backward", "idle", "slots"} <= set(words)
    assert words["forward"].get_color() == style.PASSES["F"][0] and words["backward"].get_color() == style.PASSES["B"][0]
    assert words["idle"].get_position() == (12.5, 0.5)         # between the last forward, 8, and the first backward, 17
    assert "chunk 1 is greyer" in plotting.pipeline(SCHEDULES["interleaved"].simulate()).axes[0].get_xlabel()


def test_the_names_of_the_tones_do_not_touch_where_a_backward_pass_comes_early():
    spans = [Span(0, Action("F", 0), 0, 0.1), Span(0, Action("B", 0), 0.1, 0.3), Span(0, Action("F", 1), 0.3, 3.0)]
    figure = plotting.pipeline(spans)
    style.svg(figure)
    at = {t.get_text(): t.get_window_extent() for t in texts(figure)}
    assert at["forward"].x1 + 5 < at["backward"].x0


def test_every_tone_reads_on_both_pages_and_forward_differs_from_backward_without_hue():
    def luminance(color):
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                   for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(color)))
    light = {tone: luminance(tone) + 0.05 for tone in TONES}
    assert len(TONES) == 4 and style.PASSES["B"][0] == style.COLORS["compute"]
    for value in light.values():                                # WCAG 2.2, 1.4.11: graphics 3:1
        assert 1.05 / value >= 3 and value / (luminance("#121212") + 0.05) >= 3
    # the two limits leave a factor of 2.1 between the lightest and the darkest tone; both kinds keep most of it
    assert all(light[f] / light[b] > 1.6 for f, b in zip(style.PASSES["F"], style.PASSES["B"]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_the_palette_is_used_and_the_page_shows_through(name):
    text = svg(SCHEDULES[name].simulate())
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text)) <= TONES | {style.GREY, "#000000", "#ffffff"}
    assert 'style="fill: none"' in text.split('<g id="patch_1">')[1].split("</g>")[0] and "<dc:date>" not in text


def test_a_schedule_draws_itself_the_same_in_a_fresh_process_without_torch():
    code = ("import sys; from gpt4lib.distributed.schedule import Schedule\n"
            "print(Schedule(4, 8, n_chunks=2)._repr_svg_(), end=''); assert 'torch' not in sys.modules")
    fresh = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "HOME": "/nonexistent"}).stdout for seed in "12"]
    assert fresh[0] == fresh[1] == svg(SCHEDULES["interleaved"].simulate())


@pytest.mark.parametrize("spans, unit", [([], "slots"), (Schedule(1, 1).simulate(), "hours")])
def test_what_cannot_be_drawn_is_refused_in_one_line(spans, unit):
    with pytest.raises(ValueError, match="cannot be drawn"):
        plotting.pipeline(spans, unit)
