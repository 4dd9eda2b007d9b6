"""The problems at the end of each chapter: a hint, a check with a tolerance, an expected value.

Expected values are computed from the library when asked, never stored, so a problem cannot drift
away from the chapter it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs.model import ModelSpec


@dataclass(frozen=True)
class Problem:
    """`expected` gives the right value; an answer within `tolerance` (relative) of it is accepted."""
    hint: str
    expected: Callable[[], float]
    tolerance: float = 0.0


def _gpt4(**changes) -> ModelSpec:
    return ModelSpec.preset("gpt-4").with_(**changes)


def _nearest_heads(head_dim: int, target: float) -> int:
    """The multiple of 8 whose multi-query attention comes closest to `target` parameters."""
    return min(range(8, 512, 8), key=lambda h: abs(
        parameters(_gpt4(n_heads=h, head_dim=head_dim)).by_part["attention"] - target))


PROBLEMS: dict[str, Problem] = {
    "1.1": Problem(
        "Q and O are d x (h*k) each, K and V d x k each; a gated block has three matrices; the head is tied.",
        lambda: parameters(ModelSpec.preset("palm-540b")).total, 0.001),
    "1.2": Problem(
        "Take the total and leave out the 6 of 8 experts a token does not visit, in every layer.",
        lambda: parameters(ModelSpec.preset("mixtral-8x7b")).active, 0.001),
    "1.3": Problem(
        "12 L d^2 = 1.8e12 with L = 120.",
        lambda: (1.8e12 / (12 * 120)) ** 0.5, 0.01),
    "1.4": Problem(
        "Two experts of 220e9 and the 55e9 of attention, against two of 111e9 and the same attention.",
        lambda: (2 * 220e9 + 55e9) / (2 * 111e9 + 55e9), 0.01),
    "1.5": Problem(
        "Only K and V grow: 7 more heads of d x 128, for K and for V, in 120 layers.",
        lambda: parameters(_gpt4(n_kv_heads=8)).by_part["attention"]
        - parameters(_gpt4()).by_part["attention"]),
    "1.6": Problem(
        "Loop over multiples of 8 and keep the one whose attention count is nearest to 55e9.",
        lambda: _nearest_heads(256, 55e9)),
}


def check(problem: str, answer: float | None = None) -> str:
    """Say whether `answer` is right; without one, give the hint.

    Returns one line. Raises ValueError for a problem that does not exist.
    """
    if problem not in PROBLEMS:
        raise ValueError(f"problem {problem!r} does not exist; accepted: {', '.join(PROBLEMS)}")
    p = PROBLEMS[problem]
    if answer is None:
        return f"{problem}  hint: {p.hint}"
    expected = p.expected()
    error = answer / expected - 1
    if abs(error) <= p.tolerance:
        return f"{problem}  ✓ right: {answer:,.6g}"
    if error and answer > 0 and abs(error) > 0.5:
        return f"{problem}  ✗ {answer:,.6g} is {answer / expected:.3g} times what it should be"
    return f"{problem}  ✗ {answer:,.6g} is off by {error:+.2%}; accepted within {p.tolerance:.1%}"
