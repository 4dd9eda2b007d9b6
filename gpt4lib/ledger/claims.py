"""The statements of the notes as frozen records, and the figures they share."""

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gpt4lib.ledger.intervals import ANY, Interval, evaluate, names, rounding
from gpt4lib.specs import registry

KINDS = ("quantity", "qualitative", "underivable", "glossary")

# Units as printed -> (SI unit, factor).
_UNITS = {
    "day": ("s", 86400.0),
    "GB": ("bytes", 1e9),
    "TB": ("bytes", 1e12),
    "USD/h": ("USD/s", 1 / 3600),
    "cent/ktoken": ("USD/token", 1e-5),
    "USD/ktoken": ("USD/token", 1e-3),
}


@dataclass(frozen=True)
class Figure:
    """A stated value in SI units: as printed (`nominal`) and all it can stand for (`interval`)."""

    nominal: Interval
    interval: Interval

    @classmethod
    def parse(cls, value: int | str | list, unit: str) -> tuple["Figure", str]:
        """Read a value as claims.toml writes it; return the figure and its SI unit."""
        si_unit, factor = _UNITS.get(unit, (unit, 1.0))
        if isinstance(value, list):
            nominal = interval = (float(value[0]), float(value[1]))
        elif isinstance(value, int):
            nominal = interval = (float(value), float(value))
        elif value[0] in "<>":
            bound = float(value[1:])
            nominal = interval = (ANY[0], bound) if value[0] == "<" else (bound, ANY[1])
        else:
            nominal, interval = (float(value),) * 2, rounding(value)
        scaled = [(a * factor, b * factor) for a, b in (nominal, interval)]
        return cls(*scaled), si_unit


@dataclass(frozen=True)
class Quantity:
    """One figure a claim states, and the expression it must equal (None: a premise)."""

    name: str
    figure: Figure
    unit: str
    symbol: str | None = None
    follows: str | None = None
    printed: str | None = None  # the unit word of the notes where it differs; "" where none


@dataclass(frozen=True)
class Reading:
    """Another way to take a claim: other expressions for, or another value of, its figures."""

    name: str
    follows: tuple[tuple[str, str], ...] = ()
    quantity: str | None = None
    figure: Figure | None = None
    subject: bool = False  # the figures are another model's


@dataclass(frozen=True)
class Implication:
    """Something that must also be true if the claim is; without band, limit, whole: shown only."""

    name: str
    unit: str
    follows: str
    band: str | None = None  # values stated elsewhere
    limit: str | None = None  # values that can exist at all
    whole: bool = False


@dataclass(frozen=True)
class Claim:
    """One statement of the notes; `gpt4lib.ledger.judge` computes what it is worth."""

    id: str
    section: str
    zh: str
    en: str
    kind: str
    status: str
    chapter: int
    quantities: tuple[Quantity, ...] = ()
    implies: tuple[Implication, ...] = ()
    readings: tuple[Reading, ...] = ()
    note: str = ""
    term_en: str = ""
    term_zh: str = ""
    flaw: str = ""  # glossary rows: wrong | incomplete | none
    definition_en: str = ""
    definition_zh: str = ""


@dataclass(frozen=True)
class Constant:
    """A number the notes do not state, with its unit and source."""

    value: float
    unit: str
    source: str


