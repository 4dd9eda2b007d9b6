"""Which query heads share which key/value head: the drawn heads are the specification's."""

import pytest
from matplotlib.text import Text

from gpt4lib import plotting
from gpt4lib.plotting import style
from gpt4lib.specs.model import ModelSpec

TOY = ModelSpec(name="toy", n_layers=2, d_model=64, n_heads=8, head_dim=16, d_ff=256, vocab_size=256, context=64)
SPECS = {"multi-head": TOY, "grouped": TOY.with_(n_kv_heads=2), "multi-query": TOY.with_(n_kv_heads=1)}


def lines(figure, gid):
    return [line for line in figure.axes[0].lines if line.get_gid() == gid]


@pytest.mark.parametrize("label", SPECS)
def test_every_head_of_the_spec_is_drawn_and_each_group_stands_over_its_key_head(label):
    spec, figure = SPECS[label], plotting.head_sharing(SPECS)
    (queries,) = lines(figure, f"{label}:queries")
    keys = lines(figure, f"{label}:kv")
    assert len(queries.get_xdata()) == spec.n_heads and len(keys) == spec.n_kv_heads
    group = spec.n_heads // spec.n_kv_heads
    for g, key in enumerate(keys):
        mine = queries.get_xdata()[g * group:(g + 1) * group]
        assert key.get_xdata()[0] == pytest.approx(sum(mine) / group)
    assert f"{2 * spec.kv_width:,} a token" in {t.get_text() for t in figure.findobj(Text)}


def test_text_is_legible_the_hues_mean_what_they_mean_and_there_is_no_legend():
    figure = plotting.head_sharing(SPECS)
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text()) >= style.TEXT
    assert {k.get_color() for k in lines(figure, "grouped:kv")} == {style.COLORS["kv_cache"]}
    assert figure.axes[0].get_legend() is None and figure.get_figwidth() == style.WIDTH


def test_it_is_the_same_svg_twice():
    assert style.svg(plotting.head_sharing(SPECS)) == style.svg(plotting.head_sharing(SPECS))


@pytest.mark.parametrize("specs", [{}, {"gpt-4": ModelSpec.preset("gpt-4")}, {"v3": ModelSpec.preset("deepseek-v3")}])
def test_what_cannot_be_drawn_is_refused_in_one_line(specs):
    with pytest.raises(ValueError, match="cannot be drawn"):
        plotting.head_sharing(specs)
