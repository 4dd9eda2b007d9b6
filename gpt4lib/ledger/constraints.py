"""Which of the notes' figures can hold together: sets of figures under one relation each."""

from dataclasses import dataclass
from itertools import combinations

from gpt4lib.ledger.claims import Figures, figures
from gpt4lib.ledger.intervals import Interval, evaluate, names, overlaps


@dataclass(frozen=True)
class Constraint:
    """A relation `left` = `right` between figures; `free` gives others room to move.

    `free` maps a figure to all the values it can take at all when the notes' value is dropped.
    """

    name: str
    left: str
    right: str
    free: tuple[tuple[str, str], ...]
    unit: str = "ratio"


@dataclass(frozen=True)
class Outcome:
    """A constraint evaluated: both sides over all that the figures can stand for."""

    constraint: Constraint
    left: Interval
    right: Interval
    satisfiable: bool
    conflict: tuple[str, ...]  # the smallest set of figures that cannot all hold; () if none
    claims: tuple[str, ...]  # the claims that state the figures


_ANY_COUNT = "between(1, 1e30)"
_ANY_SHARE = "between(1e-9, 1)"
_ANY_MONEY = "between(1e-12, 1e15)"
