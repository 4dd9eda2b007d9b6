"""Every figure: the data it was given, the one palette, text large enough, and the same bytes each time."""

import math
import re
import subprocess
import sys

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from gpt4lib import plotting
from gpt4lib.analysis.parameters import parameters
from gpt4lib.plotting import curves, style
from gpt4lib.specs.model import LatentAttention, ModelSpec

PALETTE = {*style.COLORS.values(), style.ATTENTION, style.EXPERTS, style.GREY, "#000000", "#ffffff"}
WIDTHS = list(range(6000, 15001, 500))


def chart(name):
    spec = ModelSpec.preset("gpt-4")
    count = parameters(spec)
    match name:
        case "bar":
            return plotting.parameter_bar({"GPT-4": count.by_part}, {"GPT-4": count.active})
        case "block":
            return plotting.block_diagram(spec)
        case "dense block":
            return plotting.block_diagram(ModelSpec.preset("gpt-3-175b"))
        case "shape":
            return plotting.shape_map(WIDTHS, {"MHA": [480 * d * d for d in WIDTHS],
                                               "MQA": [240 * d * d for d in WIDTHS]},
                                      [960 * d * d for d in WIDTHS])
        case "lines":
            return plotting.lines({"a": ([1, 10, 100], [1, 2, 3]), "b": ([1, 10], [3, 1])}, "x", "y", x_ticks=[1, 10, 100],
                                  log_x=True, y_ticks=[0, 2, 4], rules={"limit": 2.5}, at={"b": (2, 1)}, marks=True)
        case "dots":
            return plotting.dots({"a source": ([0.9, 1.1], [1.0]), "another": ([0.1, 7.0], [])}, "x", [0.5, 1, 2], log_x=True,
                                 band=(0.8, 1.2))
        case "active":
            return plotting.active_total({"gpt-4": (count.total, count.active),
                                          "dense": (175 * 10 ** 9, 175 * 10 ** 9)}, "gpt-4")


CHARTS = ("bar", "block", "dense block", "shape", "lines", "dots", "active")


def marks(figure):
    """gid -> artist, for everything a chart named."""
    return {artist.get_gid(): artist for artist in figure.findobj() if artist.get_gid()}


@pytest.mark.parametrize("name", CHARTS)
def test_text_is_legible_and_there_is_no_legend(name):
    figure = chart(name)
    assert figure.get_figwidth() == style.WIDTH
    sizes = [t.get_fontsize() for t in figure.findobj(Text) if t.get_text()]
    # 11 CSS px in a 350 px column, the text width of a 390 px telephone
    assert sizes and min(sizes) >= 11 * style.WIDTH * 72 / 350 - 0.5 and min(sizes) >= style.TEXT
    assert all(axes.get_legend() is None for axes in figure.axes)


@pytest.mark.parametrize("name", CHARTS)
def test_only_the_palette_is_used_and_the_page_shows_through(name):
    text = style.svg(chart(name))
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert used and used <= PALETTE
    assert 'style="fill: none"' in text.split('<g id="patch_1">')[1].split("</g>")[0]
    assert "<dc:date>" not in text and "Matplotlib v" not in text


@pytest.mark.parametrize("name", CHARTS)
def test_no_text_leaves_the_canvas(name):
    figure = chart(name)
    style.svg(figure)
    box = figure.bbox
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            assert box.x0 - 1 <= extent.x0 and extent.x1 <= box.x1 + 1, text.get_text()
            assert box.y0 - 1 <= extent.y0 and extent.y1 <= box.y1 + 1, text.get_text()


def test_the_same_bytes_in_a_fresh_process():
    code = ("import sys; sys.path.insert(0, 'tests/plotting'); import test_figures as t\n"
            "print(''.join(t.style.svg(t.chart(n)) for n in t.CHARTS), end='')")
    fresh = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "MPLBACKEND": backend,
                                 "HOME": "/nonexistent"}).stdout
             for seed, backend in (("1", "agg"), ("2", "svg"))]
    here = "".join(style.svg(chart(name)) for name in CHARTS)
    assert fresh[0] == fresh[1] == here


def test_use_changes_nothing_in_a_figure():
    import matplotlib
    before = style.svg(chart("shape"))
    with matplotlib.rc_context():
        style.use()
        assert style.svg(chart("shape")) == before


def test_hues_are_distinct_and_read_on_both_pages():
    def luminance(color):
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                    for c in to_rgb(color)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels))
    dark = luminance("#121212") + 0.05
    assert len(set(style.COLORS.values())) == len(style.COLORS)
    for color in {*style.COLORS.values(), style.ATTENTION, style.EXPERTS}:   # WCAG 2.2, 1.4.11: graphics 3:1
        assert 1.05 / (luminance(color) + 0.05) >= 3 and (luminance(color) + 0.05) / dark >= 3
    for page in (1.05 / (luminance(style.GREY) + 0.05), (luminance(style.GREY) + 0.05) / dark):
        assert page >= 4.2     # the best one grey can do on white and #121212 together is 4.33


def test_parameter_bar_draws_the_counts():
    count = parameters(ModelSpec.preset("gpt-4"))
    drawn = marks(chart("bar"))
    assert {part: drawn[f"0:{part}"].get_width() for part in count.by_part} == count.by_part
    assert drawn["0:active"].get_width() == count.active


