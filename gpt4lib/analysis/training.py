"""How long a training run takes, from its arithmetic (`flops.training`) and a utilisation."""

from __future__ import annotations

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
        raise ValueError(f"utilisation={utilisation!r} is not accepted; "
                         f"give a fraction above 0 and up to 1")
    return flop / (n_devices * peak * utilisation)


def days(flop: float, n_devices: int, peak: float, utilisation: float) -> float:
    """`seconds` in days."""
    return seconds(flop, n_devices, peak, utilisation) / SECONDS_PER_DAY
