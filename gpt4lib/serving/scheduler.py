"""Which sequences run in the next step: iteration-level batching. Yu et al. 2022 (Orca), OSDI, section 3.2.

Knows neither torch nor clocks, so that a real engine and a simulator can drive the same object.
"""

from collections import deque

from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.sequence import Sequence


class Scheduler:
    """First come, first served. continuous=True fills a place the moment it is free; False waits until
    the whole batch has finished, as static batching does.

    A sequence reserves the blocks of its full length on admission, so it never has to be evicted.
    """

    def __init__(self, pool: BlockPool, max_running: int, continuous: bool = True) -> None:
        if max_running < 1:
            raise ValueError(f"max_running={max_running} is not accepted; give an integer >= 1")
        self.pool, self.max_running, self.continuous = pool, max_running, continuous
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; ValueError if it could never fit."""
        need = self.pool.blocks_for(len(sequence.prompt) + sequence.max_new_tokens)
        total = len(self.pool._references)
        if need > total:
            raise ValueError(f"a sequence of {len(sequence.prompt)} + {sequence.max_new_tokens} tokens needs {need} "
                             f"blocks of {self.pool.block_size}, the pool has {total}; shorten it or enlarge the pool")
        self.waiting.append(sequence)

    def schedule(self) -> list[Sequence]:
        """The batch of the next step, in order of admission; empty when there is nothing to do."""
        if self.continuous or not self.running:
            while self.waiting and len(self.running) < self.max_running:
                first = self.waiting[0]
                need = self.pool.blocks_for(len(first.prompt) + first.max_new_tokens)
                if need > self.pool.n_free:
                    break                                  # nobody overtakes: no sequence starves
                first.blocks = [self.pool.allocate() for _ in range(need)]
                self.running.append(self.waiting.popleft())
        return [s for s in self.running if not s.finished]

    def update(self, tokens: dict[Sequence, int]) -> list[Sequence]:
        """Append one new token to each sequence of the step; returns those that finished, their blocks freed."""
        for sequence, token in tokens.items():
            sequence.generated.append(token)
        done = [s for s in self.running if s.finished and s.blocks]
        for sequence in done:
            for block in sequence.blocks:
                self.pool.release(block)
            sequence.blocks = []
        if self.continuous or all(s.finished for s in self.running):
            self.running = [s for s in self.running if not s.finished]
        return done
