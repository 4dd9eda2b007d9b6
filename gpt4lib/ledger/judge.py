"""The verdict on a claim, computed from what it states and what the other claims state.

One tolerance rule for all rows: a printed figure stands for every value that rounds to it, a
range for what lies between its ends, a count for itself. A claim is consistent when the interval
it states and the interval recomputed from the other figures share a value. So the tolerance is
never chosen: it is the precision with which the text itself speaks.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from gpt4lib.ledger.claims import Claim, Figures, Implication, Quantity, figures, load
from gpt4lib.ledger.intervals import Interval, evaluate, inside, overlaps
from gpt4lib.ledger.text import error, interval

VERDICTS = ("consistent", "inconsistent", "tension", "underivable", "qualitative", "corrected")


class Check(NamedTuple):
    """One stated figure against its recomputation (None: a premise, nothing to compare)."""

    quantity: Quantity
    recomputed: Interval | None
    relative_error: float | None
    holds: bool
    diagnosis: str = ""


class Implied(NamedTuple):
    """One consequence of a claim: its value, and `fits` | `out of band` | `impossible`."""

    implication: Implication
    value: Interval
    outcome: str
    diagnosis: str


class Judgement(NamedTuple):
    """The verdict on one claim with everything it rests on."""

    verdict: str
    diagnosis: str
    checks: tuple[Check, ...]
    implied: tuple[Implied, ...]


def relative_error(stated: Interval, recomputed: Interval) -> float:
    """Return stated / recomputed - 1, taken to the nearest end of a range; 0 inside it.

    Two ranges are compared end by end and the worse end counts. An open end asks nothing.
    Returns inf where the recomputed value is 0 and the stated one is not.
    """
    def off(a: float, b: float) -> float:
        return 0.0 if a == b else math.inf if b == 0 else a / b - 1

    if inside(stated, recomputed) or inside(recomputed, stated):
        return 0.0
    if all(map(math.isfinite, (*stated, *recomputed))) and stated[0] < stated[1] and recomputed[0] < recomputed[1]:
        return max((off(a, b) for a, b in zip(stated, recomputed, strict=True)), key=abs)
    if stated[1] < recomputed[0]:
        return off(stated[1], recomputed[0])
    if stated[0] > recomputed[1]:
        return off(stated[0], recomputed[1])
    return 0.0


def power_of_ten(stated: Interval, recomputed: Interval) -> int:
    """Return n != 0 such that stated / 10**n agrees with the recomputed value, else 0.

    Asked only of figures known to better than a factor of three: a looser one would agree with
    some power of ten by chance.
    """
    if any(low <= 0 or high / low > 3 for low, high in (stated, recomputed)):
        return 0
    n = round(math.log10(stated[0] / recomputed[0]))
    return n if n and overlaps(tuple(x / 10.0**n for x in stated), recomputed) else 0


def _check(quantity: Quantity, claim: Claim, known: Figures) -> Check:
    if quantity.follows is None:
        return Check(quantity, None, None, True)
    stated, unit = quantity.figure, quantity.unit
    shown = evaluate(quantity.follows, known.lookup(wide=False))
    meant = evaluate(quantity.follows, known.lookup(wide=True))
    off = relative_error(stated.nominal, shown)
    if overlaps(stated.interval, meant):
        return Check(quantity, shown, off, True)
    if n := power_of_ten(stated.interval, meant):
        fixed = tuple(x / 10.0**n for x in stated.nominal)
        times = f"×{10**n:,}" if n > 0 else f"÷{10**-n:,}"
        why = f"unit slip or typo ({times}): {interval(fixed, unit)} would agree"
    else:
        rivals = [i for i in known.sources(quantity.follows) if i != claim.id]
        together = " and ".join([", ".join(rivals[:-1]), rivals[-1]] if rivals[1:] else rivals)
        why = f"contradicts {together or 'its source'}: recomputed {interval(shown, unit)} ({error(off)})"
    return Check(quantity, shown, off, False, f"{quantity.name}: {why}")


def _imply(implication: Implication, known: Figures) -> Implied:
    near, wide = known.lookup(wide=False), known.lookup(wide=True)
    value, meant = evaluate(implication.follows, near), evaluate(implication.follows, wide)
    shown = interval(value, implication.unit)
    text = f"{implication.name} {shown}"
    if implication.limit and not overlaps(meant, limit := evaluate(implication.limit, near)):
        bound = f"above {limit[1]:.3g}" if meant[0] > limit[1] else f"below {limit[0]:.3g}"
        return Implied(implication, value, "impossible", f"impossible: implies {text}, {bound}")
    if implication.band and not overlaps(meant, band := evaluate(implication.band, wide)):
        stated = interval(band, implication.unit)
        return Implied(implication, value, "out of band", f"needs {text}, where the text has {stated}")
    if implication.whole and not value[0].is_integer():
        return Implied(implication, value, "out of band", f"needs {text}: not a whole number")
    return Implied(implication, value, "fits", f"{implication.name}: {shown}")


def _read(claim: Claim, known: Figures) -> str:
    """Return what the readings that hold say about a claim that fails as it stands."""
    for reading in claim.readings:
        follows = dict(reading.follows)
        quantities = tuple(replace(q, follows=follows.get(q.name, q.follows),
                                   figure=reading.figure if q.name == reading.quantity else q.figure)
                           for q in claim.quantities)
        outcome = judge(replace(claim, quantities=quantities, readings=()), known)
        if outcome.verdict != "consistent":
            continue
        if reading.subject:
            values = ", ".join(f"{c.quantity.name} {interval(c.recomputed, c.quantity.unit)}"
                               for c in outcome.checks if c.recomputed)
            return f"wrong subject: holds for {reading.name} ({values})"
        bounded = [i.diagnosis for i in outcome.implied if i.implication.limit]
        return f"holds if read as {reading.name}" + "".join(f" ({b})" for b in bounded)
    return ""


def judge(claim: Claim, known: Figures | None = None) -> Judgement:
    """Judge one claim against the figures of the whole ledger.

    A claim edited with `dataclasses.replace` is judged with its own figures in place of those on
    record, so a verdict can be probed: change what is stated and see what becomes of it.
    """
    known = (known or figures()).replaced(claim)
    checks = tuple(_check(q, claim, known) for q in claim.quantities)
    implied = tuple(_imply(i, known) for i in claim.implies)
    if claim.kind == "glossary":
        wrong = claim.flaw != "none"
        text = f"{claim.flaw} definition" if wrong else ""
        return Judgement("corrected" if wrong else "consistent", text, checks, implied)
    if claim.kind != "quantity":
        return Judgement(claim.kind, "", checks, implied)

    failed = [c.diagnosis for c in checks if not c.holds]
    outcomes = {i.outcome for i in implied}
    # An assumption the text never states can still rescue a claim: that is a tension.
    rescued = any(i.implication.band and i.outcome == "out of band" for i in implied)
    if "impossible" in outcomes or (failed and not rescued):
        verdict = "inconsistent"
    elif failed or "out of band" in outcomes:
        verdict = "tension"
    else:
        verdict = "consistent"
    parts = [i.diagnosis for i in implied if i.outcome != "fits"]
    # A bound that is impossible to meet says the same thing as the implication that shows it.
    parts += failed if verdict == "inconsistent" and "impossible" not in outcomes else []
    if verdict == "inconsistent" and (reading := _read(claim, known)):
        parts.append(reading)
    words = dict.fromkeys(f"prints {q.printed!r}, the figure is in {q.unit}" if q.printed else f"no unit printed: {q.unit}"
                          for q in claim.quantities if q.printed is not None)
    return Judgement(verdict, "; ".join([*parts, *words]), checks, implied)


def tally(claims: tuple[Claim, ...] | None = None) -> dict[str, int]:
    """Count the claims by verdict, in the order of VERDICTS."""
    count = Counter(judge(c).verdict for c in (load() if claims is None else claims))
    return {verdict: count[verdict] for verdict in VERDICTS}
