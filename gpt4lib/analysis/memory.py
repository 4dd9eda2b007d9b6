"""How many bytes: weights, KV cache, and what one device holds while training or serving."""

from dataclasses import replace
from typing import Callable, NamedTuple

from gpt4lib.analysis.elementwise import least
from gpt4lib.analysis.parameters import linear, parameters
from gpt4lib.analysis.pipeline import in_flight
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan, dtype_bytes

# An fp32 master copy and two fp32 moments; Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1.
ADAM_BYTES = 12


def weight_bytes(spec: ModelSpec, dtype: str = "bf16") -> float:
    """Bytes of all parameters in one dtype."""
    return parameters(spec).total * dtype_bytes(dtype)


def kv_cache_bytes(spec: ModelSpec, batch, context, dtype: str = "bf16", tp: int = 1):
    """KV-cache bytes of `batch` sequences of `context` tokens, all layers, on one of tp ranks.

    Ordinary attention keeps a key and a value of n_kv_heads * head_dim a token; below tp heads the
    heads are replicated, so a rank never holds less than one. Latent attention keeps kv_rank +
    rope_dim, whole on every rank. A windowed layer keeps at most its window. A linear layer keeps a
    state instead: none here, see `linear_state_bytes`. batch and context may be arrays.
    """
    heads = -(-spec.n_kv_heads // tp)
    latent = spec.latent
    a_token = latent.kv_rank + latent.rope_dim if latent else 2 * heads * spec.head_dim
    kinds = spec.layer_kinds
    kept = kinds.count("full") * context
    if "window" in kinds:
        kept = kept + kinds.count("window") * least(context, spec.window)
    return batch * a_token * kept * dtype_bytes(dtype)


def linear_state_bytes(spec: ModelSpec, batch, dtype: str = "fp32", tp: int = 1):
    """Bytes of the states of linear-attention layers, on one of tp ranks, whatever the context.

    The last few tokens that the short convolution looks back on are counted too.
    """
    lin = spec.linear
    if lin is None:
        return 0
    keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
    state = lin.key_dim * values + (lin.conv_kernel - 1) * (2 * keys + values)
    return batch * spec.layer_kinds.count("linear") * state // tp * dtype_bytes(dtype)


class MemoryUse(NamedTuple):
    """Bytes on the fullest device, by part."""
    by_part: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.by_part.values())

    def fits(self, device: DeviceSpec) -> bool:
        """Whether the parts fit, with nothing kept back for the framework."""
        return self.total <= device.memory_bytes


