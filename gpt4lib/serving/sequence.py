"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence as Tokens

from gpt4lib.specs.checks import require, require_counts


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt, what has been generated, and the cache blocks that hold both; compared by identity.

    priority: the lower, the sooner. forks: further samples of the same prompt, which join when its prompt is computed.
    The scheduler writes everything below.
    """
    prompt: Tokens[int]
    max_new_tokens: int
    priority: int = 0
    forks: list[Sequence] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    n_tokens: int = 0                         # of the prompt and what follows it
    n_computed: int = 0                       # tokens whose keys and values stand in the blocks
    n_cached: int = 0                         # of them, found there on the last admission
    blocks: list[int] = field(default_factory=list)
    shares_tail: bool = False                 # its last block may be another's too, and partly empty
    keys: list[bytes] = field(default_factory=list)      # of its full blocks, as far as they were asked for
    rank: tuple[int, int] = (0, 0)            # priority, then arrival
    preemptions: int = 0
    finish_reason: str | None = None               # why: length, stop, cancelled, error

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt is empty; give at least one token")
        require_counts(self, 1, "max_new_tokens")
        self.n_tokens = len(self.prompt)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start .. stop of the prompt and what follows it."""
        n = len(self.prompt)
        return [*self.prompt[start:stop], *self.generated[max(start - n, 0):max(stop - n, 0)]]
