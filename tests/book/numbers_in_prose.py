"""Numbers in prose: each must be computed by a cell, stated by a claim or quoted with its source."""

from __future__ import annotations

import math
import re

SCALE = {"%": 1e-2, "percent": 1e-2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12,
         "亿": 1e8, "万": 1e4, "万亿": 1e12,
         **{prefix + unit: value for prefix, value in {"K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
            "E": 1e18}.items() for unit in ("B", "FLOP", "W", "Hz")},
         **{prefix + "iB": 1024.0 ** power for power, prefix in enumerate("KMGTP", 1)},
         "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
UNITS = ("FLOP", "bytes", "GPUs", "A100s", "H100s", "dollars", "cents", "tokens", "days", "hours", "seconds", "minutes",
         "parameters", "ms", "W")
WORD = "|".join(sorted(map(re.escape, [*SCALE, *UNITS]), key=len, reverse=True))
NUMBER = re.compile(r"(?P<money>\\\$)?(?<![\w.,^{])(?P<digits>\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
                    rf"(?:e(?P<power>[+-]?\d+))?(?:[\s\xa0]*(?P<unit>{WORD})(?![A-Za-z]))?(?![\d])")
# What looks like a number and counts nothing: the label of a problem, a section, a version.
LABEL = re.compile(r"\*\*\d+\.\d+ \[|(?:§|\b(?:Section|Table|Figure|Equation|Appendix|Chapter|Problem|Python|PyTorch|Mixtral|"
                   r"Llama|GPT|Qwen|PaLM))s?[- ]*\d+(?:\.\d+)*", re.I)


def values(match: re.Match) -> list[tuple[float, float]]:
    """What a written number can mean, bare and with its unit: (value, half a unit of its last digit)."""
    digits = re.sub(r"[,{}]", "", match["digits"])
    power = 10.0 ** int(match["power"] or 0)
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) * power
    scale = SCALE.get(match["unit"] or "", 1.0)
    bare, scaled = (float(digits) * power, half), (float(digits) * power * scale, half * scale)
    if len(digits.replace(".", "").lstrip("0")) < 2:        # one digit says nothing without its unit
        return [scaled] if scale != 1 else [(bare[0], 0.0)]
    return list(dict.fromkeys([bare, scaled]))


def weighs(match: re.Match) -> bool:
    """Whether a reader could check it: grouped, decimal, in scientific form, with a unit, or money."""
    return bool(match["unit"] or match["money"] or match["power"] or re.search(r"[,.]", match["digits"]))


def prose(cell: dict) -> str:
    """What a reader reads of a Markdown cell, or the alt text of a figure."""
    if cell["cell_type"] != "markdown":
        return cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
    text = re.sub(r"<form.*?</form>|`[^`\n]+`(?!`)(?<!\}`)|\]\([^)]*\)", " ", "".join(cell["source"]), flags=re.S)
    text = "\n".join(line for line in text.split("\n") if not line.startswith(">"))
    sentences = re.split(r"(?<=[.?!:])\s+|\n\n", LABEL.sub(" ", text))
    return "\n".join(s for s in sentences if "{cite" not in s)      # a cited sentence carries its own source


def computed(notebook: dict) -> str:
    """Everything cells compute or take in: code without its comments, outputs, text drawn in figures, quotations."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts += [line for line in source.split("\n") if line.startswith(">")]
            continue
        parts.append(re.sub(r"(^|\s)#.*", "", source))
        for output in cell["outputs"]:
            data = output.get("data", {})
            parts += ["".join(output.get("text", "")), "".join(data.get("text/plain", ""))]
            parts += re.findall(r">([^<>]+)</t(?:ext|span)>", "".join(data.get("image/svg+xml", "")))
    return "\n".join(parts)


def typed_numbers(notebook: dict, claims: list[str] = ()) -> list[str]:
    """Numbers in prose or alt text that agree, at the precision written, with nothing computed or claimed."""
    known = sorted({v for text in (computed(notebook), *claims)
                    for m in NUMBER.finditer(text.replace("_", "")) for v, _ in values(m)})
    bad = []
    for cell in notebook["cells"]:
        for match in filter(weighs, NUMBER.finditer(prose(cell))):
            if not any(near(v, half, known) for v, half in values(match)):
                bad.append(match.group().strip())
    return bad


def near(value: float, half: float, known: list[float]) -> bool:
    return any(abs(v - value) <= half * (1 + 1e-9) or math.isclose(v, value, rel_tol=1e-12) for v in known)
