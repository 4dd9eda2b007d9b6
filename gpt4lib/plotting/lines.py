"""Lines against a logarithmic or plain axis, each named at its end: the chart most chapters need."""

import math
from typing import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from gpt4lib.plotting import style
from gpt4lib.plotting.curves import spread

Curve = tuple[Sequence[float], Sequence[float]]


@style.styled
def lines(curves: Mapping[str, Curve], x_label: str, y_label: str, *, colors: Mapping[str, str] | None = None,
          x_ticks: Sequence[float], y_ticks: Sequence[float], log_x: bool = False, log_y: bool = False,
          show: Callable[[float], str] = style.short, show_y: Callable[[float], str] | None = None,
          marks: bool = False, rules: Mapping[str, float] | None = None, at: Mapping[str, tuple[float, float]] | None = None,
          right: float = 1.5) -> Figure:
    """curves: label -> (xs, ys), drawn in `colors` (label -> a meaning of COLORS or a hue) and named in the same colour.

    The ticks are the limits too. A name stands at the right end of its curve, or starts where `at` puts it (label -> (x, y)).
    `rules`: label -> y of a dotted horizontal line. `marks` puts a dot on every point, for measurements. `right` is the
    room for the names, in inches.
    Raises ValueError when there is nothing to draw or a logarithmic axis starts at zero.
    """
    if not curves or (log_x and x_ticks[0] <= 0) or (log_y and y_ticks[0] <= 0):
        raise ValueError(f"curves of {list(curves)} with ticks from {x_ticks[0]} and {y_ticks[0]} cannot be drawn; "
                         f"give at least one curve, and a first tick > 0 for a logarithmic axis")
    figure, axes = style.canvas(3.6, left=0.75, right=right, bottom=0.6, top=0.4)
    for axis, ticks, log, text in ((axes.xaxis, x_ticks, log_x, show), (axes.yaxis, y_ticks, log_y, show_y or show)):
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log" if log else "linear")
        style.ticks(axis, ticks, text)
    axes.set(xlim=(x_ticks[0], x_ticks[-1]), ylim=(y_ticks[0], y_ticks[-1]), xlabel=x_label)
    for y in (rules or {}).values():
        axes.axhline(y, **style.DOTTED)
    at, hue = at or {}, {}
    cycle = [style.COLORS[m] for m in ("weights", "kv_cache", "activations", "optimizer", "communication")]
    for i, (label, (xs, ys)) in enumerate(curves.items()):
        color = (colors or {}).get(label, cycle[i % len(cycle)])
        hue[label] = style.COLORS.get(color, color)
        axes.plot(xs, ys, color=hue[label], marker="o" if marks else None, markersize=5, gid=label)
    for label, (x, y) in at.items():
        axes.text(x, y, label, ha="left", va="center_baseline", color=hue.get(label, style.GREY))
    ends = {label: ys[-1] for label, (_, ys) in curves.items()} | dict(rules or {})
    ends = {label: y for label, y in ends.items() if label not in at}
    place: Callable[[float], float] = math.log if log_y else float
    room = 0.065 * abs(place(y_ticks[-1]) - place(y_ticks[0]))
    heights = spread([place(y) for y in ends.values()], gap=room)
    for label, y in zip(ends, heights):
        axes.text(x_ticks[-1], math.exp(y) if log_y else y, f" {label}", ha="left", va="center_baseline",
                  color=hue.get(label, style.GREY))
    axes.text(0, 1.04, y_label, transform=axes.transAxes, ha="left", va="baseline")
    return figure
