"""Figures of the ledger as short text: `gpt4lib.format` with four digits and no idle zeros."""

import math
import re
from collections.abc import Callable

from gpt4lib import format
from gpt4lib.ledger.intervals import Interval


def _trim(text: str) -> str:
    return re.sub(r"(\.\d*?)0+(?=\D|$)", lambda m: m[1].rstrip("."), text)


def _number(x: float) -> str:
    if abs(x) >= 1000 or float(x).is_integer():
        return f"{x:,.0f}"
    return f"{x:.4g}" if abs(x) >= 1e-3 else f"{x:.3g}"


def _four(x: float) -> str:
    return _number(float(f"{x:.4g}"))


def _per_ktoken(x: float) -> str:
    # Never an exponent: the slip between dollars and cents is read off the zeros.
    places = max(0, 2 - math.floor(math.log10(x * 1000)))
    return f"${_trim(f'{x * 1000:.{places}f}')} per 1k tokens"


_WRITTEN: dict[str, Callable[[float], str]] = {
    "ratio": _number, "dimension": _number, "probability": _number,
    "fraction": lambda x: f"{_four(100 * x)} %",
    "s": lambda x: f"{_number(x / 86400)} days" if abs(x) >= 86400 else f"{_number(x)} s",
    "USD/s": lambda x: f"${_number(round(x * 3600, 9))}/h",
    "USD/token": _per_ktoken,
    "USD": lambda x: _trim(format.dollars(x, 4)),
    "FLOP": lambda x: f"{x:.4g} FLOP".replace("e+", "e") if x >= 1e18 else _trim(format.flop(x, 4)),
    "FLOP/s": lambda x: _trim(format.flop_rate(x, 4)),
    "bytes/s": lambda x: f"{_trim(format.bytes_si(x, 4))}/s",
    "bytes": lambda x: _trim(format.bytes_si(x, 4)),
}


def value(x: float, unit: str) -> str:
    """Write one value: 2.8e11 parameters -> "280 B parameters", 7776000 s -> "90 days"."""
    if unit in _WRITTEN:
        return _WRITTEN[unit](x)
    return f"{_number(x) if abs(x) < 1e6 else _trim(format.count(x, 4))} {unit}"


def interval(bounds: Interval | None, unit: str) -> str:
    """Write an interval: a point as a value, an open one as a bound, else "low to high"."""
    if bounds is None:
        return "–"
    low, high = bounds
    if math.isinf(low):
        return f"< {value(high, unit)}"
    if math.isinf(high):
        return f"> {value(low, unit)}"
    first, second = value(low, unit), value(high, unit)
    if first == second:
        return first
    # "90 days to 100 days" -> "90 to 100 days"
    number, _, tail = first.partition(" ")
    return f"{number if tail == second.partition(' ')[2] else first} to {second}"


def error(relative: float | None) -> str:
    """Write a relative error: as a factor beyond fivefold, else in percent."""
    if relative is None:
        return "–"
    if math.isinf(relative):
        return "∞"
    if relative >= 4:
        return f"×{_four(relative + 1)}"
    if -1 < relative <= -0.8:
        return f"÷{_four(1 / (1 + relative))}"
    return f"{100 * relative:+.1f} %" if abs(relative) >= 5e-4 else "0 %"
