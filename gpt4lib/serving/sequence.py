"""One request on its way through the engine."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been generated, and the cache blocks that hold both; compared by identity."""
    prompt: list[int]
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt is empty; give at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is not accepted; give an integer >= 1")

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def finished(self) -> bool:
        return len(self.generated) >= self.max_new_tokens
