"""The statements of the notes as frozen records, and the figures they share."""

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Callable, Mapping, NamedTuple

from gpt4lib.ledger.intervals import ANY, Interval, evaluate, names, rounding
from gpt4lib.specs import registry

KINDS = ("quantity", "qualitative", "underivable", "glossary")

# Units as printed -> (SI unit, factor).
_UNITS = {"day": ("s", 86400.0), "GB": ("bytes", 1e9), "TB": ("bytes", 1e12), "USD/h": ("USD/s", 1 / 3600),
          "cent/ktoken": ("USD/token", 1e-5), "USD/ktoken": ("USD/token", 1e-3)}


class Figure(NamedTuple):
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
            nominal = interval = (float(value),) * 2
        elif value[0] in "<>":
            bound = float(value[1:])
            nominal = interval = (ANY[0], bound) if value[0] == "<" else (bound, ANY[1])
        else:
            nominal, interval = (float(value),) * 2, rounding(value)
        return cls(*((a * factor, b * factor) for a, b in (nominal, interval))), si_unit


@dataclass(frozen=True)
class Quantity:
    """One figure a claim states, and the expression it must equal (None: a premise)."""

    name: str
    figure: Figure
    unit: str
    symbol: str | None = None
    follows: str | None = None
    printed: str | None = None  # the unit word of the notes where it differs; "" where none


class Reading(NamedTuple):
    """Another way to take a claim: other expressions for, or another value of, its figures."""

    name: str
    follows: tuple[tuple[str, str], ...] = ()
    quantity: str | None = None
    figure: Figure | None = None
    subject: bool = False  # the figures are another model's


class Implication(NamedTuple):
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


class Constant(NamedTuple):
    """A number the notes do not state, with its unit and source."""

    value: float
    unit: str
    source: str


class Figures:
    """Every named figure: those the claims state, the constants and the sums of them."""

    def __init__(self, claims, constants: dict[str, Constant], derived: dict[str, str]):
        self.constants, self.derived = constants, derived
        self.stated = {q.symbol: (q, c.id) for c in claims for q in c.quantities if q.symbol}

    def replaced(self, claim: Claim) -> "Figures":
        """Return these figures with those of `claim` in place of the ones on record."""
        other = Figures([claim], self.constants, self.derived)
        other.stated = self.stated | other.stated
        return other

    def lookup(self, wide: bool, freed: Mapping[str, Interval] = {}) -> Callable[[str], Interval]:
        """Return name -> interval: as printed, or (`wide`) with all each figure can stand for, or as `freed` has it."""
        @cache
        def find(name: str) -> Interval:
            if name in freed:
                return freed[name]
            if name in self.stated:
                figure = self.stated[name][0].figure
                return figure.interval if wide else figure.nominal
            if name in self.constants:
                return (self.constants[name].value,) * 2
            if name in self.derived:
                return evaluate(self.derived[name], find)
            near = difflib.get_close_matches(name, [*self.stated, *self.constants], 3)
            raise ValueError(f"no figure named {name!r}; nearest: {', '.join(near)}")
        return find

    def symbols(self, *expressions: str) -> tuple[str, ...]:
        """Return the stated figures that expressions rest on, through the derived sums."""
        found: dict[str, None] = {}
        for name in (n for expression in expressions for n in names(expression)):
            if name in self.stated:
                found[name] = None
            elif name in self.derived:
                found |= dict.fromkeys(self.symbols(self.derived[name]))
        return tuple(found)

    def sources(self, *expressions: str) -> tuple[str, ...]:
        """Return the ids of the claims that expressions rest on."""
        return tuple(dict.fromkeys(self.stated[name][1] for name in self.symbols(*expressions)))


def _quantity(known: dict[str, Quantity], value: int | str | list, unit: str, **rest) -> Quantity:
    if isinstance(value, str) and value.startswith("="):
        figure = Figure(*(evaluate(value[1:], lambda name, end=end: getattr(known[name].figure, end))
                          for end in ("nominal", "interval")))
    else:
        figure, unit = Figure.parse(value, unit)
    return Quantity(figure=figure, unit=unit, **rest)


def _reading(follows: Mapping[str, str] = {}, **row) -> Reading:
    if "value" in row:
        row["figure"], _ = Figure.parse(row.pop("value"), row.pop("unit"))
    return Reading(follows=tuple(follows.items()), **row)


def _constant(unit: str, value: float = 0, source: str = "", preset: str = "") -> Constant:
    if not preset:
        return Constant(value, unit, source)
    kind, name, *path = preset.split("/")
    found = registry.load(kind, name)
    for key in path:
        found = found[key]
    origin = registry.provenance(kind, name)[path[0]]
    return Constant(found, unit, f"{origin.source} ({origin.status})")


@cache
def _ledger() -> tuple[tuple[Claim, ...], Figures]:
    body, terms = (registry.read("gpt4lib.ledger", file) for file in ("claims.toml", "glossary.toml"))
    known: dict[str, Quantity] = {}
    claims = []
    for row in (*body["claim"], *terms["claim"]):
        section, chapter = body["sections"][row["id"].rstrip("0123456789ab")]
        given = {"section": section, "status": "reported", "chapter": chapter, **row}
        quantities = tuple(_quantity(known, **q) for q in given.pop("says", ()))
        known |= {q.symbol: q for q in quantities if q.symbol}
        given |= {"quantities": quantities, "implies": tuple(Implication(**i) for i in row.get("implies", ())),
                  "readings": tuple(_reading(**r) for r in row.get("readings", ()))}
        claims.append(Claim(**given))
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
        raise ValueError(f"no claim {id!r}; nearest: {', '.join(by_id[n].id for n in near)} "
                         f"(`gpt4lib claims` lists all {len(by_id)})")
    return by_id[id.lower()]
