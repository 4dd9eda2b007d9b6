"""Figures of the ledger as short text."""

import math

from gpt4lib.ledger.intervals import Interval

_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"),
             (1e6, "M"), (1e3, "k"))  # fmt: skip
_PREFIXED = ("FLOP", "FLOP/s", "bytes", "bytes/s")
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def _number(x: float) -> str:
    if x == 0 or x.is_integer() and abs(x) < 1e5:
        return f"{x:,.0f}"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.4g}" if abs(x) >= 1e-3 else f"{x:.3g}"


def value(x: float, unit: str) -> str:
    """Write one value: 2.8e11 parameters -> "280 B parameters", 7776000 s -> "90 days"."""
    if unit in ("ratio", "dimension", "probability"):
        return _number(x)
    if unit == "fraction":
        return f"{_number(float(f'{100 * x:.4g}'))} %"
    if unit == "s":
        return f"{_number(x / 86400)} days" if abs(x) >= 86400 else f"{_number(x)} s"
    if unit == "USD/s":
        return f"${_number(round(x * 3600, 9))}/h"
    if unit == "USD/token":
        return f"${x * 1000:.3g} per 1k tokens"
    if unit == "USD":
        scale, letter = next((s for s in _SCALES if abs(x) >= s[0]), (1, ""))
        return f"${_number(x / scale)} {letter}".rstrip()
    if unit in _PREFIXED:
        scale, letter = next((s for s in _PREFIXES if abs(x) >= s[0]), (1, ""))
        head, *rest = unit.replace("bytes", "B" if letter else "bytes").split("/")
        return f"{_number(x / scale)} {letter}{'/'.join([head, *rest])}"
    scale, letter = next((s for s in _SCALES if abs(x) >= s[0]), (1, ""))
    return f"{_number(x / scale)} {letter} {unit}".replace("  ", " ")


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
    """Write a relative error: as a factor beyond tenfold, else in percent."""
    if relative is None:
        return "–"
    if math.isinf(relative):
        return "∞"
    if relative >= 9:
        return f"×{_number(relative + 1)}"
    if relative <= -0.9 and relative > -1:
        return f"÷{_number(1 / (1 + relative))}"
    return f"{100 * relative:+.1f} %" if abs(relative) >= 5e-4 else "0 %"
