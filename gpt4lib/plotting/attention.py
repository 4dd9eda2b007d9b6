"""Which query heads share which key/value head, drawn from specifications side by side."""

from typing import Mapping

from matplotlib.figure import Figure

from gpt4lib.plotting import style
from gpt4lib.specs.model import ModelSpec

MOST = 16           # query heads in one panel; more would touch
SPREAD = 0.84       # of a panel's width that its heads take


@style.styled
def head_sharing(specs: Mapping[str, ModelSpec]) -> Figure:
    """One panel a spec: its query heads, its key/value heads, who reads whom, and the numbers cached a token and layer.

    Raises ValueError for no spec, for more than 16 query heads and for latent attention, which has no key heads to draw.
    """
    if not specs or any(s.latent or s.n_heads > MOST for s in specs.values()):
        raise ValueError(f"specs {list(specs)} cannot be drawn; give at least one, without latent attention and with "
                         f"at most {MOST} query heads each")
    figure, axes = style.canvas(2.3, left=1.15, right=0.05, bottom=0.05, top=0.05)
    axes.set_axis_off()
    axes.set(xlim=(0, len(specs)), ylim=(0, 1))
    rows = {"queries": 0.72, "keys, values": 0.36, "in a layer": 0.08}
    for words, y in rows.items():
        axes.text(-0.02, y, words, ha="right", va="center")
    inches = (style.WIDTH - 1.2) / len(specs) * SPREAD
    for panel, (label, spec) in enumerate(specs.items()):
        size = min(9.0, 0.72 * 72 * inches / spec.n_heads)           # points: neighbours stay apart
        group = spec.n_heads // spec.n_kv_heads
        at = [panel + (1 - SPREAD) / 2 + SPREAD * (i + 0.5) / spec.n_heads for i in range(spec.n_heads)]
        for g in range(spec.n_kv_heads):
            mine = at[g * group:(g + 1) * group]
            middle = sum(mine) / group
            for x in mine:
                axes.plot([x, middle], [rows["queries"], rows["keys, values"]], color=style.GREY, linewidth=1)
            axes.plot([middle], [rows["keys, values"]], marker="s", markersize=size, linestyle="none",
                      color=style.COLORS["kv_cache"], gid=f"{label}:kv")
        axes.plot(at, [rows["queries"]] * spec.n_heads, marker="o", markersize=size, linestyle="none",
                  color=style.COLORS["activations"], gid=f"{label}:queries")
        axes.text(panel + 0.5, 0.95, label, ha="center", va="center")
        axes.text(panel + 0.5, rows["in a layer"], f"{2 * spec.kv_width:,} a token", ha="center", va="center")
    return figure