class Figures:
    """Every named figure: those the claims state, the constants and the sums of them."""

    def __init__(self, claims, constants: dict[str, Constant], derived: dict[str, str]):
        self.constants, self.derived = constants, derived
        self.stated = {q.symbol: (q, c.id) for c in claims for q in c.quantities if q.symbol}
        self._memo: dict[tuple[str, bool], Interval] = {}

    def replaced(self, claim: Claim) -> "Figures":
        """Return these figures with those of `claim` in place of the ones on record."""
        mine = {q.symbol: (q, claim.id) for q in claim.quantities if q.symbol}
        if all(self.stated.get(symbol) == entry for symbol, entry in mine.items()):
            return self
        other = Figures((), self.constants, self.derived)
        other.stated = self.stated | mine
        return other

    def lookup(self, wide: bool) -> Callable[[str], Interval]:
        """Return name -> interval: as printed, or (`wide`) with all each figure can stand for."""

        def find(name: str) -> Interval:
            if (name, wide) not in self._memo:
                if name in self.stated:
                    figure = self.stated[name][0].figure
                    value = figure.interval if wide else figure.nominal
                elif name in self.constants:
                    value = (self.constants[name].value,) * 2
                elif name in self.derived:
                    value = evaluate(self.derived[name], find)
                else:
                    near = difflib.get_close_matches(name, [*self.stated, *self.constants], 3)
                    raise ValueError(f"no figure named {name!r}; nearest: {', '.join(near)}")
                self._memo[name, wide] = value
            return self._memo[name, wide]

        return find

    def sources(self, expression: str) -> tuple[str, ...]:
        """Return the ids of the claims an expression rests on, through the derived sums."""
        ids: dict[str, None] = {}
        for name in names(expression):
            if name in self.stated:
                ids[self.stated[name][1]] = None
            elif name in self.derived:
                ids |= dict.fromkeys(self.sources(self.derived[name]))
        return tuple(ids)


def _quantity(row: dict, find: Callable[[str], Quantity]) -> Quantity:
    row = dict(row)
    value, unit = row.pop("value"), row.pop("unit")
    if isinstance(value, str) and value.startswith("="):
        figure = Figure(
            *(evaluate(value[1:], lambda n, w=w: getattr(find(n).figure, w))
              for w in ("nominal", "interval"))
        )
    else:
        figure, unit = Figure.parse(value, unit)
    return Quantity(figure=figure, unit=unit, **row)


def _reading(row: dict) -> Reading:
    row = dict(row)
    if "value" in row:
        row["figure"], _ = Figure.parse(row.pop("value"), row.pop("unit"))
    return Reading(**row | {"follows": tuple(row.get("follows", {}).items())})


def _constant(unit: str, value: float = 0, source: str = "", preset: str = "") -> Constant:
    if not preset:
        return Constant(value, unit, source)
    kind, name, *path = preset.split("/")
    found = registry.load(kind, name)
    for key in path:
        found = found[key]
    origin = registry.provenance(kind, name)[path[0]]
    return Constant(found, unit, f"{origin.source} ({origin.status})")


@lru_cache(maxsize=1)
def _ledger() -> tuple[tuple[Claim, ...], Figures]:
    here = Path(__file__).parent
    body = tomllib.loads((here / "claims.toml").read_text(encoding="utf-8"))
    terms = tomllib.loads((here / "glossary.toml").read_text(encoding="utf-8"))
    by_symbol: dict[str, Quantity] = {}
    claims = []
    for row in (*body["claim"], *terms.get("claim", ())):
        section, chapter = body["sections"][row["id"].rstrip("0123456789ab")]
        quantities = tuple(_quantity(q, by_symbol.__getitem__) for q in row.pop("says", ()))
        by_symbol |= {q.symbol: q for q in quantities if q.symbol}
        claims.append(
            Claim(
                section=section,
                quantities=quantities,
                implies=tuple(Implication(**i) for i in row.pop("implies", ())),
                readings=tuple(_reading(r) for r in row.pop("readings", ())),
                **{"status": "reported", "chapter": chapter} | row,
            )
        )
    constants = {name: _constant(**row) for name, row in body["constants"].items()}
    return tuple(claims), Figures(claims, constants, body["derived"])


def load() -> tuple[Claim, ...]:
    """Return all claims of the notes, in the order of the notes, the glossary last."""
    return _ledger()[0]


def figures() -> Figures:
    """Return the figures the claims share."""
    return _ledger()[1]


def claim(id: str) -> Claim:
    """Return one claim by id, e.g. "K4"; raises ValueError naming the nearest ids."""
    by_id = {c.id.lower(): c for c in load()}
    if id.lower() not in by_id:
        near = difflib.get_close_matches(id.lower(), by_id, 3, 0.4) or list(by_id)[:3]
        raise ValueError(
            f"no claim {id!r}; nearest: {', '.join(by_id[n].id for n in near)} "
            f"(`gpt4lib claims` lists all {len(by_id)})"
        )
    return by_id[id.lower()]
