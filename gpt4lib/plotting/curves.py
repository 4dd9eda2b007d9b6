"""Curves and scatter plots: a shape that follows from its counts, and models side by side."""

import math
from typing import Callable, Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt4lib.plotting import style


def crossing(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """The first x where the broken line through (xs, ys) meets `target`; None if it never does."""
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if min(y0, y1) <= target <= max(y0, y1) and y0 != y1:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved just enough to lie `gap` apart, in the order given: for edge labels."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    groups: list[list[float]] = []       # [centre, members] of labels that touch
    for i in order:
        groups.append([values[i], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (c1, n1), (c0, n0) = groups.pop(), groups.pop()
            groups.append([(c0 * n0 + c1 * n1) / (n0 + n1), n0 + n1])
    places = [centre + gap * (k - (n - 1) / 2) for centre, n in groups for k in range(int(n))]
    moved = [0.0] * len(values)
    for i, place in zip(order, places):
        moved[i] = place
    return moved


@style.styled
def shape_map(d_model: Sequence[float], attention: Mapping[str, Sequence[float]], experts: Sequence[float],
              targets: tuple[float, float] = (55e9, 111e9)) -> Figure:
    """Parameters against d_model: a curve per kind of attention, one for an expert, the targets.

    attention: label -> parameters of all layers at each d_model, e.g. `{"MQA, q = d": [...]}`.
    experts: parameters of one expert over all layers at each d_model.
    targets: (attention, expert) parameters, dotted; a dot and the d_model mark where a curve meets its own.
    """
    figure, axes = style.canvas(4.2, left=0.65, right=1.35, bottom=0.6, top=0.3)
    top = 1.35 * max(targets)
    axes.set(xlim=(d_model[0], d_model[-1]), ylim=(0, top), xlabel="d_model")
    rows = [(label, ys, targets[0], style.ATTENTION) for label, ys in attention.items()]
    rows.append(("one expert", experts, targets[1], style.EXPERTS))
    for target in targets:
        axes.axhline(target, **style.DOTTED)
    at_right, named = [], {target: [] for target in targets}   # d_model values already written
    for label, ys, target, color in rows:
        axes.plot(d_model, ys, color=color, gid=label)
        if ys[-1] > top:
            axes.text(crossing(d_model, ys, top), top, label, ha="center", va="bottom")
        else:
            at_right.append((ys[-1], label))
        x = crossing(d_model, ys, target)
        if x is None:
            continue
        axes.plot([x], [target], "o", color=color, markersize=7, gid=f"{label}:solution")
        if all(abs(x - other) > 0.03 * x for other in named[target]):
            side = 1 if named[target] else -1   # the first number left above, others right below
            named[target].append(x)
            axes.annotate(f"{x:,.0f}", (x, target), xytext=(4 * side, -4 * side), textcoords="offset points",
                          ha="left" if side > 0 else "right", va="top" if side > 0 else "bottom")
    heights = spread([y for y, _ in at_right], gap=top * 0.062)
    for y, (_, label) in zip(heights, at_right):
        axes.text(d_model[-1], y, f" {label}", ha="left", va="center_baseline")
    axes.set_yticks([0, *targets], ["0", *map(style.short, targets)])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 3, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure


@style.styled
def active_total(points: Mapping[str, tuple[int, int]], highlight: str | None = None) -> Figure:
    """Total against active parameters, both on log axes; dense models lie on the diagonal.

    points: name -> (total, active). highlight: the one name drawn large.
    Dense models are labelled left of the diagonal, sparse ones below their dot.
    Raises ValueError for a highlight that is not among the points.
    """
    if highlight is not None and highlight not in points:
        raise ValueError(f"highlight={highlight!r} is not among the points; accepted: {', '.join(points)}")
    figure, axes = style.canvas(4.4, left=0.75, right=0.25, bottom=0.6, top=0.4)
    low = 10 ** math.floor(math.log10(0.5 * min(active for _, active in points.values())))
    high = 10 ** math.ceil(math.log10(max(total for total, _ in points.values())))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="parameters in total")
    axes.plot([low, high], [low, high], **style.DOTTED, gid="dense")
    dense = {name: total for name, (total, active) in points.items() if total == active}
    gap = 0.055 * math.log10(high / low)
    heights = spread([math.log10(total) for total in dense.values()], gap)
    for (name, total), height in zip(dense.items(), heights):
        axes.text(total / (high / low) ** 0.03, 10 ** height, name, ha="right", va="center_baseline",
                  weight="bold" if name == highlight else "normal")
    for name, (total, active) in points.items():
        lit = name == highlight
        color = style.COLORS["weights"] if lit or total != active else style.GREY
        axes.plot([total], [active], "o", color=color, markersize=11 if lit else 6, gid=name)
        if total != active:
            axes.text(total, active / (high / low) ** 0.03, name, weight="bold" if lit else "normal", va="top",
                      ha="right" if total > (high / low) ** 0.8 * low else "center")
    axes.text(0, 1.03, "parameters used by one token", transform=axes.transAxes, ha="left", va="baseline")
    ticks = [10.0 ** e for e in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    for axis in (axes.xaxis, axes.yaxis):
        style.ticks(axis, ticks)
    return figure


@style.styled
def dots(rows: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, x_ticks: Sequence[float], *,
         log_x: bool = False, show: Callable[[float], str] = style.short, band: tuple[float, float] | None = None) -> Figure:
    """A line of dots beside each name: label -> (values drawn full, values drawn as rings).

    The ticks are the limits too; a value beyond them becomes a triangle at the edge. `band` shades what is claimed.
    """
    figure, axes = style.canvas(0.75 + 0.3 * len(rows), left=0.3 + 0.092 * max(map(len, rows)), right=0.3, bottom=0.6, top=0.1)
    low, high = x_ticks[0], x_ticks[-1]
    axes.set(xscale="log" if log_x else "linear", xlim=(low, high), ylim=(len(rows) - 0.5, -0.5), xlabel=x_label)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=style.GREY, linewidth=0.5, alpha=0.4)
    if band:
        axes.axvspan(*band, color=style.COLORS["kv_cache"], alpha=0.25, linewidth=0)
    for y, (label, kinds) in enumerate(rows.items()):
        for x, meaning, fill in [(x, *how) for xs, how in zip(kinds, (("weights", "full"), ("communication", "none"))) for x in xs]:
            axes.plot(min(max(x, low), high), y, "<" if x < low else ">" if x > high else "o", fillstyle=fill,
                      color=style.COLORS[meaning], markersize=6, clip_on=False, gid=label)
    style.ticks(axes.xaxis, x_ticks, show)
    axes.spines["left"].set_visible(False)
    return figure
