"""Which of the notes' figures can hold together: sets of relations, and the smallest conflict."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from gpt4lib.ledger.claims import Figures, figures
from gpt4lib.ledger.intervals import Interval, evaluate, names, overlaps

# What a figure can be at all once the notes' value for it is dropped.
_FREE: Interval = (1e-30, 1e30)
_DOMAINS: dict[str, Interval] = {
    "mfu": (1e-9, 1.0),
}


@dataclass(frozen=True)
class Relation:
    """left = right, both expressions over named figures, in one unit."""

    left: str
    right: str
    unit: str


@dataclass(frozen=True)
class Constraint:
    """Relations that must all hold for the notes to be one story."""

    name: str
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Outcome:
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


def _set(name: str, *relations: tuple[str, str, str]) -> Constraint:
    return Constraint(name, tuple(Relation(*r) for r in relations))


_COMPUTE = ("C", "6 * N_active * D", "FLOP")
_TIME = ("C", "n_gpus * days * a100_peak * mfu", "FLOP")
_MONEY = ("cost_train", "n_gpus * days * price_a100", "USD")
_NODE = ("node_params", "at_most(8 * N / L)", "parameters")

CONSTRAINTS = (
    _set("experts, expert size, attention, total", ("N_stated", "N", "parameters")),
    _set("experts per token, expert size, attention, active",
         ("N_active_stated", "N_active", "parameters")),
    _set("active parameters, FLOP per token", ("flop_sparse", "2 * N_active", "FLOP")),
    _set("attention and experts, one width, multi-head",
         ("P_att", "4 * L * d_fit ** 2", "parameters")),
    _set("attention and experts, one width, multi-query",
         ("P_att", "L * (2 * d_fit ** 2 + 2 * d_fit * n_kv * head_dim)", "parameters")),
    _set("tokens, active parameters, training FLOP", _COMPUTE),
    _set("GPUs, days, MFU, training FLOP", _TIME),
    _set("GPUs, days, price per hour, cost", _MONEY),
    _set("the whole A100 run", _COMPUTE, _TIME, _MONEY),
    _set("H100s, days, MFU, training FLOP", ("C", "n_h100 * days_h100 * h100_peak * mfu", "FLOP")),
    _set("batch, top-k, experts, tokens per expert",
         ("expert_tokens", "B_train * k / E", "tokens")),
    _set("training layout, weights per GPU", ("weights_train", "2 * N / (tp * pp_train)", "bytes")),
    _set("tensor by pipeline degree, serving GPUs", ("gpus_infer", "tp_infer * pp_infer", "GPUs")),
    _set("parameters per node, at most 8 layers each", _NODE),
    _set("parameters per node, bytes per GPU",
         ("weights_infer", "2 * node_params / gpus_per_node", "bytes")),
    _set("A100 cost per token, MFU at most 1",
         ("cost_a100", "at_least(2 * N_active * price_a100 / a100_peak)", "USD/token")),
    _set("H100 cost per token, MFU at most 1",
         ("cost_h100", "at_least(2 * N_active * price_h100 / h100_peak)", "USD/token")),
    _set("KV cache, batch, context, multi-query GPT-4",
         ("kv_stated", "kv_mqa * kv_batch * kv_context", "bytes")),
    _set("bytes per visual and text token, IO ratio",
         ("io_ratio", "vision_bytes / text_bytes", "ratio")),
)  # fmt: skip


def _stated(expression: str, known: Figures) -> dict[str, None]:
    found: dict[str, None] = {}
    for name in names(expression):
        if name in known.stated:
            found[name] = None
        elif name in known.derived:
            found |= _stated(known.derived[name], known)
    return found


def _lookup(known: Figures, held: frozenset[str], wide: bool) -> Callable[[str], Interval]:
    """Look up figures, those stated but not `held` freed to all they could be."""
    stated = known.lookup(wide)

    @lru_cache(maxsize=None)
    def find(name: str) -> Interval:
        if name in known.derived:
            return evaluate(known.derived[name], find)
        if name in _DOMAINS and name not in held:
            return _DOMAINS[name]
        if name in known.stated and name not in held:
            return _FREE
        return stated(name)

    return find


def _possible(constraint: Constraint, known: Figures, held: frozenset[str]) -> bool:
    find = _lookup(known, held, wide=True)
    return all(
        overlaps(evaluate(r.left, find), evaluate(r.right, find)) for r in constraint.relations
    )


def evaluate_constraint(constraint: Constraint, known: Figures | None = None) -> Outcome:
    """Evaluate one constraint and, where it fails, find the smallest conflicting subset."""
    known = known or figures()
    found: dict[str, None] = {}
    for relation in constraint.relations:
        found |= _stated(relation.left, known) | _stated(relation.right, known)
    everything = frozenset(found)
    conflict: tuple[str, ...] = ()
    possible = _possible(constraint, known, everything)
    if not possible:
        conflict = next(
            subset
            for size in range(1, len(found) + 1)
            for subset in combinations(found, size)
            if not _possible(constraint, known, frozenset(subset))
        )
    near = _lookup(known, everything, wide=False)
    sides = tuple((evaluate(r.left, near), evaluate(r.right, near)) for r in constraint.relations)
    claims = tuple(dict.fromkeys(known.stated[name][1] for name in conflict or found))
    return Outcome(constraint, sides, possible, tuple(found), conflict, claims)


def constraints(known: Figures | None = None) -> tuple[Outcome, ...]:
    """Evaluate every constraint of the notes."""
    return tuple(evaluate_constraint(c, known) for c in CONSTRAINTS)
