"""A pipeline's timeline: one row a stage, one block an action, and the time it stands still."""

from typing import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from gpt4lib.distributed.schedule import Span
from gpt4lib.plotting import style

UNITS = {"slots": 1, "ms": 1000}       # label of the axis -> how many to one unit of the spans' clock
WORDS = {"F": "forward", "B": "backward"}
LEFT, RIGHT = 0.95, 0.15                # inches


@style.styled
def pipeline(spans: Sequence[Span], unit: str = "slots") -> Figure:
    """Every span as a block in its stage's row, with its micro-batch where the number fits; grey is idle.

    unit: "slots" for a simulation, "ms" for a recording in seconds; time starts with the first span. Odd chunks are greyer.
    Raises ValueError for no spans and for another unit.
    """
    if not spans or unit not in UNITS:
        raise ValueError(f"{len(spans)} spans in {unit!r} cannot be drawn; give at least one, and one of: {', '.join(UNITS)}")
    stages, chunks = (1 + max(values) for values in zip(*((s.stage, s.action.chunk) for s in spans)))
    zero = min(s.start for s in spans)
    length = (max(s.end for s in spans) - zero) * UNITS[unit]
    pitch = max(0.22, min(0.4, 3.3 / stages))                      # inches a row: no less, or labels touch
    figure, axes = style.canvas(stages * pitch + 0.97, left=LEFT, right=RIGHT, bottom=0.62, top=0.35)
    axes.set(xlim=(0, length), ylim=(stages, 0))
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.set_yticks([s + 0.5 for s in range(stages)], [f"stage {s}" for s in range(stages)])
    axes.set_xticks([t for t in MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]).tick_values(0, length) if t <= length])
    axes.set_xlabel(unit if chunks == 1 else f"{unit}; chunk 1 is greyer" if chunks == 2 else f"{unit}; odd chunks are greyer")
    point = length / (72 * (style.WIDTH - LEFT - RIGHT))           # in units of the axis
    for stage in range(stages):
        axes.add_patch(Rectangle((0, stage + 0.06), length, 0.88, facecolor=style.GREY, alpha=0.2, gid=f"idle:{stage}"))
    rows: list[list[tuple[float, float]]] = [[(0, 0)] for _ in range(stages)]
    first: dict[str, float] = {}
    for stage, (kind, micro, chunk), start, end in sorted(spans, key=lambda s: s.start):
        x, width = (start - zero) * UNITS[unit], (end - start) * UNITS[unit]
        color = style.PASSES[kind][chunk % 2]
        axes.add_patch(Rectangle((x, stage + 0.06), width - min(0.7 * point, 0.2 * width), 0.88, facecolor=color,
                                 gid=f"{stage}:{kind}{micro}.{chunk}"))
        if _points(str(micro)) < width / point - 1:
            axes.text(x + width / 2, stage + 0.5, str(micro), color=style.on_fill(color), ha="center", va="center_baseline")
        rows[stage].append((x, x + width))
        if stage == 0:
            first.setdefault(kind, x)
    _words(axes, first, rows, length, point)
    return figure


def _words(axes: Axes, first: dict[str, float], rows: list[list[tuple[float, float]]], length: float, point: float) -> None:
    """What the two tones are, above where they first appear, and "idle" in the longest gap that has room for it."""
    free = 0.0
    for kind, x in sorted(first.items(), key=lambda pair: pair[1]):
        x = min(max(x, free), length - _points(WORDS[kind]) * point)
        axes.text(x, -0.12, WORDS[kind], color=style.PASSES[kind][0], ha="left", va="baseline")
        free = x + (_points(WORDS[kind]) + 8) * point
    gap, stage, middle = max((b - a, -s, (a + b) / 2) for s, row in enumerate(rows)
                             for (_, a), (b, _) in zip(row, row[1:] + [(length, length)]))
    if gap > (_points("idle") + 8) * point:
        axes.text(middle, -stage + 0.5, "idle", ha="center", va="center_baseline")


def _points(text: str) -> float:
    """How wide the text is: from the font's own outlines, so the same on every machine."""
    return TextPath((0, 0), text, size=style.TEXT).get_extents().x1


def svg(spans: Sequence[Span], unit: str = "slots") -> str:
    """The timeline as SVG text, for a schedule that draws itself in a notebook."""
    return style.svg(pipeline(spans, unit))