def stage_spec(spec: ModelSpec, plan: ParallelPlan, stage: int) -> ModelSpec:
    """What one device of a pipeline stage holds, itself written as a ModelSpec.

    Its layers are some of the model's; tensor parallelism leaves it 1/tp of the heads and of
    every feed-forward width, expert parallelism 1/ep of the experts. Key/value heads fewer than tp
    are replicated.
    """
    held, tp = plan.layers_of(spec.n_layers, stage), plan.tp
    moe = spec.moe_layers and tuple(i for i, layer in enumerate(held) if layer in spec.moe_layers)
    lin, latent = spec.linear, spec.latent
    if lin is not None and "linear" in spec.layer_kinds:
        lin = replace(lin, n_key_heads=lin.n_key_heads // tp, n_value_heads=lin.n_value_heads // tp)
    if latent is not None and latent.indexer is not None and latent.indexer.layers is not None:
        share = -(-latent.indexer.layers * len(held) // spec.n_layers)
        latent = replace(latent, indexer=replace(latent.indexer, layers=share))
    return replace(
        spec, n_layers=len(held), layer_kinds=tuple(spec.layer_kinds[i] for i in held), moe_layers=moe,
        n_heads=spec.n_heads // tp, n_kv_heads=max(spec.n_kv_heads // tp, 1), vocab_size=-(-spec.vocab_size // tp), linear=lin,
        latent=latent, n_experts=spec.n_experts // plan.ep, top_k=min(spec.top_k, spec.n_experts // plan.ep),
        d_ff=spec.d_ff // tp, d_expert=spec.d_expert and spec.d_expert // tp, d_shared=spec.d_shared // tp,
        embedding_norm=spec.embedding_norm and stage == 0, final_norm=spec.final_norm and stage == plan.pp - 1)


def stage_parameters(spec: ModelSpec, plan: ParallelPlan, stage: int) -> dict[str, int]:
    """Parameters on one device of a stage, by part.

    Routers, norms and position tables are whole on every tensor-parallel rank; a tied head on
    another stage than the embedding is a copy of it.
    """
    local = stage_spec(spec, plan, stage)
    count = dict(parameters(local).by_part)
    count["router"] = local.n_moe_layers * linear(spec.d_model, spec.n_experts, spec.router_bias)
    if stage == plan.pp - 1 and spec.tied and plan.pp > 1:
        count["head"] += count["embedding"]
    if stage > 0:
        count["embedding"] = count["positions"] = 0
    if stage < plan.pp - 1:
        count["head"] = 0
    return count


def distinct_stages(spec: ModelSpec, plan: ParallelPlan) -> list[int]:
    """The stages worth looking at: of those alike, the first, which holds the most in flight.

    The first and the last are always there, for the embedding and the head.
    """
    seen, stages = set(), []
    for stage in range(plan.pp):
        held = plan.layers_of(spec.n_layers, stage)
        kind = tuple((spec.layer_kinds[i], spec.is_moe_layer(i)) for i in held)
        if stage in (0, plan.pp - 1) or kind not in seen:
            stages.append(stage)
        if stage:
            seen.add(kind)
    return stages


def device_parameters(spec: ModelSpec, plan: ParallelPlan) -> int:
    """Parameters on the device that holds most."""
    plan.check(spec)
    return max(sum(stage_parameters(spec, plan, s).values()) for s in distinct_stages(spec, plan))


def _held(count: dict[str, int], plan: ParallelPlan, bytes_each: float, from_stage: int) -> float:
    """Bytes of something every parameter has, which ZeRO shards from a stage on.

    Experts spread over ep ranks have only dp / ep replicas left to shard over.
    """
    apart = count["experts"] if plan.ep > 1 else 0
    rest = sum(count.values()) - apart
    if plan.zero_stage < from_stage:
        return (rest + apart) * bytes_each
    replicas = plan.shard or plan.dp * plan.cp
    return (-(-rest // replicas) - (-apart * plan.ep // replicas)) * bytes_each


def optimizer_bytes(count: dict[str, int], plan: ParallelPlan, dtype: str = "bf16") -> float:
    """Bytes of Adam's master weights and moments for a device's parameters by part.

    Whole fp32 weights are their own master. Under ZeRO the master is counted apart, as in Rajbhandari
    et al.; FSDP keeps it in place of sharded 16-bit weights, a little less.
    """
    master = 0 if dtype == "fp32" and plan.zero_stage == 0 else 4
    return _held(count, plan, ADAM_BYTES - 4 + master, 1)


def state(count: dict[str, int], plan: ParallelPlan, dtype: str, gradient_dtype: str) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer for these parameters."""
    return {"weights": _held(count, plan, dtype_bytes(dtype), 3),
            "gradients": _held(count, plan, dtype_bytes(gradient_dtype), 2),
            "optimizer": optimizer_bytes(count, plan, dtype)}


def _fullest(spec: ModelSpec, plan: ParallelPlan, held: Callable[[int], dict[str, float]]) -> MemoryUse:
    """The most that a stage's device holds, of what `held` says of a stage."""
    plan.check(spec)
    return max((MemoryUse(held(stage)) for stage in distinct_stages(spec, plan)), key=lambda use: use.total)


def training_state(spec: ModelSpec, plan: ParallelPlan, dtype: str = "bf16", gradient_dtype: str = "bf16") -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on the fullest device.

    Adam, 12 bytes a parameter. ZeRO stage 1 shards it over dp * cp, stage 2 the gradients too,
    stage 3 the weights too (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1). Mind
    `gradient_dtype`: fp32 ones, Megatron-LM's default beside bf16 weights,
    double their part.
    """
    return _fullest(spec, plan, lambda stage: state(stage_parameters(spec, plan, stage), plan, dtype, gradient_dtype)).by_part


def _kept(spec: ModelSpec, layer: int, seq_len: int) -> tuple[int, int, int]:
    """(whole, split, scores): 16-bit elements one token leaves in one layer. `whole` are as wide as
    the model on every tensor-parallel rank, `split` and `scores` divide over the ranks."""
    d, kind = spec.d_model, spec.layer_kinds[layer]
    whole, scores = 4 * d, 0                              # inputs of two norms and of two blocks
    if kind == "linear":
        lin = spec.linear
        keys, values = lin.n_key_heads * lin.key_dim, lin.n_value_heads * lin.value_dim
        split = 2 * (2 * keys + values) + 2 * values     # q, k, v twice: convolution
    else:
        scores = spec.n_heads * (min(seq_len, spec.window) if kind == "window" else seq_len)
        if spec.latent:
            m = spec.latent
            whole += (m.q_rank or 0) + m.kv_rank + m.rope_dim
            split = 2 * spec.n_heads * (m.nope_dim + m.rope_dim + m.v_dim)       # q, k; v, output
        else:
            split = (2 + spec.attention_gate) * spec.q_width + 2 * spec.kv_width
    kept_of_width = 3 if spec.gated_ffn else 2            # inputs and output of the activation
    if spec.is_moe_layer(layer):
        # A routed token is copied to each of its experts; the answers serve the gate's gradient.
        whole += 2 * spec.top_k * d + 2 * spec.n_experts  # the router's logits are fp32
        return whole, split + kept_of_width * (spec.top_k * spec.d_expert + spec.d_shared), scores
    return whole, split + kept_of_width * spec.d_ff, scores


def layer_activation_bytes(spec: ModelSpec, plan: ParallelPlan, seq_len: int, layer: int = 0,
                           dropout: bool = False, fused: bool = False) -> float:
    """Bytes one layer keeps for the backward pass of one micro-batch, in 16-bit.

    Korthikanti et al. 2022, arXiv:2205.05198, equations 1-4 and section 5, written out per tensor
    so that it also covers grouped heads, windows, gated blocks and experts (which are taken as
    evenly loaded). Their 34 + 5as/h is multi-head attention, a 4h block and dropout=True: two masks
    a token of one byte a channel, and a mask and a second copy of the scores. recompute "selective"
    keeps no scores; "full" keeps the layer's input alone. With `fused` attention no recipe keeps scores,
    and "selective" keeps what torchtitan's does: a block's input, attention's keys, values and output, and every second product.
    """
    tokens = plan.micro_batch * seq_len / plan.cp
    ranks = plan.tp if plan.sequence_parallel else 1      # SP splits what TP repeats
    if plan.recompute == "full":
        return 2 * tokens * spec.d_model / ranks
    whole, split, scores = _kept(spec, layer, seq_len)
    if fused:
        scores = 0
        if plan.recompute == "selective":
            whole -= 2 * spec.d_model
            wide = spec.top_k * spec.d_expert + spec.d_shared if spec.is_moe_layer(layer) else spec.d_ff
            split -= wide * (2 if spec.gated_ffn else 1) + spec.q_width * (spec.latent is None)
    masks = 2 * spec.d_model if dropout else 0
    a_score = 0 if plan.recompute == "selective" else 5 if dropout else 2
    return tokens * ((2 * whole + masks) / ranks + (2 * split + a_score * scores) / plan.tp)


def training(spec: ModelSpec, plan: ParallelPlan, seq_len: int, dtype: str = "bf16", gradient_dtype: str = "bf16") -> MemoryUse:
    """What the fullest device holds while training: state, and activations in flight.

    How many micro-batches are in flight on a stage, `pipeline.in_flight` says; the chunks of an
    interleaved stage count as alike. This is what the running half was seen to hold, scores of unfused attention among it;
    logits, buffers and the framework's own share are left out. `Estimator` predicts the peak with them.
    """
    def held(stage: int) -> dict[str, float]:
        kept = sum(layer_activation_bytes(spec, plan, seq_len, layer) for layer in plan.layers_of(spec.n_layers, stage))
        times = in_flight(plan.pp, plan.n_micro_batches, stage, plan.n_chunks, plan.schedule)
        return {**state(stage_parameters(spec, plan, stage), plan, dtype, gradient_dtype),
                "activations": times * kept / plan.n_chunks}
    return _fullest(spec, plan, held)


def serving(spec: ModelSpec, plan: ParallelPlan, batch: int, context: int, dtype: str = "bf16",
            kv_dtype: str = "bf16") -> MemoryUse:
    """What the fullest device holds while serving `batch` sequences of `context` tokens.

    KV heads are split over tp (replicated below one a rank), layers over pp, tokens over cp; dp
    replicas split the batch. Hybrid stacks also hold the states of their linear layers.
    """
    batch, context = -(-batch // plan.dp), -(-context // plan.cp)

    def held(stage: int) -> dict[str, float]:
        local = stage_spec(spec, plan, stage)               # its heads are already one rank's share
        state = {"linear_state": linear_state_bytes(local, batch)} if "linear" in spec.layer_kinds else {}
        return {"weights": sum(stage_parameters(spec, plan, stage).values()) * dtype_bytes(dtype),
                "kv_cache": kv_cache_bytes(local, batch, context, kv_dtype), **state}
    return _fullest(spec, plan, held)
