"""Bytes on the wire: what one rank sends in each collective, by the ring algorithm, exactly.

Sources: Patarasu, Yuan 2009, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations";
Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
`size` is the bytes of the whole tensor, `n` the number of ranks; both may be arrays. One rank receives
as much as it sends. A size that n does not divide is padded in practice; the figure here is then not
whole.
"""

from typing import Iterator, NamedTuple

from gpt4lib.analysis.memory import stage_parameters
from gpt4lib.analysis.parameters import linear, norm, parameters
from gpt4lib.specs import ModelSpec, ParallelPlan


def all_gather(size, n):
    """Every rank ends with the whole tensor of `size` bytes, having owned 1/n of it."""
    return size * (n - 1) / n


def reduce_scatter(size, n):
    """Every rank ends with the sum of 1/n of a tensor of `size` bytes."""
    return size * (n - 1) / n


def all_reduce(size, n):
    """Reduce-scatter, then all-gather."""
    return reduce_scatter(size, n) + all_gather(size, n)


def all_to_all(size, n):
    """Every rank keeps 1/n of its `size` bytes and sends the rest away, evenly."""
    return size * (n - 1) / n


def tensor_parallel_layer(tokens, d_model, tp, bytes_each=2):
    """Bytes one rank sends for the forward pass of one layer.

    An all-reduce of the hidden states after attention and one after the feed-forward block (Shoeybi
    et al. 2019, arXiv:1909.08053, section 3). Sequence parallelism replaces each by a
    reduce-scatter and an all-gather, which is the same.
    """
    return 2 * all_reduce(tokens * d_model * bytes_each, tp)


class Term(NamedTuple):
    """Bytes one rank sends in one training step: for which dimension of parallelism, why, and how."""
    dimension: str                   # tp, pp, ep, dp, or all
    what: str
    kind: str                        # all_reduce, all_gather, reduce_scatter, all_to_all, send
    sent: float


def replicated(spec: ModelSpec, plan: ParallelPlan, layer: int) -> int:
    """Parameters of one layer that tensor-parallel ranks copy while each sees a part of their gradient.

    What stands between the two all-reduces of a block and is not split: router, output biases,
    per-head norms, the down-projections of latent attention; with sequence parallelism the norms
    too. Key/value heads that several ranks share come extra.
    """
    d, moe, latent = spec.d_model, spec.is_moe_layer(layer), spec.latent
    count = d * spec.out_bias
    if latent:
        count += linear(d, latent.kv_rank + latent.rope_dim, spec.qkv_bias) + latent.kv_rank
        count += linear(d, latent.q_rank, spec.qkv_bias) + latent.q_rank if latent.q_rank else 0
    elif spec.qk_norm == "head":
        count += 2 * spec.head_dim
    if moe:
        count += linear(d, spec.n_experts, spec.router_bias) + d * spec.shared_gate
    count += d * spec.ffn_bias * (spec.d_shared > 0 if moe else 1)
    return count + plan.sequence_parallel * spec.norms_per_layer * norm(spec, d)


RINGS = {"all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter,
         "all_to_all": all_to_all, "send": lambda size, n: size if n > 1 else 0}


def _term(dimension: str, what: str, kind: str, size, n: int, times=1) -> Term:
    return Term(dimension, what, kind, times * RINGS[kind](size, n))


def _shards(plan: ParallelPlan) -> int:
    """Over how many replicas FSDP has cut a gradient when tensor and pipeline ranks add theirs."""
    return (plan.shard or plan.dp) if plan.zero_stage == 3 else 1


