"""Whether bytes or arithmetic bind. Williams et al. 2009, "Roofline", CACM 52(4)."""

from typing import NamedTuple

from gpt4lib.specs.hardware import DeviceSpec


class Time(NamedTuple):
    """Seconds, and which of "memory" or "compute" takes them."""
    seconds: float
    bound_by: str


def intensity(flop, bytes_moved):
    """Arithmetic intensity: FLOP per byte moved."""
    return flop / bytes_moved


def ridge(device: DeviceSpec, dtype: str) -> float:
    """FLOP per byte above which arithmetic binds: peak over bandwidth."""
    return device.peak_flop_rate(dtype) / device.memory_bandwidth


def time(device: DeviceSpec, dtype: str, flop: float, bytes_moved: float) -> Time:
    """The longer of moving the bytes and doing the arithmetic at datasheet rates: a lower bound."""
    compute, memory = flop / device.peak_flop_rate(dtype), bytes_moved / device.memory_bandwidth
    return Time(max(compute, memory), "compute" if compute > memory else "memory")


def distinct_experts(n_experts: int, top_k: int, n_tokens):
    """Expected experts that at least one of n_tokens visits: E (1 - (1 - k/E)^B).

    Routing is taken as uniform. Bytes follow this, FLOP follow top_k and memory all of them. Skewed
    routing touches fewer; n_tokens may be an array.
    """
    return n_experts * (1 - (1 - top_k / n_experts) ** n_tokens)
