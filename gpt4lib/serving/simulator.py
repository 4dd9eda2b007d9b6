"""A cluster in simulation: the engine's own scheduler and blocks, with a predicted time for every step.

    report = simulate(poisson(5.0, 600, prompt=1000, answer=200), cluster(estimator))

One policy, two worlds: what decides here is the object that decides in `Engine`; only nobody multiplies matrices.
"""

from __future__ import annotations

import csv
import heapq
import math
import random
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence as Many

from gpt4lib.analysis import cost
from gpt4lib.analysis.serving_estimator import ServingEstimator
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.scheduler import Scheduler, Step
from gpt4lib.serving.sequence import Sequence
from gpt4lib.specs.checks import positive, require

DAY = 86_400.0


class Request(NamedTuple):
    """One request of a trace: when it comes, in seconds, and its tokens."""
    arrival: float
    prompt: int
    answer: int


class Cost(NamedTuple):
    """Seconds of a step: until its tokens are there, and until the next batch may enter (less in a pipeline)."""
    seconds: float
    turn: float


Clock = Callable[[Step], Cost]


# --- traces --------------------------------------------------------------------------------------------------
def arrivals(rate: Callable[[float], float], most: float, seconds: float, prompt: float, answer: float, *, longest: int = 8192,
             seed: int = 0) -> Iterator[Request]:
    """Requests of a Poisson process whose rate, at most `most` a second, changes with time (Lewis and Shedler 1979); prompts and
    answers are exponential around their means, from 1 to `longest` tokens."""
    for name, value in (("most", most), ("seconds", seconds), ("prompt", prompt), ("answer", answer)):
        positive(name, value)
    dice, now = random.Random(seed), 0.0
    draw = lambda mean: min(1 + int(dice.expovariate(1 / mean)), longest)                              # noqa: E731
    while (now := now + dice.expovariate(most)) < seconds:
        if dice.random() * most < rate(now):
            yield Request(now, draw(prompt), draw(answer))


def poisson(rate: float, seconds: float, **tokens) -> Iterator[Request]:
    """Always the same rate."""
    return arrivals(lambda _: rate, rate, seconds, **tokens)


def bursts(rate: float, seconds: float, *, factor: float = 4.0, period: float = 60.0, **tokens) -> Iterator[Request]:
    """`factor` times the mean rate for as long as makes it the mean, then nothing, every `period`."""
    return arrivals(lambda now: rate * factor * (now % period < period / factor), rate * factor, seconds, **tokens)


def diurnal(rate: float, seconds: float = DAY, *, swing: float = 0.6, **tokens) -> Iterator[Request]:
    """A day: the mean rate plus a sine of `swing` times it, lowest at the start."""
    return arrivals(lambda now: rate * (1 - swing * math.cos(2 * math.pi * now / DAY)), rate * (1 + swing), seconds, **tokens)


def read(path: str | Path) -> Iterator[Request]:
    """A CSV file of requests in order of arrival: arrival_seconds, prompt_tokens, answer_tokens; or, as Azure published its
    traces, TIMESTAMP, ContextTokens, GeneratedTokens. ValueError, one line, names file, line and column."""
    try:
        rows = list(csv.DictReader(Path(path).read_text("utf-8-sig").splitlines()))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}; give a CSV file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}); give a CSV file") from None
    ours, azure = ("arrival_seconds", "prompt_tokens", "answer_tokens"), ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    names = next((c for c in (ours, azure) if rows and set(c) <= set(rows[0])), None)
    require(names, f"{path} line 1: needed are the columns {', '.join(ours)} (or {', '.join(azure)}), and a row")
    first, last = None, -math.inf
    for line, row in enumerate(rows, 2):
        values = []
        for name, kind in zip(names, (_moment if names is azure else float, int, int)):
            try:
                values.append(kind(row[name]))
                require(math.isfinite(values[-1]) and values[-1] >= (kind is int), "")
            except (ValueError, TypeError, OverflowError):
                wanted = "tokens, an integer >= 1" if kind is int else "a time, in order"
                raise ValueError(f"{path} line {line}, column {name}: {row[name]!r} is not accepted; give {wanted}") from None
        first = values[0] if first is None else first
        require(values[0] >= last, f"{path} line {line}, column {names[0]}: {row[names[0]]!r} is before the line above; sort the file")
        last = values[0]
        yield Request(values[0] - first, values[1], values[2])


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text if len(text) < 27 else text[:26])        # Azure writes seven digits of a second
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


# --- the cluster ---------------------------------------------------------------------------------------------
@dataclass
class Lane:
    """A scheduler and the batch it has under way. The lanes of one pipeline enter it one after the other."""
    scheduler: Scheduler
    clock: Clock
    entrance: list[float]                      # when the first stage is free; shared by the lanes of a pipeline
    step: Step | None = None

    @property
    def load(self) -> int:
        return len(self.scheduler.running) + len(self.scheduler.waiting)


def predicted(estimator: ServingEstimator) -> Clock:
    """Steps priced by the estimator: decoding sequences at their mean context, and the pieces of prompts together."""
    def clock(step: Step) -> Cost:
        decodes = context = chunk = cached = pieces = pairs = 0
        for _, start, stop in step.work:
            if stop - start == 1:
                decodes += 1
                context += stop
            else:
                n = stop - start
                chunk, cached, pieces, pairs = chunk + n, cached + start, pieces + 1, pairs + n * (start + (n + 1) / 2)
        found = estimator.step(decodes, context / max(decodes, 1), chunk, cached / max(pieces, 1), pieces, pairs)
        return Cost(found.seconds, found.turn)
    return clock


