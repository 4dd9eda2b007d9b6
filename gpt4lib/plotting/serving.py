"""A server's timeline: one row a seat, one column a step, and who sat there computing what."""

from typing import NamedTuple, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt4lib.plotting import style
from gpt4lib.plotting.pipeline import frame, number, points, words
from gpt4lib.serving.timeline import Slot, Timeline

TONES = {"prefill": style.PASSES["B"][0], "decode": style.PASSES["F"][0]}      # the darker one does more arithmetic
MARK = "× preempted"


class Run(NamedTuple):
    """A block of the figure."""
    seat: int
    kind: str
    sequence: int
    start: int
    steps: int


@style.styled
def timeline(t: Timeline) -> Figure:
    """Every piece of a prompt and every run of new tokens as a block in its seat's row, with the sequence's number where it
    fits; grey is an idle seat, and a red cross ends the stay of a sequence that had to give way.

    Raises ValueError where no step was recorded.
    """
    if not t.slots:
        raise ValueError("a timeline without steps cannot be drawn; call record(step) with each, before it is advanced")
    seats = t.scheduler.max_running
    figure, axes, point = frame([f"seat {seat}" for seat in range(seats)], t.steps, "steps")
    rows: list[list[tuple[float, float]]] = [[(0, 0)] for _ in range(seats)]
    first: dict[str, tuple[float, str]] = {}
    for seat, kind, sequence, start, steps in runs(t.slots):
        axes.add_patch(Rectangle((start, seat + 0.06), steps - min(0.7 * point, 0.2 * steps), 0.88, facecolor=TONES[kind],
                                 gid=f"{seat}:{kind}:{sequence}@{start}"))
        if kind == "decode":
            number(axes, sequence, start, steps, seat, TONES[kind], point)
        rows[seat].append((start, start + steps))
        if seat == 0:
            first.setdefault(kind, (start, TONES[kind]))
    for step, sequence in t.preempted:
        last, seat = max((s.step, s.seat) for s in t.slots if s.sequence == sequence and s.step < step)
        axes.plot(last + 1, seat + 0.5, "x", color=style.COLORS["failure"], markersize=8, markeredgewidth=2.5, clip_on=False,
                  gid=f"preempted:{sequence}@{step}")
        first.setdefault(MARK, (max(last + 1 - points("×") / 2 * point, 0), style.COLORS["failure"]))
    words(axes, first, rows, t.steps, point)
    return figure


def runs(slots: Sequence[Slot]) -> list[Run]:
    """A sequence's tokens of adjacent steps in one block; the pieces of its prompt apart."""
    found: list[Run] = []
    for s in sorted(slots):
        last = found[-1] if found and s.kind == "decode" else None
        if last and last[:3] == (s.seat, s.kind, s.sequence) and last.start + last.steps == s.step:
            found[-1] = last._replace(steps=last.steps + 1)
        else:
            found.append(Run(s.seat, s.kind, s.sequence, s.step, 1))
    return found


def svg(t: Timeline) -> str:
    """The timeline as SVG text, for one that draws itself in a notebook."""
    return style.svg(timeline(t))
