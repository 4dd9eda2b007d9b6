"""What changes a model's numbers but none of its counts; a ModelSpec holds the rest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """norm_eps: added under the root of every norm; rope_base: the slowest rotary wavelength is about
    2 pi rope_base; gelu: "none" for the exact one, "tanh" for GPT-2's approximation."""
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    gelu: str = "none"

    def __post_init__(self) -> None:
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu={self.gelu!r} is not known; accepted: none, tanh")
        for name in ("norm_eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not accepted; give a number > 0")