def cluster(estimator: ServingEstimator, *, block_size: int = 16, max_running: int = 256, max_batched_tokens: int = 2048,
            typical_context: int = 2048, **scheduler) -> list[Lane]:
    """The lanes of the estimator's plan: dp / ep replicas, each with pp batches under way and an equal part of the blocks that its
    memory has room for, where sequences have `typical_context` tokens (it matters for windows and for states of fixed size)."""
    plan, lanes, blocks = estimator.plan, [], -(-min(typical_context, estimator.spec.context) // block_size)
    n_blocks = int(estimator.largest_batch(blocks * block_size) * blocks / plan.pp)
    require(n_blocks > 0, f"{estimator.spec.name} leaves no room for a cache on {estimator.cluster.device.name} under tp={plan.tp}, "
                          f"pp={plan.pp}; use more devices or a narrower dtype")
    for _ in range(plan.dp // plan.ep):
        entrance, clock = [0.0], predicted(estimator)
        lanes += [Lane(Scheduler(BlockPool(n_blocks, block_size), max_running, max_batched_tokens, prefix_cache=False, **scheduler),
                       clock, entrance) for _ in range(plan.pp)]
    return lanes


# --- what comes of it ----------------------------------------------------------------------------------------
def quantile(values: Many[float], share: float) -> float:
    """The value that `share` of them stay within; NaN of none."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else math.nan


@dataclass
class Report:
    """Times of the requests that were answered, in order of completion, and what the cluster did meanwhile."""
    ttft: list[float] = field(default_factory=list)            # seconds to the first token
    tpot: list[float] = field(default_factory=list)            # seconds a token after it; 0 of answers of one token
    refused: int = 0                                           # requests no lane could ever hold
    seconds: float = 0.0                                       # from the start to the last token, or of the window
    busy: float = 0.0                                          # seconds that the entrances were taken, summed over pipelines
    pipelines: int = 1
    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    preemptions: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the time that a batch was entering."""
        return self.busy / (self.seconds * self.pipelines) if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.answer_tokens / self.seconds if self.seconds else 0.0

    def goodput(self, ttft: float, tpot: float) -> float:
        """Requests a second whose first token and mean gap kept these limits (Zhong et al. 2024, arXiv:2401.09670)."""
        kept = sum(a <= ttft and b <= tpot for a, b in zip(self.ttft, self.tpot))
        return kept / self.seconds if self.seconds else 0.0

    def dollars_per_1k_tokens(self, n_devices: int, dollars_per_device_hour: float) -> float:
        """Of answers, with the whole cluster rented for all the time."""
        return cost.dollars_per_1k_tokens(n_devices, dollars_per_device_hour, self.tokens_per_second)


def simulate(requests: Iterable[Request], lanes: Many[Lane], progress: Callable[[float], None] | None = None,
             window: tuple[float, float] = (0.0, math.inf)) -> Report:
    """Answer a trace, in order of arrival, each request on the lane with the fewest. Deterministic.

    What is reported is what happens in `window`, and nothing is simulated after it: so the time in which a cluster fills, and the one
    in which it empties after the last arrival, can be left out. `progress` is told the time after every thousandth step. A lane
    without work sleeps until a request comes.
    """
    report, (opens, closes) = Report(pipelines=len({id(lane.entrance) for lane in lanes})), window
    events: list[tuple[float, int]] = []                       # (when a lane's step is done, lane)
    asleep = set(range(len(lanes)))
    times: dict[Sequence, list[float]] = {}                    # of arrival, and of the first token
    feed = iter(requests)
    coming = next(feed, None)

    def begin(i: int, now: float) -> None:
        lane = lanes[i]
        step = lane.scheduler.schedule()
        report.preemptions += len(step.preempted)
        if not step.work:
            asleep.add(i)
            return
        seconds, turn = lane.clock(step)
        enters = max(now, lane.entrance[0])
        lane.entrance[0], lane.step = enters + turn, step
        report.busy += turn * (enters >= opens)
        report.steps += 1
        heapq.heappush(events, (enters + seconds, i))

    while (events or coming) and min(events[0][0] if events else math.inf, coming.arrival if coming else math.inf) < closes:
        if coming and (not events or coming.arrival <= events[0][0]):
            now, i = coming.arrival, min(range(len(lanes)), key=lambda i: (lanes[i].load, i))
            sequence = Sequence(range(coming.prompt), coming.answer)
            try:
                lanes[i].scheduler.add(sequence)
            except ValueError:
                report.refused += 1
            else:
                times[sequence] = [now]
                report.prompt_tokens += coming.prompt * (now >= opens)
                if i in asleep:
                    asleep.discard(i)
                    begin(i, now)
            coming = next(feed, None)
            continue
        now, i = heapq.heappop(events)
        scheduler, report.seconds, counted = lanes[i].scheduler, max(report.seconds, now), now >= opens
        append, groups = scheduler.append, scheduler.advance(lanes[i].step)
        report.answer_tokens += counted * len(groups)
        for group in groups:
            for sequence in group:
                append(sequence, 0)
                if len(sequence.generated) == 1:
                    times[sequence].append(now)
                if sequence.finish_reason:
                    arrival, first = times.pop(sequence)
                    n = len(sequence.generated)
                    if counted:
                        report.ttft.append(first - arrival)
                        report.tpot.append((now - first) / (n - 1) if n > 1 else 0.0)
        begin(i, now)
        if progress and report.steps % 1000 == 0:
            progress(now)
    report.seconds = (report.seconds if closes == math.inf else closes) - opens
    return report
