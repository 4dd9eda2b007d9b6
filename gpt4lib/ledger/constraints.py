"""Which of the notes' figures can hold together: sets of relations, and the smallest conflict."""

from itertools import combinations
from typing import Callable, NamedTuple

from gpt4lib.ledger.claims import Figures, figures
from gpt4lib.ledger.intervals import Interval, evaluate, overlaps
from gpt4lib.specs import registry

# What a figure can be at all once the notes' value for it is dropped.
_FREE: Interval = (1e-30, 1e30)
_DOMAINS: dict[str, Interval] = {"mfu": (1e-9, 1.0)}


class Relation(NamedTuple):
    """left = right, both expressions over named figures, in one unit."""

    left: str
    right: str
    unit: str


class Constraint(NamedTuple):
    """Relations that must all hold for the notes to be one story."""

    name: str
    relations: tuple[Relation, ...]


class Outcome(NamedTuple):
    """A constraint evaluated over all values its figures can stand for.

    `satisfiable` False is a proof: no values in the stated ranges meet the relations. True means
    that interval arithmetic finds no contradiction.
    """

    constraint: Constraint
    sides: tuple[tuple[Interval, Interval], ...]  # left and right as printed, per relation
    satisfiable: bool
    figures: tuple[str, ...]  # stated figures that take part
    conflict: tuple[str, ...]  # the smallest subset that cannot hold whatever the others are
    claims: tuple[str, ...]  # the claims behind the conflict, or behind all figures


def evaluate_constraint(constraint: Constraint, known: Figures) -> Outcome:
    """Evaluate one constraint and, where it fails, find the smallest conflicting subset."""
    found = known.symbols(*(side for r in constraint.relations for side in (r.left, r.right)))

    def sides(find: Callable[[str], Interval]) -> tuple[tuple[Interval, Interval], ...]:
        return tuple((evaluate(r.left, find), evaluate(r.right, find)) for r in constraint.relations)

    def possible(held: tuple[str, ...]) -> bool:
        freed = {name: _DOMAINS.get(name, _FREE) for name in found if name not in held}
        return all(overlaps(left, right) for left, right in sides(known.lookup(wide=True, freed=freed)))

    satisfiable = possible(found)
    subsets = (subset for size in range(1, len(found) + 1) for subset in combinations(found, size))
    conflict = () if satisfiable else next(subset for subset in subsets if not possible(subset))
    return Outcome(constraint, sides(known.lookup(wide=False)), satisfiable, found, conflict, known.sources(*(conflict or found)))


def constraints(known: Figures | None = None) -> tuple[Outcome, ...]:
    """Evaluate every constraint of the notes."""
    known = known or figures()
    table = registry.read("gpt4lib.ledger", "constraints.toml")
    rows = (Constraint(name, tuple(Relation(*row) for row in relations)) for name, relations in table.items())
    return tuple(evaluate_constraint(constraint, known) for constraint in rows)
