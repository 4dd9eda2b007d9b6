"""Money and energy from device hours, and what failures leave of them. Plain arithmetic takes arrays too."""

import math
from typing import NamedTuple

from gpt4lib.specs.checks import positive, require


def device_hours(n_devices, seconds):
    """Hours of one device: what clouds bill."""
    return n_devices * seconds / 3600


def dollars(n_devices, seconds, dollars_per_device_hour):
    """Renting n_devices for `seconds`."""
    return device_hours(n_devices, seconds) * dollars_per_device_hour


def dollars_per_1k_tokens(n_devices, dollars_per_device_hour, tokens_per_second):
    """What a thousand tokens cost on a rented cluster that sustains this rate."""
    return 1000 * dollars(n_devices, 1, dollars_per_device_hour) / tokens_per_second


def tokens_per_second(n_devices, dollars_per_device_hour, dollars_per_token):
    """The throughput that a price per token implies for a rented cluster."""
    return dollars(n_devices, 1, dollars_per_device_hour) / dollars_per_token


def joules(n_devices, seconds, watts, load=1.0, overhead=1.1):
    """Energy of n_devices that draw `load` of their rated watts; `overhead` is the data centre's PUE."""
    return n_devices * seconds * watts * load * overhead


class Goodput(NamedTuple):
    """What is left of a run that fails now and then."""
    interval_seconds: float          # between checkpoints
    fraction: float                  # useful time over wall time
    failures_per_day: float


def goodput(n_devices: int, device_hours_between_failures: float, checkpoint_seconds: float, restart_seconds: float,
            interval_seconds: float | None = None) -> Goodput:
    """Useful share of the wall time when any failing device stops the job and costs the work since the last checkpoint.

    Failures come at random; each checkpoint holds the job up for `checkpoint_seconds`, each restart for
    `restart_seconds`. Without an interval, the best one to first order, sqrt(2 d M) - d. Daly 2006, "A higher order estimate
    of the optimum checkpoint interval for restart dumps", equations 13 and 20.
    """
    for name, value in (("n_devices", n_devices), ("device_hours_between_failures", device_hours_between_failures),
                        ("checkpoint_seconds", checkpoint_seconds)):
        positive(name, value)
    require(0 <= restart_seconds < math.inf, f"restart_seconds={restart_seconds!r} is not accepted; give a number of seconds")
    between, d = 3600 * device_hours_between_failures / n_devices, checkpoint_seconds
    if interval_seconds is None:
        interval_seconds = math.sqrt(2 * d * between) - d if d < between / 2 else between
    positive("interval_seconds", interval_seconds)
    if (restart_seconds + interval_seconds + d) / between > 50:
        raise ValueError(f"a failure every {between:.3g} s leaves no time to restart and checkpoint; "
                         f"device_hours_between_failures={device_hours_between_failures!r} is too low for {n_devices} devices")
    wall = between * math.exp(restart_seconds / between) * math.expm1((interval_seconds + d) / between)
    return Goodput(interval_seconds, interval_seconds / wall, 86_400 / between)


class Run(NamedTuple):
    """A training run in all: wall-clock seconds, hours and dollars of devices, joules."""
    seconds: float
    device_hours: float
    dollars: float
    joules: float


def run(n_devices: int, step_seconds: float, tokens_per_step: float, tokens: float, dollars_per_device_hour: float,
        watts: float, useful: float = 1.0) -> Run:
    """A run over `tokens`, of whose wall time the share `useful` is goodput."""
    require(0 < useful <= 1, f"useful={useful!r} is not accepted; give a fraction above 0 and up to 1")
    total = tokens / tokens_per_step * step_seconds / useful
    return Run(total, hours := device_hours(n_devices, total), hours * dollars_per_device_hour, joules(n_devices, total, watts))
