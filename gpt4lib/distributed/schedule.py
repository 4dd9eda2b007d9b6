"""Pipeline schedules as plain objects: they check themselves, run on a simulated clock, and draw themselves.

The real pipeline replays the same lists of actions (`pipeline.py`). Nothing here knows torch or time.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Sequence

from gpt4lib.specs.checks import require, require_counts, require_known
from gpt4lib.specs.workload import SCHEDULES


class Action(NamedTuple):
    """One piece of work: kind "F" (forward) or "B" (backward) of a micro-batch through a chunk of layers."""
    kind: str
    micro: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}" + (f" of chunk {self.chunk}" if self.chunk else "")


class Span(NamedTuple):
    """An action with its place and time. In a simulation time is in slots, in a recording in seconds."""
    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """In which order each stage of a pipeline works.

    "gpipe": all forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965). "1f1b": one forward, one
    backward as soon as possible, so a stage holds few micro-batches (PipeDream-Flush, Narayanan et al. 2021,
    arXiv:2006.09503); with n_chunks > 1 interleaved: stage s also owns layers further on, as chunks s, s + p, s + 2p, ...
    (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2). Any number of micro-batches, fewer than stages too.
    """
    n_stages: int
    n_micro: int
    kind: str = "1f1b"
    n_chunks: int = 1

    def __post_init__(self) -> None:
        require_counts(self, 1, "n_stages", "n_micro", "n_chunks")
        require_known("schedule", self.kind, SCHEDULES)

    @cached_property
    def rounds(self) -> list[range]:
        """Micro-batches that go through the chunks together: at least n_stages of them where there are so many.

        A shorter round would reach the next chunk before the stages in front are done with it: deadlock.
        """
        n = max(self.n_micro // self.n_stages, 1)
        starts = [self.n_micro * i // n for i in range(n + 1)]
        return [range(*pair) for pair in zip(starts, starts[1:])]

    @cached_property
    def forwards(self) -> list[Action]:
        """The order of forwards, the same on every stage: a round through chunk 0, through chunk 1, ..., the next round."""
        return [Action("F", m, c) for r in self.rounds for c in range(self.n_chunks) for m in r]

    @cached_property
    def backwards(self) -> list[Action]:
        """The same rounds, the chunks from the last to the first."""
        return [Action("B", m, self.n_chunks - 1 - c) for _, m, c in self.forwards]

    def warm_up(self, stage: int) -> int:
        """How many forwards a stage runs before its first backward.

        Until the gradient of the first can be back: the stages behind it, twice when chunks go round.
        """
        total, behind = len(self.forwards), self.n_stages - 1 - stage
        if self.kind == "gpipe":
            return total
        if self.n_chunks == 1:
            return min(behind + 1, total)
        return min(2 * behind + (self.n_chunks - 1) * max(map(len, self.rounds)) + 1, total)

    def order(self, stage: int) -> list[Action]:
        """What one stage does, first to last."""
        n = self.warm_up(stage)
        steady = [a for pair in zip(self.backwards, self.forwards[n:]) for a in pair]
        return self.forwards[:n] + steady + self.backwards[len(self.forwards) - n:]

    def needs(self, stage: int, action: Action) -> list[tuple[int, Action]]:
        """The (stage, action) pairs that must be finished first: what it receives, and its own forward."""
        kind, m, c = action
        if kind == "F":
            if stage:
                return [(stage - 1, action)]
            return [(self.n_stages - 1, Action("F", m, c - 1))] if c else []
        own = (stage, Action("F", m, c))
        if stage < self.n_stages - 1:
            return [own, (stage + 1, action)]
        return [own, (0, Action("B", m, c + 1))] if c < self.n_chunks - 1 else [own]

    def check(self) -> None:
        """ValueError in plain words unless every stage does everything once, in an order that can be run."""
        every = set(self.forwards) | set(self.backwards)
        for stage in range(self.n_stages):
            once = sorted(self.order(stage)) == sorted(every)
            require(once, f"stage {stage} does not run every forward and backward exactly once")
        self.simulate()

    def simulate(self, forward: float = 1, backward: float = 2, layers: Sequence[float] | None = None) -> list[Span]:
        """Every action as early as its stage and its inputs allow. A chunk takes `forward` or `backward` slots,
        times its number in `layers` where stages are uneven (one entry a chunk, in the order of the model).

        ValueError naming stage and action if the stages wait for each other.
        """
        layers = layers or [1] * (self.n_stages * self.n_chunks)
        todo = [self.order(s)[::-1] for s in range(self.n_stages)]
        clock, done, spans = [0] * self.n_stages, {}, []
        while any(todo):
            before = len(spans)
            for stage, left in enumerate(todo):
                while left and all(n in done for n in self.needs(stage, left[-1])):
                    action = left.pop()
                    start = max([clock[stage]] + [done[n] for n in self.needs(stage, action)])
                    slots = (forward if action.kind == "F" else backward) * layers[action.chunk * self.n_stages + stage]
                    clock[stage] = done[stage, action] = start + slots
                    spans.append(Span(stage, action, start, clock[stage]))
            if len(spans) == before:
                stuck = (f"stage {s} waits at {left[-1]}" for s, left in enumerate(todo) if left)
                raise ValueError("deadlock: " + ", ".join(stuck))
        return spans

    def idle(self, stage: int, forward: float = 1, backward: float = 2) -> float:
        """Slots a stage stands still between the first action anywhere and the last."""
        spans = self.simulate(forward, backward)
        return max(s.end for s in spans) - sum(s.end - s.start for s in spans if s.stage == stage)

    def in_flight(self, stage: int) -> int:
        """Forwards whose activations a stage holds at most, one for each micro-batch and chunk."""
        return max(accumulate(1 if action.kind == "F" else -1 for action in self.order(stage)))

    def _repr_svg_(self) -> str:
        from gpt4lib.plotting.pipeline import svg
        return svg(self.simulate())
