"""What every seat of a scheduler did in every step: counted, and drawn."""

from typing import NamedTuple

from gpt4lib.serving.scheduler import Scheduler, Step
from gpt4lib.serving.sequence import Sequence


class Slot(NamedTuple):
    """One seat in one step: the tokens of its sequence that were computed there, and whether a new one came of them."""
    seat: int
    step: int
    sequence: int          # counted from 0 in the order they were first seen
    tokens: int
    yields: bool

    @property
    def kind(self) -> str:
        return "decode" if self.tokens == 1 and self.yields else "prefill"


class Timeline:
    """Records the steps of a scheduler: call `record` with each, before it is advanced.

    A sequence keeps its seat, the lowest that was free, from its first work until it leaves `scheduler.running`: in a static
    batch that is later than its last token, and the seat stands idle meanwhile.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.slots, self.steps = scheduler, [], 0
        self.preempted: list[tuple[int, int]] = []             # (step, sequence)
        self._seats: dict[Sequence, int] = {}
        self._numbers: dict[Sequence, int] = {}

    def record(self, step: Step) -> None:
        running = set(self.scheduler.running)
        self._seats = {s: seat for s, seat in self._seats.items() if s in running}
        for sequence in step.preempted:
            self.preempted.append((self.steps, self._numbers.setdefault(sequence, len(self._numbers))))
        for work in step.work:
            number = self._numbers.setdefault(work.sequence, len(self._numbers))
            if work.sequence not in self._seats:
                self._seats[work.sequence] = min(set(range(self.scheduler.max_running)) - set(self._seats.values()))
            self.slots.append(Slot(self._seats[work.sequence], self.steps, number, work.stop - work.start, work.yields))
        self.steps += 1

    @property
    def utilisation(self) -> float:
        """Seats that computed something, as a share of all seats of all steps."""
        return len(self.slots) / max(self.steps * self.scheduler.max_running, 1)

    def __repr__(self) -> str:
        return f"<Timeline: {self.steps} steps of {self.scheduler.max_running} seats>"

    def _repr_svg_(self) -> str:
        from gpt4lib.plotting import serving
        return serving.svg(self)
