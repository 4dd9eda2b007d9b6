"""Which of the notes' figures can hold together: sets of relations, and the smallest conflict."""

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

from gpt4lib.ledger.claims import Figures, figures
from gpt4lib.ledger.intervals import Interval, evaluate, overlaps

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


_COMPUTE = ("C", "6 * N_active * D", "FLOP")
_TIME = ("C", "n_gpus * days * a100_peak * mfu", "FLOP")
_MONEY = ("cost_train", "n_gpus * days * price_a100", "USD")

CONSTRAINTS = tuple(Constraint(name, tuple(Relation(*r) for r in relations)) for name, *relations in (
    ("experts, expert size, attention, total", ("N_stated", "N", "parameters")),
    ("experts per token, expert size, attention, active", ("N_active_stated", "N_active", "parameters")),
    ("active parameters, FLOP per token", ("flop_sparse", "2 * N_active", "FLOP")),
    ("attention and experts, one width, multi-head", ("P_att", "4 * L * d_fit ** 2", "parameters")),
    ("attention and experts, one width, multi-query",
     ("P_att", "L * (2 * d_fit ** 2 + 2 * d_fit * n_kv * head_dim)", "parameters")),
    ("tokens, active parameters, training FLOP", _COMPUTE),
    ("GPUs, days, MFU, training FLOP", _TIME),
    ("GPUs, days, price per hour, cost", _MONEY),
    ("the whole A100 run", _COMPUTE, _TIME, _MONEY),
    ("H100s, days, MFU, training FLOP", ("C", "n_h100 * days_h100 * h100_peak * mfu", "FLOP")),
    ("batch, top-k, experts, tokens per expert", ("expert_tokens", "B_train * k / E", "tokens")),
    ("training layout, weights per GPU", ("weights_train", "2 * N / (tp * pp_train)", "bytes")),
    ("tensor by pipeline degree, serving GPUs", ("gpus_infer", "tp_infer * pp_infer", "GPUs")),
    ("parameters per node, at most 8 layers each", ("node_params", "at_most(8 * N / L)", "parameters")),
    ("parameters per node, bytes per GPU", ("weights_infer", "2 * node_params / gpus_per_node", "bytes")),
    ("A100 cost per token, MFU at most 1", ("cost_a100", "at_least(2 * N_active * price_a100 / a100_peak)", "USD/token")),
    ("H100 cost per token, MFU at most 1", ("cost_h100", "at_least(2 * N_active * price_h100 / h100_peak)", "USD/token")),
    ("KV cache, batch, context, multi-query GPT-4", ("kv_stated", "kv_mqa * kv_batch * kv_context", "bytes")),
    ("bytes per visual and text token, IO ratio", ("io_ratio", "vision_bytes / text_bytes", "ratio")),
))


def evaluate_constraint(constraint: Constraint, known: Figures | None = None) -> Outcome:
    """Evaluate one constraint and, where it fails, find the smallest conflicting subset."""
    known = known or figures()
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
    return tuple(evaluate_constraint(c, known) for c in CONSTRAINTS)
