"""Interval arithmetic over named figures: what a printed number can mean, and what follows."""

import ast
import math
import operator
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import cache

Interval = tuple[float, float]

ANY: Interval = (-math.inf, math.inf)


def rounding(text: str) -> Interval:
    """Return all the values that print as `text`: half a unit of its last significant digit.

    Zeros that only fill places are not significant beyond the second digit, so "25000" stands
    for 24,500 to 25,500, "30" for 29.5 to 30.5 and "3" for 2.5 to 3.5.
    Raises ValueError where `text` is not a decimal number.
    """
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a figure; write a decimal such as '1.8e12'") from None
    digits = number.as_tuple().digits
    significant = max(len("".join(map(str, digits)).rstrip("0")), min(2, len(digits)))
    half = Decimal(5).scaleb(number.adjusted() - significant)
    return float(number - half), float(number + half)


def overlaps(a: Interval, b: Interval) -> bool:
    """Tell whether two intervals share a value (1e-12 relative: float rounding, no more)."""
    slack = 1e-12 * max((abs(x) for x in (*a, *b) if math.isfinite(x)), default=1.0)
    return a[0] <= b[1] + max(slack, 1e-12) and b[0] <= a[1] + max(slack, 1e-12)


def inside(a: Interval, b: Interval) -> bool:
    """Tell whether the whole of `a` lies in `b`."""
    return b[0] <= a[0] and a[1] <= b[1]


def _corners(op: Callable[[float, float], float]) -> Callable[[Interval, Interval], Interval]:
    # Monotone in each argument on the ranges used here, so the extremes are at the corners.
    def apply(a: Interval, b: Interval) -> Interval:
        values = [op(x, y) for x in a for y in b]
        return min(values), max(values)
    return apply


def _divide(a: Interval, b: Interval) -> Interval:
    if b[0] <= 0 <= b[1]:
        raise ValueError(f"division by the interval {b}, which holds 0; bound it away from 0")
    return _corners(operator.truediv)(a, b)


_OPERATORS = {
    ast.Add: lambda a, b: (a[0] + b[0], a[1] + b[1]),
    ast.Sub: lambda a, b: (a[0] - b[1], a[1] - b[0]),
    ast.Mult: _corners(operator.mul),
    ast.Div: _divide,
    ast.Pow: _corners(operator.pow),
}
_FUNCTIONS = {
    "min": lambda *args: (min(a[0] for a in args), min(a[1] for a in args)),
    "max": lambda *args: (max(a[0] for a in args), max(a[1] for a in args)),
    "between": lambda *args: (min(a[0] for a in args), max(a[1] for a in args)),
    "at_least": lambda a: (a[0], math.inf),
    "at_most": lambda a: (-math.inf, a[1]),
}


@cache
def _tree(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(f"cannot read {expression!r}; write names, numbers, + - * / **") from None


def names(expression: str) -> tuple[str, ...]:
    """Return the figures an expression uses, in order of appearance."""
    found = (n.id for n in ast.walk(_tree(expression)) if isinstance(n, ast.Name))
    return tuple(dict.fromkeys(n for n in found if n not in _FUNCTIONS))


def evaluate(expression: str, lookup: Callable[[str], Interval]) -> Interval:
    """Evaluate + - * / **, min, max, between, at_least, at_most over intervals.

    A name that occurs twice is treated as two independent figures, so a result may be wider
    than the truth and never narrower: the ledger errs on the side of the notes.
    Raises ValueError for any other syntax.
    """
    def visit(node: ast.expr) -> Interval:
        match node:
            case ast.Constant(value=int() | float()):
                return float(node.value), float(node.value)
            case ast.Name():
                return lookup(node.id)
            case ast.UnaryOp(op=ast.USub()):
                low, high = visit(node.operand)
                return -high, -low
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](visit(node.left), visit(node.right))
            case ast.Call(func=ast.Name(id=function), keywords=[]) if function in _FUNCTIONS:
                return _FUNCTIONS[function](*(visit(a) for a in node.args))
        raise ValueError(f"{expression!r} uses {ast.unparse(node)!r}; accepted are names, numbers, "
                         f"+ - * / ** and {', '.join(_FUNCTIONS)}")
    return visit(_tree(expression))
