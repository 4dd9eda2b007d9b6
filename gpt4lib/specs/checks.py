"""Checks that pass in silence, or say in one line what was given, what is accepted and the fix."""

import math
from numbers import Real
from typing import Any, Collection


def require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_counts(owner: Any, least: int, *names: str, prefix: str = "") -> None:
    """A count is a plain int; bool, float (NaN included) and str are refused by type."""
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{prefix}{name}={value!r} is not accepted; give an integer >= {least}")


def positive(name: str, value: Any) -> float:
    """The value, if it is a finite number > 0; ValueError with its name otherwise. Strings are not read as numbers."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not accepted; give a finite number > 0")
    return value


def require_known(name: str, value: Any, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not known; accepted: {', '.join(accepted)}")
