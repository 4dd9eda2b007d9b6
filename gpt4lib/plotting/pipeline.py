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
    label = unit if chunks == 1 else f"{unit}; chunk 1 is greyer" if chunks == 2 else f"{unit}; odd chunks are greyer"
    figure, axes, point = frame([f"stage {s}" for s in range(stages)], length, label)
    rows: list[list[tuple[float, float]]] = [[(0, 0)] for _ in range(stages)]
    first: dict[str, float] = {}
    for stage, (kind, micro, chunk), start, end in sorted(spans, key=lambda s: s.start):
        x, width = (start - zero) * UNITS[unit], (end - start) * UNITS[unit]
        color = style.PASSES[kind][chunk % 2]
        axes.add_patch(Rectangle((x, stage + 0.06), width - min(0.7 * point, 0.2 * width), 0.88, facecolor=color,
                                 gid=f"{stage}:{kind}{micro}.{chunk}"))
        number(axes, micro, x, width, stage, color, point)
        rows[stage].append((x, x + width))
        if stage == 0:
            first.setdefault(kind, x)
    words(axes, {WORDS[kind]: (x, style.PASSES[kind][0]) for kind, x in first.items()}, rows, length, point)
    return figure


def frame(names: Sequence[str], length: float, label: str) -> tuple[Figure, Axes, float]:
    """A row for each name, grey from 0 to length where nothing else is drawn, and how much of the axis a point is."""
    pitch = max(0.22, min(0.4, 3.3 / len(names)))                  # inches a row: no less, or names touch
    figure, axes = style.canvas(len(names) * pitch + 0.97, left=LEFT, right=RIGHT, bottom=0.62, top=0.35)
    axes.set(xlim=(0, length), ylim=(len(names), 0), xlabel=label)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    axes.set_xticks([t for t in MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]).tick_values(0, length) if t <= length])
    for row in range(len(names)):
        axes.add_patch(Rectangle((0, row + 0.06), length, 0.88, facecolor=style.GREY, alpha=0.2, gid=f"idle:{row}"))
    return figure, axes, length / (72 * (style.WIDTH - LEFT - RIGHT))


def number(axes: Axes, value: int, x: float, width: float, row: int, color: str, point: float) -> bool:
    """Write a number into a block of this colour; False where it has no room."""
    if fits := points(str(value)) < width / point - 1:
        axes.text(x + width / 2, row + 0.5, str(value), color=style.on_fill(color), ha="center", va="center_baseline")
    return fits


def words(axes: Axes, first: dict[str, tuple[float, str]], rows: list[list[tuple[float, float]]], length: float,
          point: float) -> None:
    """What the tones are, word -> (x, colour), above where they first appear, and "idle" in the longest gap with room for it."""
    free = 0.0
    for word, (x, color) in sorted(first.items(), key=lambda pair: pair[1][0]):
        x = min(max(x, free), length - points(word) * point)
        axes.text(x, -0.12, word, color=color, ha="left", va="baseline")
        free = x + (points(word) + 8) * point
    gap, row, middle = max((b - a, -i, (a + b) / 2) for i, row in enumerate(rows)
                           for (_, a), (b, _) in zip(row, row[1:] + [(length, length)]))
    if gap > (points("idle") + 8) * point:
        axes.text(middle, -row + 0.5, "idle", ha="center", va="center_baseline")


def points(text: str) -> float:
    """How wide the text is: from the font's own outlines, so the same on every machine."""
    return TextPath((0, 0), text, size=style.TEXT).get_extents().x1


def svg(spans: Sequence[Span], unit: str = "slots") -> str:
    """The timeline as SVG text, for a schedule that draws itself in a notebook."""
    return style.svg(pipeline(spans, unit))
