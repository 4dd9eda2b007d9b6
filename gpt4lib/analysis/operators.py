"""What one layer asks of one device for one micro-batch: arithmetic, bytes and kernels, before any efficiency."""

from typing import Iterator, NamedTuple

from gpt4lib.analysis import flops
from gpt4lib.specs import ModelSpec, ParallelPlan


class Product(NamedTuple):
    """A family of matrix products: `uses` rows a token through matrices of n_in x n_out, `copies` of which are held."""
    uses: float
    n_in: float
    n_out: float
    copies: float = 1


def products(spec: ModelSpec, kind: str, moe: bool, tp: int = 1, ep: int = 1) -> Iterator[Product]:
    """The matrices of one layer as one rank holds them: columns or rows over tp, experts over ep.

    Embeddings, scores and biases apart; with tp = ep = 1 these are the layer's matrices in full.
    """
    d, m = spec.d_model, spec.latent
    if kind == "linear":
        lin = spec.linear
        keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
        yield Product(1, d, (2 * keys + 2 * values + 2 * lin.n_value_heads) / tp)
        yield Product(1, values / tp, d)
    elif m is None:
        kv = max(spec.n_kv_heads / tp, 1) * spec.head_dim
        yield Product(1, d, spec.q_width * (2 if spec.attention_gate else 1) / tp + 2 * kv)
        yield Product(1, spec.q_width / tp, d)
    else:
        heads = spec.n_heads / tp
        width = heads * (m.nope_dim + m.rope_dim)
        yield from [Product(1, d, width)] if m.q_rank is None else [Product(1, d, m.q_rank), Product(1, m.q_rank, width)]
        yield Product(1, d, m.kv_rank + m.rope_dim)
        yield Product(1, m.kv_rank, heads * (m.nope_dim + m.v_dim))
        yield Product(1, heads * m.v_dim, d)
    ups = 2 if spec.gated_ffn else 1
    if moe:
        yield Product(1, d, spec.n_experts)
        yield Product(spec.top_k, d, ups * spec.d_expert / tp, spec.n_experts / ep)
        yield Product(spec.top_k, spec.d_expert / tp, d, spec.n_experts / ep)
        if spec.shared_gate:
            yield Product(1, d, 1)
    width = (spec.d_shared if moe else spec.d_ff) / tp
    if width:
        yield Product(1, d, ups * width)
        yield Product(1, width, d)


class Work(NamedTuple):
    """One layer, one micro-batch, one device, forward. Elements are numbers of 16 bits."""
    flop: float                      # of the matrix products
    score_flop: float                # of queries with keys and of weights with values
    activations: float               # elements the products read and write
    weights: float                   # elements of the matrices
    pointwise: float                 # elements that norms, sums, activations and rotations read and write
    scores: float                    # elements of the score matrix, where attention writes it out
    kernels: int                     # separate operators
    hidden: float                    # elements of the hidden state that leave a block


def layer(spec: ModelSpec, kind: str, moe: bool, plan: ParallelPlan, seq_len: int, fused: bool) -> Work:
    """A layer's work. `fused`: attention keeps its scores on the chip and skips the masked half (Dao et al. 2022,
    arXiv:2205.14135); otherwise the full square is computed and written out.

    Pointwise operators, two norms, two residual sums, a rotation and an activation function, each read their
    inputs and write their output once. Sequence parallelism splits those that tensor parallelism repeats
    (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
    """
    tp, d = plan.tp, spec.d_model
    tokens = plan.micro_batch * seq_len / plan.cp
    matrices = list(products(spec, kind, moe, tp, plan.ep))
    ups = 2 if spec.gated_ffn else 1
    wide = spec.d_shared + spec.top_k * spec.d_expert if moe else spec.d_ff
    whole = 10 * d / (tp if plan.sequence_parallel else 1) + (4 * spec.top_k * d if moe else 0)
    rotated = 2 * (spec.q_width / tp + max(spec.n_kv_heads / tp, 1) * spec.head_dim) if spec.positions == "rotary" else 0
    causal = fused or kind != "full"
    score_flop = plan.micro_batch * flops.mixing(spec, kind, seq_len, 0, causal, False)[1] / plan.cp / tp
    pairs = flops.pairs(seq_len, 0, causal, spec.window if kind == "window" else None)
    return Work(
        flop=sum(2 * tokens * p.uses * p.n_in * p.n_out for p in matrices), score_flop=score_flop,
        activations=sum(tokens * p.uses * (p.n_in + p.n_out) for p in matrices),
        weights=sum(p.n_in * p.n_out * p.copies for p in matrices),
        pointwise=tokens * (whole + (ups + 1) * wide / tp + rotated),
        scores=0 if fused or kind == "linear" else plan.micro_batch * pairs * spec.n_heads / tp / plan.cp,
        kernels=len(matrices) + 16 + 6 * moe, hidden=tokens * d)
