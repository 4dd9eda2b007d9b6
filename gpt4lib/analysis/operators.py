"""What one layer asks of one device for one micro-batch: arithmetic, bytes and kernels, before any efficiency."""

from typing import Iterator, NamedTuple

from gpt4lib.analysis import flops
from gpt4lib.analysis.parameters import block, projections
from gpt4lib.specs import ModelSpec, ParallelPlan


class Product(NamedTuple):
    """A family of matrix products: `uses` rows a token through matrices of n_in x n_out, `copies` of which are held."""
    uses: int
    n_in: int
    n_out: int
    copies: float = 1


def products(spec: ModelSpec, kind: str, moe: bool, tp: int = 1, ep: int = 1) -> Iterator[Product]:
    """The matrices of one layer as one rank holds them: columns or rows over tp, experts over ep.

    Embeddings, scores and biases apart; with tp = ep = 1 these are the layer's matrices in full.
    """
    d = spec.d_model
    for n_in, n_out, _ in projections(spec, kind, tp):
        yield Product(1, n_in, n_out)
    if moe:
        yield Product(1, d, spec.n_experts)
        for n_in, n_out, _ in block(spec, spec.d_expert // tp):
            yield Product(spec.top_k, n_in, n_out, spec.n_experts / ep)
        if spec.shared_gate:
            yield Product(1, d, 1)
    if width := (spec.d_shared if moe else spec.d_ff) // tp:
        for n_in, n_out, _ in block(spec, width):
            yield Product(1, n_in, n_out)


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
