"""How long training takes: from a utilisation, or from an estimate of one step that explains itself."""

from typing import NamedTuple

from gpt4lib import format as fmt
from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis import memory
from gpt4lib.specs import ParallelPlan, registry

SECONDS_PER_DAY = 86_400


def mfu(flop, n_devices, seconds, peak):
    """Model FLOPs utilisation: useful FLOP/s over the peak of all devices.

    `peak` is one device's dense FLOP/s; recomputation is not useful. Chowdhery et al. 2022,
    arXiv:2204.02311, section 4.1.
    """
    return flop / (n_devices * seconds * peak)


def seconds(flop: float, n_devices: int, peak: float, utilisation: float) -> float:
    """Time to do `flop` useful FLOP at a model FLOPs utilisation in (0, 1]."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation!r} is not accepted; give a fraction above 0 and up to 1")
    return flop / (n_devices * peak * utilisation)


def days(flop: float, n_devices: int, peak: float, utilisation: float) -> float:
    """`seconds` in days."""
    return seconds(flop, n_devices, peak, utilisation) / SECONDS_PER_DAY


class Estimate(NamedTuple):
    """One training step: seconds by term, bytes on the fullest device by part."""
    plan: ParallelPlan
    by_term: dict[str, float]
    memory: memory.MemoryUse
    flop: float                      # of the model: forward and backward of all tokens, recomputation apart
    hardware_flop: float             # with recomputation
    peak: float                      # FLOP/s of all devices

    @property
    def step_seconds(self) -> float:
        return sum(self.by_term.values())

    @property
    def mfu(self) -> float:
        return self.flop / (self.step_seconds * self.peak)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, in which recomputation counts as work."""
        return self.hardware_flop / (self.step_seconds * self.peak)

    @property
    def bound_by(self) -> str:
        """The term that takes most of the step."""
        return max(self.by_term, key=self.by_term.get)

    def explain(self) -> str:
        """Every term with its share and formula, the memory by part, and how far off such estimates have been."""
        step, used = self.step_seconds, self.memory.total
        terms = registry.read("gpt4lib.analysis", "terms.toml")
        rows = [(term, fmt.seconds(t), fmt.percent(t / step), terms[term]) for term, t in self.by_term.items() if t]
        median, p90 = eff.error("step")
        text = (f"{fmt.seconds(step)} a step, MFU {fmt.percent(self.mfu)}; of measured runs not used for fitting, above 5 % MFU, "
                f"half are within {fmt.percent(median, 0)}, nine in ten within {fmt.percent(p90, 0)}\n"
                + fmt.table(rows, ("term", "time", "share", "formula"), right=(1, 2)))
        parts = [(part.replace("_", " "), fmt.bytes_si(n), fmt.percent(n / used)) for part, n in self.memory.by_part.items() if n]
        median, p90 = eff.error("memory")
        return (f"{text}\n\n{fmt.bytes_si(used)} on the fullest device; half are within {fmt.percent(median, 0)}, nine in ten "
                f"within {fmt.percent(p90, 0)}\n" + fmt.table(parts, ("part", "bytes", "share"), right=(1, 2)))