def _tensor_terms(spec, plan, seq_len, stage, act_bytes, gradient_bytes, loss_bytes) -> Iterator[Term]:
    tp, m, layers = plan.tp, plan.n_micro_batches, plan.layers_of(spec.n_layers, stage)
    first, last, tokens = stage == 0, stage == plan.pp - 1, plan.micro_batch * seq_len
    hidden, full = tokens * spec.d_model * act_bytes, plan.recompute == "full"
    again_in, again_out = 2 * full, (2 if spec.norms_per_layer == 4 else 1) * full
    if plan.sequence_parallel:                   # in: gather forward, scatter backward; out: converse
        kinds = (("all_gather", 4 + again_in), ("reduce_scatter", 4 + again_out))
    else:
        kinds = (("all_reduce", 4 + again_out),)
    for kind, times in kinds:
        yield _term("tp", "layers", kind, hidden, tp, len(layers) * m * times)
    for kind, _ in kinds:
        yield _term("tp", "embedding and head", kind, hidden, tp, m * (first + last))
    yield _term("tp", "loss", "all_reduce", tokens * loss_bytes, tp, 3 * m * last)
    copied = sum(replicated(spec, plan, layer) for layer in layers)
    if plan.sequence_parallel:
        copied += first * (norm(spec, spec.d_model) * spec.embedding_norm + parameters(spec).by_part["positions"])
        copied += last * norm(spec, spec.d_model) * spec.final_norm
    a_gradient = gradient_bytes / _shards(plan)
    yield _term("tp", "copied weights", "all_reduce", copied * a_gradient, tp)
    if spec.latent is None and spec.n_kv_heads < tp:
        shared = len(layers) * 2 * linear(spec.d_model, spec.head_dim, spec.qkv_bias)
        yield _term("tp", "shared key/value heads", "all_reduce", shared * a_gradient, tp // spec.n_kv_heads)


def _pipeline_terms(spec, plan, seq_len, stage, act_bytes, gradient_bytes) -> Iterator[Term]:
    first, last = stage == 0, stage == plan.pp - 1
    hidden = plan.micro_batch * seq_len * spec.d_model * act_bytes // (plan.tp if plan.sequence_parallel else 1)
    links = (plan.n_chunks - last) + (plan.n_chunks - first)            # activations on, gradients back
    yield _term("pp", "hidden states", "send", hidden, plan.pp, plan.n_micro_batches * links)
    if spec.tied and (first or last) and plan.pp > 1:
        rows = -(-spec.vocab_size // plan.tp) * spec.d_model
        yield _term("pp", "tied embedding", "all_reduce", rows * gradient_bytes / _shards(plan), 2)


def _expert_terms(spec, plan, seq_len, stage, act_bytes, balance_bytes) -> Iterator[Term]:
    tokens, full = plan.micro_batch * seq_len, plan.recompute == "full"
    layers = plan.n_micro_batches * sum(map(spec.is_moe_layer, plan.layers_of(spec.n_layers, stage)))
    yield _term("ep", "counts", "all_to_all", spec.n_experts * 8, plan.ep, layers * (1 + full))
    rows = tokens * spec.top_k * spec.d_model * act_bytes
    yield _term("ep", "rows", "all_to_all", rows, plan.ep, layers * (4 + 2 * full))
    yield _term("dp", "balance loss", "all_reduce", (spec.n_experts + 1) * balance_bytes, plan.dp, layers)


def _replica_terms(spec, plan, stage, weight_bytes, gradient_bytes) -> Iterator[Term]:
    count = stage_parameters(spec, plan, stage)
    apart = count["experts"] * (plan.ep > 1)
    for what, held, n in (("experts", apart, plan.dp // plan.ep), ("weights", sum(count.values()) - apart, plan.dp)):
        padded = -(-held // n) * n
        if plan.zero_stage == 3:
            shards, copies = plan.shard or n, n // (plan.shard or n)
            passes = plan.n_micro_batches * (2 if plan.pp == 1 else 1)
            yield _term("dp", what, "all_gather", held * weight_bytes, shards, passes)
            yield _term("dp", what, "reduce_scatter", held * gradient_bytes, shards)
            yield _term("dp", what, "all_reduce", held * gradient_bytes / shards, copies)
        elif plan.zero_stage:
            yield _term("dp", what, "reduce_scatter", padded * gradient_bytes, n)
            yield _term("dp", what, "all_gather", padded * weight_bytes, n)
        else:
            yield _term("dp", what, "all_reduce", padded * gradient_bytes, n)


def training_step(spec: ModelSpec, plan: ParallelPlan, seq_len: int, stage: int = 0, *, act_bytes=2,
                  weight_bytes=2, gradient_bytes=2, loss_bytes=4, balance: bool = False) -> list[Term]:
    """What a rank of a pipeline stage sends in one step, term by term.

    Tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053, section 3, forward and backward, and
    again what full recomputation repeats; it stops at the last tensor it needs, so a block's second
    all-reduce is not run twice. Experts: rows there and back in both passes, evenly routed.
    Replicas: an all-reduce of the gradients, under ZeRO-1 a reduce-scatter of them and an
    all-gather of the weights. Stage 3 gathers the weights for each pass of a micro-batch (once where
    a pipeline keeps them until its backward pass) and scatters the gradients once a step, which
    leaves them whole until then; it is exact where first dimensions divide by the shards. `balance`
    adds the counts of the experts' balance loss. Context parallelism is not among what runs here, and refused.
    """
    if plan.cp > 1:
        raise ValueError(f"cp={plan.cp} is not counted here; give 1")
    stages = [_tensor_terms(spec, plan, seq_len, stage, act_bytes, gradient_bytes, loss_bytes),
              _pipeline_terms(spec, plan, seq_len, stage, act_bytes, gradient_bytes),
              _expert_terms(spec, plan, seq_len, stage, act_bytes, loss_bytes if balance else 0),
              _replica_terms(spec, plan, stage, weight_bytes, gradient_bytes),
              [_term("all", "loss and norm", "all_reduce", 3 * 8, plan.n_devices)]]
    return [term for terms in stages for term in terms if term.sent]
