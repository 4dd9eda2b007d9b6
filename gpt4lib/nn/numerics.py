"""What changes a model's numbers but none of its counts; a ModelSpec holds the rest."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gpt4lib.specs.checks import positive, require, require_known


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of slow rotary frequencies. Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2;
    the interpolation between the two limits as in Meta's released code."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            positive(name, value)
        require(self.low_freq_factor < self.high_freq_factor, f"low_freq_factor={self.low_freq_factor!r} is not accepted; "
                f"give a number below high_freq_factor={self.high_freq_factor!r}")

    def stretch(self, rates: Tensor) -> Tensor:
        """Rates whose wavelength exceeds original / low are divided by factor, those under original / high kept."""
        turns = self.original_context * rates / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return rates * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Numerics:
    """norm_eps: added under the root of every norm; rope_base: the slowest rotary wavelength is about
    2 pi rope_base; gelu: "none" for the exact one, "tanh" for GPT-2's approximation."""
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    gelu: str = "none"
    llama3: Llama3Rope | None = None

    def __post_init__(self) -> None:
        require_known("gelu", self.gelu, ("none", "tanh"))
        for name in ("norm_eps", "rope_base"):
            positive(name, getattr(self, name))

    def rotary_rates(self, half: int, device: torch.device) -> Tensor:
        """Radians per position of each pair of channels, fp64 [half]. Su et al. 2021, arXiv:2104.09864, section 3.2."""
        rates = self.rope_base ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        return rates if self.llama3 is None else self.llama3.stretch(rates)
