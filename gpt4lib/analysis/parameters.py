"""How many parameters a spec has, by part: exact integers, total and active per token."""

from typing import NamedTuple

from gpt4lib.specs import ModelSpec


def linear(n_in: int, n_out: int, bias: bool = False) -> int:
    """Parameters of one matrix n_in x n_out, with or without a bias of n_out."""
    return n_in * n_out + (n_out if bias else 0)


def norm(spec: ModelSpec, width: int) -> int:
    """Parameters of one normalisation: a gain, and a shift for the classic LayerNorm."""
    return 2 * width if spec.norm == "layernorm" else width


class Matrix(NamedTuple):
    """Weights n_in x n_out, those side by side that read the same input, and whether a bias of n_out goes with them."""
    n_in: int
    n_out: int
    bias: bool = False


def block(spec: ModelSpec, width: int, bias: bool = False) -> list[Matrix]:
    """One feed-forward block: up, with a gate if gated, and down. Shazeer 2020, arXiv:2002.05202."""
    return [Matrix(spec.d_model, (2 if spec.gated_ffn else 1) * width, bias), Matrix(width, spec.d_model, bias)]


def projections(spec: ModelSpec, kind: str, tp: int = 1) -> list[Matrix]:
    """The matrices of one layer's attention as each of tp ranks holds them.

    Gated delta rule: q, k, v and gate, two gates a head. Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434,
    section 2.1): query, down, up, out. Otherwise query, key and value, of which a rank has one head at least.
    """
    d, m, bias = spec.d_model, spec.latent, spec.qkv_bias
    if kind == "linear":
        lin = spec.linear
        keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
        return [Matrix(d, (2 * keys + 2 * values + 2 * lin.n_value_heads) // tp), Matrix(values // tp, d)]
    if m is None:
        q, kv = spec.q_width // tp, max(spec.n_kv_heads // tp, 1) * spec.head_dim
        return [Matrix(d, q * (2 if spec.attention_gate else 1) + 2 * kv, bias), Matrix(q, d, spec.out_bias)]
    heads = spec.n_heads // tp
    width = heads * (m.nope_dim + m.rope_dim)
    query = [Matrix(d, width)] if m.q_rank is None else [Matrix(d, m.q_rank, bias), Matrix(m.q_rank, width)]
    return [*query, Matrix(d, m.kv_rank + m.rope_dim, bias), Matrix(m.kv_rank, heads * (m.nope_dim + m.v_dim)),
            Matrix(heads * m.v_dim, d, spec.out_bias)]


def feed_forward(spec: ModelSpec, width: int, bias: bool) -> int:
    return sum(linear(*matrix) for matrix in block(spec, width, bias))


def attention(spec: ModelSpec, kind: str) -> int:
    """One layer's projections and what goes with them; indexers come extra.

    A short convolution and the gates of the delta rule; norms of the latents; norms of queries and keys, sinks. Relative
    positions project a sinusoid to the query width and add two biases per channel (Dai et al. 2019, arXiv:1901.02860,
    section 3.3).
    """
    count, q, lin, m = sum(linear(*matrix) for matrix in projections(spec, kind)), spec.q_width, spec.linear, spec.latent
    if kind == "linear":
        channels = 2 * lin.n_key_heads * lin.key_dim + lin.n_value_heads * lin.value_dim
        return count + channels * lin.conv_kernel + 2 * lin.n_value_heads + lin.value_dim
    if m is not None:
        return count + (m.q_rank or 0) + m.kv_rank
    qk_norm = {"none": 0, "head": 2 * spec.head_dim, "full": q + spec.kv_width}[spec.qk_norm]
    relative = linear(spec.d_model, q) + 2 * q if spec.positions == "relative" else 0
    return count + qk_norm + relative + spec.n_heads * spec.sinks


def indexers(spec: ModelSpec) -> int:
    """All sparse-attention indexers of a model; DeepSeek-V3.2-Exp report, section 2.1."""
    latent = spec.latent
    if latent is None or latent.indexer is None:
        return 0
    ix = latent.indexer
    one = (linear(latent.q_rank or spec.d_model, ix.n_heads * ix.head_dim)
           + linear(spec.d_model, ix.head_dim) + 2 * ix.head_dim + linear(spec.d_model, ix.n_heads))
    return one * (spec.n_layers if ix.layers is None else ix.layers)


class ParameterCount(NamedTuple):
    """Exact parameter counts. `active` counts what one token's forward pass uses: all but the
    routed experts it does not visit. Embedding rows are counted in full, as model cards do."""
    total: int
    active: int
    by_part: dict[str, int]


def parameters(spec: ModelSpec) -> ParameterCount:
    """Count a model's parameters.

    Agrees with `sum(p.numel() for p in model.parameters())` of the Hugging Face implementation of
    every family `ModelSpec.from_hf` reads (a tied head is counted once).
    """
    d, kinds = spec.d_model, spec.layer_kinds
    mixing = sum(kinds.count(kind) * attention(spec, kind) for kind in set(kinds)) + indexers(spec)
    expert = feed_forward(spec, spec.d_expert, spec.expert_bias) if spec.is_moe else 0
    shared = (feed_forward(spec, spec.d_shared, spec.ffn_bias) if spec.d_shared else 0) + (d if spec.shared_gate else 0)
    n_moe = spec.n_moe_layers
    width = spec.d_embed or d
    by_part = {
        "embedding": spec.vocab_size * width + (2 * linear(width, d) if width != d else 0),
        "positions": (spec.context + spec.position_offset) * d if spec.positions == "learned" else 0,
        "attention": mixing,
        "ffn": spec.n_dense_layers * feed_forward(spec, spec.d_ff, spec.ffn_bias) if spec.n_dense_layers else 0,
        "experts": n_moe * spec.n_experts * expert,
        "shared_experts": n_moe * shared,
        "router": n_moe * linear(d, spec.n_experts, spec.router_bias) if n_moe else 0,
        "norms": norm(spec, d) * (spec.norms_per_layer * spec.n_layers + spec.final_norm + spec.embedding_norm),
        "head": (0 if spec.tied else width * spec.vocab_size) + (spec.vocab_size if spec.head_bias else 0),
    }
    total = sum(by_part.values())
    idle = n_moe * (spec.n_experts - spec.top_k) * expert
    return ParameterCount(total=total, active=total - idle, by_part=by_part)