def test_parameter_bar_refuses_nothing():
    with pytest.raises(ValueError, match="nothing to draw"):
        plotting.parameter_bar({})


@pytest.mark.parametrize("n_experts, top_k", [(16, 2), (8, 2), (64, 6), (256, 8), (4, 4)])
def test_block_diagram_lights_top_k_of_the_experts(n_experts, top_k):
    spec = ModelSpec.preset("gpt-4").with_(n_experts=n_experts, top_k=top_k)
    drawn = [a for gid, a in marks(plotting.block_diagram(spec)).items() if gid.startswith("expert:")]
    assert len(drawn) == n_experts
    assert sum(artist.get_facecolor()[3] > 0 for artist in drawn) == top_k


def test_block_diagram_shows_the_latent_vector_instead_of_heads():
    latent = LatentAttention(kv_rank=512, rope_dim=64, nope_dim=128, v_dim=128)
    spec = ModelSpec.preset("gpt-2").with_(latent=latent)
    words = {text.get_text() for text in plotting.block_diagram(spec).findobj(Text)}
    assert {"12 query heads", f"× 192 = {12 * 192:,}", "1 latent vector", "512 + 64 = 576"} <= words


def test_shape_map_draws_the_curves_and_marks_the_solutions():
    drawn = marks(chart("shape"))
    assert list(drawn["MHA"].get_xdata()) == WIDTHS
    assert list(drawn["MHA"].get_ydata()) == [480 * d * d for d in WIDTHS]
    # linear interpolation between widths 500 apart: the curvature moves the crossing by less than 0.1 %
    assert drawn["MHA:solution"].get_xdata()[0] == pytest.approx((55e9 / 480) ** 0.5, rel=1e-3)
    assert drawn["one expert:solution"].get_xdata()[0] == pytest.approx((111e9 / 960) ** 0.5, rel=1e-3)
    assert "MQA:solution" not in drawn       # 240 d^2 reaches 55e9 only beyond the last width


def test_active_total_draws_the_points():
    count = parameters(ModelSpec.preset("gpt-4"))
    drawn = marks(chart("active"))
    assert (drawn["gpt-4"].get_xdata()[0], drawn["gpt-4"].get_ydata()[0]) == (count.total, count.active)
    with pytest.raises(ValueError, match="gpt-5"):
        plotting.active_total({"gpt-4": (2, 1)}, "gpt-5")


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0, 1.0], [3.0, 1.0, 1.1], [0.0, 10.0]])
def test_spread_keeps_order_and_gap(values):
    moved = curves.spread(values, 1.0)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    placed = [moved[i] for i in order]
    assert all(b - a >= 1.0 - 1e-12 for a, b in zip(placed, placed[1:]))
    assert sum(moved) == pytest.approx(sum(values))     # groups move about their mean


# Machado, Oliveira, Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", table 1, severity 1.0; they act on linear RGB.
SEEN_BY = {
    "trichromat": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "deuteranope": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                    (-0.011820, 0.042940, 0.968881)),
    "protanope": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                  (-0.003882, -0.048116, 1.051998)),
}


@pytest.mark.parametrize("eye", SEEN_BY)
def test_hues_stay_apart_for_colour_blind_readers(eye):
    def lab(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        seen = [min(max(sum(m * c for m, c in zip(row, linear)), 0), 1) for row in SEEN_BY[eye]]
        to_xyz = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8729))
        x, y, z = (f ** (1 / 3) if f > 0.008856 else 7.787 * f + 16 / 116
                   for f in (sum(w * c for w, c in zip(row, seen)) for row in to_xyz))
        return 116 * y - 16, 500 * (x - y), 200 * (y - z)
    places = [lab(color) for color in style.COLORS.values()]
    # CIE76: 2.3 is just noticeable; 10 is seen at a glance
    assert min(math.dist(a, b) for i, a in enumerate(places) for b in places[:i]) > 10


def test_lines_pass_through_their_points_and_carry_their_own_colour():
    figure = chart("lines")
    drawn = marks(figure)
    assert list(drawn["a"].get_ydata()) == [1, 2, 3] and list(drawn["b"].get_xdata()) == [1, 10]
    names = {t.get_text().strip(): t for t in figure.findobj(Text)}
    assert names["a"].get_color() == drawn["a"].get_color() != drawn["b"].get_color() == names["b"].get_color()
    assert names["b"].get_position() == (2, 1) and names["limit"].get_position()[1] == pytest.approx(2.5, abs=0.3)


def test_a_logarithmic_axis_from_zero_is_refused():
    with pytest.raises(ValueError, match="a first tick > 0"):
        plotting.lines({"a": ([1], [1])}, "x", "y", x_ticks=[0, 1], log_x=True, y_ticks=[0, 1])


def test_dots_stand_at_their_values_and_outliers_at_the_edge_as_triangles():
    lines = [line for line in chart("dots").axes[0].lines if line.get_gid()]
    drawn = [(line.get_gid(), line.get_xdata()[0], line.get_marker()) for line in lines]
    assert drawn == [("a source", 0.9, "o"), ("a source", 1.1, "o"), ("a source", 1.0, "o"), ("another", 0.5, "<"), ("another", 2, ">")]
    assert [line.get_fillstyle() for line in lines[:3]] == ["full", "full", "none"]
