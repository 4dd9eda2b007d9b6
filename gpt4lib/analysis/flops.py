"""How much arithmetic a forward pass takes, by part: matrix products only, 2 FLOP per multiply-add.

An m x k by k x n product is 2 m k n. The embedding is a look-up and costs nothing; norms,
activations, biases and softmax are left out (they are bandwidth, not arithmetic). A mixture pays
for its router, its shared experts and top_k routed ones, never for all. A backward pass costs twice
the forward (`backward`).
"""

from typing import NamedTuple

from gpt4lib.analysis.elementwise import least, most
from gpt4lib.analysis.parameters import parameters, projections
from gpt4lib.specs.model import ModelSpec


class FlopCount(NamedTuple):
    """FLOP by part. Scores are apart from attention's projections: only they grow with context."""
    total: int
    by_part: dict[str, int]


def pairs(n_tokens, context, causal: bool, window: int | None = None):
    """Query-key pairs of n_tokens new tokens after `context` cached ones; both may be arrays.

    causal=True counts the pairs a causal mask lets through, n(n+1)/2 for a fresh sequence; False
    counts the full rectangle, which is what operators compute and counters see when the mask is
    applied afterwards. A windowed layer has cached at most its window.
    """
    if not causal:
        return n_tokens * (n_tokens + (context if window is None else least(context, window)))
    if window is None:
        return n_tokens * context + n_tokens * (n_tokens + 1) // 2
    growing = least(most(window - context, 0), n_tokens)     # rows that see all before them
    return growing * context + growing * (growing + 1) // 2 + (n_tokens - growing) * window


def mixing(spec: ModelSpec, kind: str, n, context, causal: bool, absorbed: bool) -> tuple[int, int]:
    """(projections, scores) of one layer for one sequence."""
    m, once = spec.latent, 2 * n * sum(n_in * n_out for n_in, n_out, _ in projections(spec, kind))
    if kind == "linear":
        lin = spec.linear
        keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
        state = 3 * lin.key_dim * values                                # read, correct, query
        return once, 2 * n * (state + lin.conv_kernel * (2 * keys + values))
    seen = pairs(n, context, causal, spec.window if kind == "window" else None)
    if m is None:
        return once, 2 * seen * spec.q_width * (3 if spec.positions == "relative" else 2)
    if absorbed:                           # the up-projection moves to the queries and the output
        return once, 2 * seen * spec.n_heads * (2 * m.kv_rank + m.rope_dim)
    up = m.kv_rank * spec.n_heads * (m.nope_dim + m.v_dim)              # again for every cached token
    return once + 2 * context * up, 2 * seen * spec.n_heads * (m.nope_dim + m.rope_dim + m.v_dim)


def forward(spec: ModelSpec, batch, n_tokens, *, causal: bool, context=0, absorbed: bool = False) -> FlopCount:
    """FLOP of a forward pass over `batch` sequences of n_tokens new tokens after `context` cached.

    `causal` has no default: half the published figures count the full square of scores, half the
    triangle, and they differ by up to two. Logits are computed for every new token. batch, n_tokens
    and context may be arrays. Latent attention rebuilds keys and values of every cached token,
    unless `absorbed` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), which pays in wider scores
    instead. Sparse indexers are left out and the attention they thin is counted dense; so is the
    projection of relative positions, done once a batch.
    """
    d, n, wide = spec.d_model, n_tokens, spec.d_embed or spec.d_model
    count = {kind: spec.layer_kinds.count(kind) for kind in set(spec.layer_kinds)}
    mixed = {kind: mixing(spec, kind, n, context, causal, absorbed) for kind in count}
    ups = 2 if spec.gated_ffn else 1
    block = 2 * n * (ups + 1) * d                      # times the width of a feed-forward block
    moe = spec.n_moe_layers
    by_part = {
        "embedding": 2 * n * wide * d * (wide != d),   # a look-up; OPT-350m projects it
        "attention": sum(count[kind] * mixed[kind][0] for kind in mixed),
        "scores": sum(count[kind] * mixed[kind][1] for kind in mixed),
        "ffn": spec.n_dense_layers * block * spec.d_ff,
        "experts": moe * spec.top_k * block * (spec.d_expert or 0),
        "shared_experts": moe * (block * spec.d_shared + 2 * n * d * spec.shared_gate),
        "router": moe * 2 * n * d * spec.n_experts,
        "head": 2 * n * wide * (spec.vocab_size + d * (wide != d)),
    }
    by_part = {part: batch * flop for part, flop in by_part.items()}
    return FlopCount(total=sum(by_part.values()), by_part=by_part)


def prefill(spec: ModelSpec, batch, n_tokens, *, causal: bool) -> FlopCount:
    """FLOP of reading a prompt of n_tokens, with logits for each of them."""
    return forward(spec, batch, n_tokens, causal=causal)


def decode(spec: ModelSpec, batch, context, *, absorbed: bool = False) -> FlopCount:
    """FLOP of one new token a sequence after `context` cached ones, so over context + 1 keys.

    A single row is the same causal or not, except that a window caps what it sees.
    """
    return forward(spec, batch, 1, causal=True, context=context, absorbed=absorbed)


def backward(forward_count: FlopCount) -> FlopCount:
    """Twice the forward: one product for the gradient of the input, one for that of the weight."""
    by_part = {part: 2 * flop for part, flop in forward_count.by_part.items()}
    return FlopCount(2 * forward_count.total, by_part)


def rule_of_thumb(spec: ModelSpec) -> int:
    """2 N: a multiply and an add for every active parameter.

    Kaplan et al. 2020, arXiv:2001.08361, section 2.1. Beside the exact count it leaves out the
    scores, and it charges for norms, position tables and (where the head is untied) embedding rows
    that are only looked up.
    """
    return 2 * parameters(spec).active


def training(params_active, tokens):
    """6 N D: forward and backward over `tokens`. Kaplan et al. 2020, section 2.1."""
    return 6 * params_active * tokens
