"""The ledger for machines (`as_json`) and for a terminal (`table`, `detail`)."""

import math
import textwrap
from collections.abc import Iterable

from gpt4lib import format
from gpt4lib.ledger.claims import Claim
from gpt4lib.ledger.intervals import Interval
from gpt4lib.ledger.judge import Check, Judgement, judge, tally
from gpt4lib.ledger.text import error, interval

ICONS = {"consistent": "✓", "inconsistent": "✗", "tension": "≈", "underivable": "?", "qualitative": "–", "corrected": "✎"}


def _plain(bounds: Interval | None) -> float | list[float | None] | None:
    if bounds is None:
        return None
    low, high = (None if math.isinf(x) else x for x in bounds)
    return low if low == high else [low, high]


def worst_error(judgement: Judgement) -> float | None:
    """Return the relative error of largest size among the checks; None where nothing is checked."""
    errors = [c.relative_error for c in judgement.checks if c.relative_error is not None]
    return max(errors, key=abs, default=None)


def as_json(claim: Claim) -> dict:
    """Return the claim and its verdict as plain values, figures in SI units.

    `stated` and `recomputed` are a number, a range [low, high] (None for an open end) or None;
    where a claim states several figures, they and `unit` are dicts by the name of the figure.
    `relative_error` is stated / recomputed - 1, the largest of them.
    """
    judgement = judge(claim)
    stated = {q.name: _plain(q.figure.nominal) for q in claim.quantities}
    units = {q.name: q.unit for q in claim.quantities}
    found = {c.quantity.name: _plain(c.recomputed) for c in judgement.checks}
    if len(claim.quantities) < 2:
        stated, units, found = (next(iter(d.values()), None) for d in (stated, units, found))
    off = worst_error(judgement)
    return {"id": claim.id, "section": claim.section, "zh": claim.zh, "en": claim.en,
            "stated": stated, "unit": units, "recomputed": found,
            "relative_error": None if off is None or math.isinf(off) else off,
            "verdict": judgement.verdict, "diagnosis": "; ".join(filter(None, (judgement.diagnosis, claim.note))),
            "status": claim.status, "chapter": claim.chapter}


def cells(claim: Claim, judgement: Judgement, errors: bool = False) -> tuple[list[str], list[str]]:
    """Return what is stated and what is recomputed as text, an entry per figure."""
    def label(name: str, text: str) -> str:
        return f"{name}: {text}" if len(claim.quantities) > 1 and not text.endswith(name) else text

    def off(check: Check) -> str:
        bound = not all(map(math.isfinite, check.quantity.figure.nominal)) and check.holds
        return "" if bound or not errors else f" ({error(check.relative_error)})"

    stated = [label(q.name, interval(q.figure.nominal, q.unit)) for q in claim.quantities]
    recomputed = [label(c.quantity.name, interval(c.recomputed, c.quantity.unit)) + off(c)
                  for c in judgement.checks if c.recomputed is not None]
    return stated, recomputed


def _fit(text: str, width: int) -> str:
    if format.width(text) > width:
        while format.width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - format.width(text))


def table(claims: Iterable[Claim]) -> str:
    """Return the claims as text, one line each, and the tally under them."""
    claims = tuple(claims)
    lines = [f"{'id':<4} {'verdict':<14} {'stated':<28} {'recomputed':<28} error"]
    for claim in claims:
        judgement = judge(claim)
        stated, recomputed = map("; ".join, cells(claim, judgement))
        off = error(worst_error(judgement)) if recomputed else ""
        verdict = f"{ICONS[judgement.verdict]} {judgement.verdict}"
        figures = f"{_fit(stated, 28)} {_fit(recomputed, 28)} {off}"
        says = figures if stated or recomputed else _fit(claim.term_en or claim.en, 64)
        lines.append(f"{_fit(claim.id, 4)} {_fit(verdict, 14)} {says}".rstrip())
    counted = ", ".join(f"{n} {verdict}" for verdict, n in tally(claims).items() if n)
    return "\n".join([*lines, "", f"{len(claims)} claims: {counted}"])


def detail(claim: Claim) -> str:
    """Return everything the ledger knows of one claim, as text."""
    judgement = judge(claim)
    rows = [(f"{claim.id}  {claim.section}", f"{ICONS[judgement.verdict]} {judgement.verdict}"),
            ("notes", claim.zh), ("in English", claim.en), ("status", claim.status)]
    for check in judgement.checks:
        q = check.quantity
        rows.append((q.name, f"stated {interval(q.figure.nominal, q.unit)}"))
        if check.recomputed is not None:
            mark = "agrees" if check.holds else "does not agree"
            again = interval(check.recomputed, q.unit)
            rows += [("", f"= {q.follows}"), ("", f"= {again} ({error(check.relative_error)}, {mark})")]
    rows += [("implies", i.diagnosis) for i in judgement.implied if i.outcome == "fits"]
    last = [("diagnosis", judgement.diagnosis), ("note", claim.note), (claim.term_en, claim.definition_en),
            (claim.term_zh, claim.definition_zh), ("chapter", str(claim.chapter))]
    rows += [(name, text) for name, text in last if text]
    lines = []
    for name, text in rows:
        head, *rest = textwrap.wrap(text, 76, break_on_hyphens=False) or [""]
        if len(name) > 16:
            lines.append(name)
            name = ""
        lines.append(f"{_fit(name, 16)} {head}")
        lines += [f"{'':16} {line}" for line in rest]
    return "\n".join(lines)
