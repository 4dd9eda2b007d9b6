"""The one place where plain numbers become text: SI prefixes, units, tables."""

import math
from typing import Sequence

SI = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
COUNT = ("", "k", "M", "B", "T")          # what people say of parameters and tokens


def _scaled(value: float, prefixes: Sequence[str], base: float, digits: int) -> str:
    """`value` with `digits` significant digits and the largest prefix that keeps it at 1 or above."""
    if not math.isfinite(value):
        return str(value)
    step, size = 0, abs(value)
    while step < len(prefixes) - 1 and (size >= base or float(f"{size:.{digits}g}") >= base):
        size, step = size / base, step + 1
    shown = math.copysign(size, value)
    if step == 0 and float(shown).is_integer():
        return f"{shown:.0f}"
    whole = len(f"{float(f'{size:.{digits}g}'):.0f}")
    return f"{shown:.{max(0, digits - whole)}f} {prefixes[step]}".rstrip()


def count(value: float, digits: int = 3) -> str:
    """Parameters or tokens: 1.83 T, 55.8 B, 925 M."""
    return _scaled(value, COUNT, 1000, digits)


def _with_unit(text: str, unit: str) -> str:
    return f"{text}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def bytes_si(value: float, digits: int = 3) -> str:
    """Powers of 1000: 3.67 TB."""
    return _with_unit(_scaled(value, SI, 1000, digits), "B")


def bytes_iec(value: float, digits: int = 3) -> str:
    """Powers of 1024: 28.4 GiB."""
    return _with_unit(_scaled(value, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), 1024, digits), "B")


def flop(value: float, digits: int = 3) -> str:
    """An amount of work: 560 GFLOP."""
    return _with_unit(_scaled(value, SI, 1000, digits), "FLOP")


def flop_rate(value: float, digits: int = 3) -> str:
    """A speed: 312 TFLOP/s."""
    return flop(value, digits) + "/s"


def seconds(value: float, digits: int = 3) -> str:
    """A duration in the unit a person would use: 12.5 ms, 3.2 h, 95 d."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g} {unit}"
    return f"{value / 1e-9:.{digits}g} ns" if value else "0 s"


def dollars(value: float, digits: int = 3) -> str:
    """Money: $63.0 M, $0.0049."""
    if abs(value) < 1000:
        return f"${value:.{digits}g}"
    return "$" + _scaled(value, COUNT, 1000, digits)


def percent(fraction: float, decimals: int = 1) -> str:
    """A fraction as a percentage: 0.354 -> 35.4 %."""
    return f"{100 * fraction:.{decimals}f} %"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Aligned plain text; `right` lists the columns set flush right. Wide CJK characters count as two."""
    lines = [list(header)] * bool(header) + [list(map(str, row)) for row in rows]
    if not lines:
        return ""
    widths = [max(map(width, column)) for column in zip(*lines)]
    out = []
    for line in lines:
        cells = [" " * (w - width(c)) + c if i in right else c + " " * (w - width(c))
                 for i, (c, w) in enumerate(zip(line, widths))]
        out.append("  ".join(cells).rstrip())
    if header:
        out.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(out)


def width(text: str) -> int:
    """Columns a terminal needs: CJK and full-width characters take two."""
    return sum(2 if "\u2e80" <= c <= "\uffe6" and not "\uff61" <= c <= "\uffdc" else 1 for c in text)
