"""How much arithmetic a forward pass takes, by part: matrix products only, 2 FLOP per multiply-add.

The embedding is a look-up and costs nothing; norms, activations and softmax are left out (they are
bandwidth, not arithmetic). A backward pass costs twice the forward (`backward`).
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs.model import ModelSpec


@dataclass(frozen=True)
class FlopCount:
    """FLOP by part. Projections and scores of attention are apart: only the scores grow with context."""
    total: int
    by_part: dict[str, int]


def pairs(n_tokens: int, context: int, causal: bool, window: int | None = None) -> int:
    """Query-key pairs of n_tokens new tokens after `context` cached ones.

    causal=True counts the pairs a causal mask lets through; False counts the full rectangle, which is
    what operators compute and counters see when the mask is applied afterwards.
    """
    if not causal:
        return n_tokens * (n_tokens + context)
    if window is None:
        return n_tokens * context + n_tokens * (n_tokens + 1) // 2
    return sum(min(context + i + 1, window) for i in range(n_tokens))


def _attention(spec: ModelSpec, kind: str, n: int, context: int, causal: bool) -> tuple[int, int]:
    """(projections, scores) of one layer for one sequence."""
    d, h = spec.d_model, spec.n_heads
    if kind == "linear":
        lin = spec.linear
        keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
        projections = d * (2 * keys + 2 * values + 2 * lin.n_value_heads) + values * d
        state = 3 * lin.n_value_heads * lin.key_dim * lin.value_dim     # read, correct and query the state
        return 2 * n * projections, 2 * n * (state + lin.conv_kernel * (2 * keys + values))
    window = spec.window if kind == "window" else None
    if spec.latent is None:
        q, kv = spec.q_width, spec.kv_width
        projections = 2 * n * (d * q * (2 if spec.attention_gate else 1) + 2 * d * kv + q * d)
        return projections, 2 * pairs(n, context, causal, window) * 2 * q
    m = spec.latent
    width = h * (m.nope_dim + m.rope_dim)
    query = d * width if m.q_rank is None else d * m.q_rank + m.q_rank * width
    own = query + d * (m.kv_rank + m.rope_dim) + h * m.v_dim * d
    up = m.kv_rank * h * (m.nope_dim + m.v_dim)       # keys and values are rebuilt for every cached token
    scores = 2 * pairs(n, context, causal, window) * (width + h * m.v_dim)
    return 2 * (n * own + (n + context) * up), scores


def forward(spec: ModelSpec, batch: int, n_tokens: int, *, causal: bool, context: int = 0) -> FlopCount:
    """FLOP of one forward pass over `batch` sequences of n_tokens new tokens after `context` cached ones.

    `causal` has no default: half the published figures count the full square of scores, half the
    triangle, and they differ by up to two. Logits are computed for every new token.
    """
    d, n = spec.d_model, n_tokens
    mixing = [_attention(spec, kind, n, context, causal) for kind in spec.layer_kinds]
    ups = 2 if spec.gated_ffn else 1
    block = 2 * n * (ups + 1) * d                      # times the width of a feed-forward block
    moe = spec.n_moe_layers
    by_part = {
        "attention": sum(p for p, _ in mixing),
        "scores": sum(s for _, s in mixing),
        "ffn": spec.n_dense_layers * block * spec.d_ff,
        "experts": moe * spec.top_k * block * (spec.d_expert or 0),
        "shared_experts": moe * (block * spec.d_shared + 2 * n * d * spec.shared_gate),
        "router": moe * 2 * n * d * spec.n_experts,
        "head": 2 * n * (spec.d_embed or d) * spec.vocab_size,
    }
    by_part = {part: batch * flop for part, flop in by_part.items()}
    return FlopCount(total=sum(by_part.values()), by_part=by_part)


def prefill(spec: ModelSpec, batch: int, n_tokens: int, *, causal: bool) -> FlopCount:
    """FLOP of reading a prompt of n_tokens."""
    return forward(spec, batch, n_tokens, causal=causal)


def decode(spec: ModelSpec, batch: int, context: int) -> FlopCount:
    """FLOP of one new token a sequence after `context` cached ones (a single row: causal or not is the same,
    except that a window caps what it sees)."""
    return forward(spec, batch, 1, causal=True, context=context)


def backward(forward_count: FlopCount) -> FlopCount:
    """Twice the forward: one product for the gradient of the input, one for that of the weight."""
    return FlopCount(2 * forward_count.total, {part: 2 * f for part, f in forward_count.by_part.items()})


def rule_of_thumb(spec: ModelSpec) -> int:
    """2 N: a multiply and an add for every active parameter. Kaplan et al. 2020, arXiv:2001.08361, section 2.1."""
    return 2 * parameters(spec).active


def training(params_active: float, tokens: float) -> float:
    """6 N D: forward and backward over `tokens`. Kaplan et al. 2020, arXiv:2001.08361, section 2.1."""
    return 6 * params_active * tokens
