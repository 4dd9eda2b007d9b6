"""Which tokens are computed in the next step: iteration-level batching. Yu et al. 2022 (Orca), OSDI, section 3.2.

Knows neither torch nor clocks, so that a real engine and a simulator can drive the same object. Once a step:

    step = scheduler.schedule()         whose tokens to compute, and which blocks to copy first
    ...                                 somebody computes them, or pretends to
    for sequences in scheduler.advance(step):          who has a next token now
        scheduler.append(sequence, token)
"""

from bisect import insort
from operator import attrgetter
from typing import NamedTuple

from gpt4lib.serving.block_pool import BlockPool, chain
from gpt4lib.serving.sequence import Sequence
from gpt4lib.specs.checks import require, require_counts

RANK = attrgetter("rank")


class Work(NamedTuple):
    """Compute tokens start .. stop of a sequence; where stop is its last token, the next one follows from it."""
    sequence: Sequence
    start: int
    stop: int

    @property
    def yields(self) -> bool:
        return self.stop == self.sequence.n_tokens


class Step(NamedTuple):
    """What one pass of the model computes: decoding sequences first, one token each, then pieces of prompts."""
    work: list[Work]
    copies: list[tuple[int, int]]          # blocks to copy before, from and to
    preempted: list[Sequence]


class Scheduler:
    """By priority, then first come, first served; `max_running` sequences and `max_batched_tokens` tokens a step at the most.

    Every decoding sequence gets its token in every step; what is left of the budget goes to prompts, in chunks (Agrawal et
    al. 2024, arXiv:2403.02310). A prompt is admitted when its blocks are free, and one more for each sequence that will then
    run: so nobody has to give way for block_size steps. When blocks run out after all, the last in rank gives its own up
    and is computed again later; the first in rank never is, so everybody finishes, except where sequences of better
    priority never cease to come. Priority decides who is admitted next and who gives way; it takes nobody's seat.
    continuous=False is static batching, for comparison: a batch is admitted at once, with room for its longest possible
    answers, its prompts are computed whole in one step, and the next batch begins when all have finished.
    prefix_cache=False computes every prompt from its start.
    """

    def __init__(self, pool: BlockPool, max_running: int, max_batched_tokens: int = 2048, continuous: bool = True,
                 prefix_cache: bool = True) -> None:
        self.pool, self.max_running, self.max_batched_tokens = pool, max_running, max_batched_tokens
        self.continuous, self.prefix_cache = continuous, prefix_cache
        require_counts(self, 1, "max_running", "max_batched_tokens")
        require(max_batched_tokens >= max_running, f"max_batched_tokens={max_batched_tokens} is not accepted; give at least "
                f"max_running={max_running}, a token for every sequence that decodes")
        self.waiting: list[Sequence] = []             # both in order of rank
        self.running: list[Sequence] = []
        self._arrivals = 0

    def check(self, sequence: Sequence) -> None:
        """ValueError if a sequence could never run."""
        n, seats = len(sequence.prompt) + sequence.max_new_tokens, 1 + len(sequence.forks)
        need = self.pool.blocks_for(n)
        require(need <= self.pool.n_blocks, f"a sequence of {len(sequence.prompt)} + {sequence.max_new_tokens} tokens needs "
                f"{need} blocks of {self.pool.block_size}, the pool has {self.pool.n_blocks}; shorten it or enlarge the pool")
        require(seats <= self.max_running, f"{seats} samples of one prompt run together, max_running={self.max_running} is less")
        require(self.continuous or seats == 1, f"{seats} samples of one prompt are not for static batching; give continuous=True")

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; ValueError if it could never run."""
        self.check(sequence)
        for member in (sequence, *sequence.forks):
            member.rank = sequence.priority, self._arrivals
            self._arrivals += 1
        insort(self.waiting, sequence, key=RANK)

    def schedule(self) -> Step:
        """The next step; without work when there is nothing to do."""
        step, prompts, size = Step([], [], []), [], self.pool.block_size
        for sequence in list(self.running):
            start, stop = sequence.n_computed, sequence.n_tokens
            if stop - start > 1:
                prompts.append(sequence)
            elif sequence.blocks:      # none: done, or just gave way
                roomy = start % size and not sequence.shares_tail
                if roomy or self._extend(sequence, step):
                    step.work.append(Work(sequence, start, stop))
        left = self.max_batched_tokens - len(step.work)
        if not self.continuous:
            left = 1 << 62
        for sequence in prompts:
            if left and sequence.blocks:
                left -= self._compute(sequence, left, step)
        if self.continuous or not self.running:
            while left and self.waiting and not step.preempted:
                if not self._admit(self.waiting[0]):
                    break              # nobody overtakes
                left -= self._compute(self.waiting.pop(0), left, step)
        return step

    def advance(self, step: Step) -> list[list[Sequence]]:
        """Count the step as computed. For every piece of work that yields, in order: the sequences to append a token to,
        all from the same logits; they are several when a prompt is done that others wait to share."""
        size, ready = self.pool.block_size, []
        for sequence, start, stop in step.work:
            sequence.n_computed = stop
            if self.prefix_cache:
                for i in range(start // size, stop // size):                   # blocks now full
                    self.pool.publish(sequence.blocks[i], self._key(sequence, i))
            if stop == sequence.n_tokens:
                ready.append([sequence, *self._fork(sequence)] if sequence.forks else [sequence])
        return ready

    def append(self, sequence: Sequence, token: int, reason: str | None = None) -> None:
        """Add the next token; `reason` says that it is the last one, as does the sequence's own limit."""
        sequence.generated.append(token)
        sequence.n_tokens += 1
        if reason or len(sequence.generated) >= sequence.max_new_tokens:
            self.finish(sequence, reason or "length")

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, running or waiting, and the forks that wait for it; its blocks go."""
        for member in (sequence, *sequence.forks):
            member.finish_reason = reason
        self._release(sequence)
        if sequence in self.running:                       # static batches end together
            if self.continuous or all(s.finish_reason for s in self.running):
                self.running = [s for s in self.running if not s.finish_reason]
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:                                              # it waited for the prompt of another
            for first in (*self.waiting, *self.running):
                first.forks = [s for s in first.forks if s is not sequence]

    def _compute(self, sequence: Sequence, most: int, step: Step) -> int:
        """What is left of a prompt, or as much of it as may be; how many tokens that is."""
        start, stop = sequence.n_computed, min(sequence.n_computed + most, sequence.n_tokens)
        step.work.append(Work(sequence, start, stop))
        return stop - start

    def _key(self, sequence: Sequence, i: int) -> bytes:
        """The key of its block i, which is full; worked out once."""
        size, keys = self.pool.block_size, sequence.keys
        for at in range(len(keys) * size, (i + 1) * size, size):
            keys.append(chain(keys[-1] if keys else b"", sequence.tokens(at, at + size)))
        return keys[i]

    def _cached(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest known prefix. The last token is never among them: its logits are to be computed."""
        found: list[int] = []
        if self.prefix_cache:
            for i in range((sequence.n_tokens - 1) // self.pool.block_size):
                block = self.pool.find(self._key(sequence, i))
                if block is None:
                    break
                found.append(block)
        return found

    def _admit(self, sequence: Sequence) -> bool:
        """Take a seat for it and its forks and the blocks of its prompt; False where they are not to be had."""
        if len(self.running) == self.max_running:
            return False
        seats = sum(1 + len(s.forks) for s in (*self.running, sequence))
        if seats > self.max_running:
            return False
        pool, cached = self.pool, self._cached(sequence)
        n = sequence.n_tokens if self.continuous else len(sequence.prompt) + sequence.max_new_tokens
        need = pool.blocks_for(n) - sum(pool.references(b) > 0 for b in cached)
        if need + (seats if self.continuous and self.running else 0) > pool.n_free:
            return False                                   # nobody overtakes: no sequence starves
        for block in cached:
            pool.share(block)
        sequence.blocks = cached + [pool.allocate() for _ in range(pool.blocks_for(n) - len(cached))]
        sequence.n_computed = sequence.n_cached = len(cached) * pool.block_size
        insort(self.running, sequence, key=RANK)
        return True

    def _extend(self, sequence: Sequence, step: Step) -> bool:
        """Room for one more token, and a tail of its own to write it to; False if the sequence itself had to give way."""
        pool, blocks, at = self.pool, sequence.blocks, sequence.n_computed // self.pool.block_size
        while at == len(blocks) or pool.references(blocks[at]) > 1:            # who gives way may have shared the tail
            if not pool.n_free:
                last = next(s for s in reversed(self.running) if s.blocks)
                self._preempt(last, step)
                if last is sequence:
                    return False
            elif at == len(blocks):
                blocks.append(pool.allocate())
            else:                                          # copy on write: others go on reading the old tail
                step.copies.append((blocks[at], pool.allocate()))
                pool.release(blocks[at])
                blocks[at] = step.copies[-1][1]
        sequence.shares_tail = False
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._release(sequence)
        sequence.n_computed = 0
        sequence.preemptions += 1
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=RANK)
        step.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):            # a prefix stays cached longer than what follows it
            self.pool.release(block)
        sequence.blocks = []

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Those that waited for this prompt, each now with the same blocks."""
        forks, sequence.forks, sequence.shares_tail = sequence.forks, [], True
        for fork in forks:
            fork.blocks, fork.n_computed = sequence.blocks[:self.pool.blocks_for(sequence.n_computed)], sequence.n_computed
            fork.keys, fork.shares_tail = list(sequence.keys), True
            for block in fork.blocks:
                self.pool.share(block)
            insort(self.running, fork, key=RANK)
        return forks
