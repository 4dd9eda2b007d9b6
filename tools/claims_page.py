"""Write claims.md, the ledger as a page of the book: `python tools/claims_page.py [FILE]`."""

import re
import sys
from itertools import groupby
from pathlib import Path

from gpt4lib.ledger.claims import Claim, figures, load
from gpt4lib.ledger.constraints import Outcome, constraints
from gpt4lib.ledger.judge import VERDICTS, judge, tally
from gpt4lib.ledger.render import ICONS, cells
from gpt4lib.ledger.text import interval, value

_INTRO = """\
# The claims, one by one

Below stands every statement of the Chinese notes this book takes apart, {total} of them: what was
said, what follows from the other statements, and whether the two agree. **Every GPT-4 figure here
is an unconfirmed report.** A verdict says whether the notes agree with themselves and with published
facts; it never says that OpenAI built it so.

No verdict was typed. A printed figure stands for every value that rounds to it (25,000 for 24,500
to 25,500), a range for what lies between its ends, a count for itself; the formula that ties it to
the other figures is evaluated over all of those values at once. If the outcome shares a value with
what was stated, the claim is consistent. Zeros that only fill places count as digits up to the
second. The error shown is stated over recomputed, less one.

| Verdict | Meaning | Claims |
|:--|:--|--:|
{tally}

Where a claim fails, the reason is found mechanically: a power of ten that would mend it, a
utilisation above 100 %, another model for which it holds, or the claims it contradicts. The notes
disagree with themselves most where a number crossed a language (万亿 and trillion, cents and
dollars, a count and a rate). *Reported*, *published* and *inferred* say where a figure comes from.
"""

_MEANING = {
    "consistent": "agrees with what the other figures imply",
    "inconsistent": "cannot be true together with them, or at all",
    "tension": "true only under an assumption outside what the text states",
    "underivable": "nothing in the notes leads to it",
    "qualitative": "no figure to check; the chapter shows the mechanism",
    "corrected": "a wrong or incomplete glossary entry, with the definition the book uses",
}


def _cell(text: str) -> str:
    """Escape what Markdown would read as markup inside a table cell."""
    return re.sub(r"([\\|*_<>~$\[\]`])", r"\\\1", text)


def _verdict(verdict: str) -> str:
    return f"[{ICONS[verdict]} {verdict}]{{.verdict .verdict-{verdict}}}"


def _chapters(root: Path) -> dict[int, str]:
    """Return chapter number -> file, for the chapters the book already lists."""
    toc = root / "_toc.yml"
    text = toc.read_text(encoding="utf-8") if toc.exists() else ""
    return {int(n): f"{path}.ipynb" for path, n in re.findall(r"(chapters/(\d\d)_\w+)", text)}


def _row(claim: Claim, chapters: dict[int, str]) -> str:
    judgement = judge(claim)
    stated, recomputed = (
        "<br>".join(map(_cell, lines)) for lines in cells(claim, judgement, errors=True)
    )
    why = [judgement.diagnosis] if judgement.diagnosis else []
    why += [claim.note] if claim.note else []
    why += [f"It follows: {i.diagnosis}." for i in judgement.implied if i.outcome == "fits"]
    text = "<br>".join(_cell(w) for w in why)
    if claim.definition_en and judgement.verdict == "corrected":
        term = f"**{_cell(claim.term_en)}** {_cell(claim.definition_en)}"
        text += f"<br>{term}<br>**{_cell(claim.term_zh)}** {_cell(claim.definition_zh)}"
    name = f"Chapter {claim.chapter}"
    if claim.chapter in chapters:
        name = f"[{name}]({chapters[claim.chapter]})"
    head = f"**[{claim.id}]{{#claim-{claim.id.lower()}}}**"
    said = f"{_cell(claim.en)}<br>{_cell(claim.zh)}"
    status = f"[{claim.status}]{{.status .status-{claim.status}}}"
    return (
        f"| {head} {said}<br>{status} | {_verdict(judgement.verdict)} | {stated} | {recomputed} "
        f"| {text}{'<br>' if text else ''}{name} |"
    )


def _constraint(outcome: Outcome) -> str:
    def links(ids: tuple[str, ...]) -> str:
        return ", ".join(f"[{i}](#claim-{i.lower()})" for i in ids)

    sides = "<br>".join(
        _cell(f"{r.left}: {interval(a, r.unit)}") + "<br>" + _cell(f"against {interval(b, r.unit)}")
        for r, (a, b) in zip(outcome.constraint.relations, outcome.sides, strict=True)
    )
    verdict = "consistent" if outcome.satisfiable else "inconsistent"
    word = "can hold" if outcome.satisfiable else "cannot"
    who = _cell(", ".join(outcome.conflict)) or "–"
    return (
        f"| {_cell(outcome.constraint.name)} | [{ICONS[verdict]} {word}]{{.verdict "
        f".verdict-{verdict}}} | {sides} | {who} | {links(outcome.claims)} |"
    )


def page(root: Path = Path(".")) -> str:
    """Return claims.md as text; `root` is the folder of _toc.yml, which lists the chapters."""
    chapters = _chapters(root)
    counts = tally()
    lines = [
        _INTRO.format(
            total=len(load()),
            tally="\n".join(f"| {_verdict(v)} | {_MEANING[v]} | {counts[v]} |" for v in VERDICTS),
        )
    ]
    for section, rows in groupby(load(), key=lambda c: c.section):
        lines += [
            f"## {section}\n",
            "| Claim | Verdict | Stated | Recomputed (error) | Why |",
            "|:--|:--|:--|:--|:--|",
            *(_row(claim, chapters) for claim in rows),
            "",
        ]
    lines += [
        "## What can be true together\n",
        "A single figure can look right and still be impossible beside its neighbours. Each row is a",
        "set of figures tied by a relation, evaluated over everything they can stand for. Where no",
        "choice satisfies it, the fourth column names the smallest subset that already conflicts,",
        "whatever values the others take.\n",
        "| Together | Verdict | Evaluated | Smallest conflict | Claims |",
        "|:--|:--|:--|:--|:--|",
        *map(_constraint, constraints()),
        "",
        "## Numbers the notes do not state\n",
        "| Name | Value | Source |",
        "|:--|--:|:--|",
        *(
            f"| {_cell(name)} | {_cell(value(c.value, c.unit))} | {_cell(c.source)} |"
            for name, c in figures().constants.items()
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "claims.md")
    target.write_text(page(target.parent), encoding="utf-8")
