"""How many parameters a spec has, by part: exact integers, total and active per token."""

from dataclasses import dataclass

from gpt4lib.specs.model import LinearAttention, LatentAttention, ModelSpec


def linear(n_in: int, n_out: int, bias: bool = False) -> int:
    """Parameters of one matrix n_in x n_out, with or without a bias of n_out."""
    return n_in * n_out + (n_out if bias else 0)


def norm(spec: ModelSpec, width: int) -> int:
    """Parameters of one normalisation: a gain, and a shift for the classic LayerNorm."""
    return 2 * width if spec.norm == "layernorm" else width


def feed_forward(spec: ModelSpec, width: int, bias: bool) -> int:
    """One feed-forward block: up and down, plus a gate if gated. Shazeer 2020, arXiv:2002.05202."""
    ups = 2 if spec.gated_ffn else 1
    return ups * linear(spec.d_model, width, bias) + linear(width, spec.d_model, bias)


def attention(spec: ModelSpec) -> int:
    """Softmax attention with separate query, key, value and output projections.

    Relative positions project a sinusoid to the query width and add two biases per channel (Dai et al. 2019,
    arXiv:1901.02860, section 3.3).
    """
    d, q, kv = spec.d_model, spec.q_width, spec.kv_width
    query = linear(d, q * (2 if spec.attention_gate else 1), spec.qkv_bias)
    key_value = 2 * linear(d, kv, spec.qkv_bias)
    qk_norm = {"none": 0, "head": 2 * spec.head_dim, "full": q + kv}[spec.qk_norm]
    relative = linear(d, q) + 2 * q if spec.positions == "relative" else 0
    sinks = spec.n_heads if spec.sinks else 0
    return query + key_value + linear(q, d, spec.out_bias) + qk_norm + relative + sinks


def latent_attention(spec: ModelSpec, latent: LatentAttention) -> int:
    """Multi-head latent attention; DeepSeek-V2, arXiv:2405.04434, section 2.1. Indexers come extra."""
    d, h, bias = spec.d_model, spec.n_heads, spec.qkv_bias
    width = h * (latent.nope_dim + latent.rope_dim)
    query = linear(d, width) if latent.q_rank is None else (
        linear(d, latent.q_rank, bias) + latent.q_rank + linear(latent.q_rank, width))
    down = linear(d, latent.kv_rank + latent.rope_dim, bias) + latent.kv_rank
    up = linear(latent.kv_rank, h * (latent.nope_dim + latent.v_dim))
    return query + down + up + linear(h * latent.v_dim, d, spec.out_bias)


def indexers(spec: ModelSpec) -> int:
    """All sparse-attention indexers of a model; DeepSeek-V3.2-Exp report, section 2.1."""
    latent = spec.latent
    if latent is None or latent.indexer is None:
        return 0
    ix = latent.indexer
    one = (linear(latent.q_rank or spec.d_model, ix.n_heads * ix.head_dim)
           + linear(spec.d_model, ix.head_dim) + 2 * ix.head_dim + linear(spec.d_model, ix.n_heads))
    return one * (spec.n_layers if ix.layers is None else ix.layers)


def linear_attention(spec: ModelSpec, lin: LinearAttention) -> int:
    """Gated delta-rule layer: q, k, v and gate projections, two per-head gates, a short convolution."""
    d = spec.d_model
    keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
    projections = linear(d, 2 * keys + 2 * values) + linear(d, 2 * lin.n_value_heads) + linear(values, d)
    convolution = (2 * keys + values) * lin.conv_kernel
    return projections + convolution + 2 * lin.n_value_heads + lin.value_dim


@dataclass(frozen=True)
class ParameterCount:
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
    n_linear = kinds.count("linear")
    softmax = latent_attention(spec, spec.latent) if spec.latent else attention(spec)
    mixing = (len(kinds) - n_linear) * softmax + indexers(spec)
    if n_linear:
        mixing += n_linear * linear_attention(spec, spec.linear)

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
