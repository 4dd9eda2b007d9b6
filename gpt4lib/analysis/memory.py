"""How many bytes: weights, KV cache, and what one device holds while training."""

from __future__ import annotations

from dataclasses import dataclass

from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs.hardware import DeviceSpec, dtype_bytes
from gpt4lib.specs.model import ModelSpec
from gpt4lib.specs.workload import ParallelPlan


def weight_bytes(spec: ModelSpec, dtype: str = "bf16") -> float:
    """Bytes of all parameters in one dtype."""
    return parameters(spec).total * dtype_bytes(dtype)


def kv_cache_bytes(spec: ModelSpec, batch: int, context: int, dtype: str = "bf16", tp: int = 1) -> float:
    """KV-cache bytes of `batch` sequences of `context` tokens, on one tensor-parallel rank of all layers.

    Ordinary attention keeps a key and a value of n_kv_heads * head_dim a token; below tp heads the heads
    are replicated, so a rank never holds less than one. Latent attention keeps kv_rank + rope_dim, whole on
    every rank. A windowed layer keeps at most its window. A linear layer keeps a state instead: none here,
    see `linear_state_bytes`.
    """
    heads = -(-spec.n_kv_heads // tp)
    a_token = spec.latent.kv_rank + spec.latent.rope_dim if spec.latent else 2 * heads * spec.head_dim
    kept = {"full": context, "window": min(context, spec.window or context), "linear": 0}
    return batch * a_token * sum(kept[kind] for kind in spec.layer_kinds) * dtype_bytes(dtype)


def linear_state_bytes(spec: ModelSpec, batch: int, dtype: str = "fp32") -> float:
    """Bytes of the fixed-size states of linear-attention layers; independent of the context."""
    if spec.linear is None:
        return 0
    state = spec.linear.n_value_heads * spec.linear.key_dim * spec.linear.value_dim
    return batch * spec.layer_kinds.count("linear") * state * dtype_bytes(dtype)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the fullest device, by part."""
    by_part: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.by_part.values())

    def fits(self, device: DeviceSpec) -> bool:
        """Whether the parts fit in the device's memory, with nothing kept back for the framework."""
        return self.total <= device.memory_bytes


def device_parameters(spec: ModelSpec, plan: ParallelPlan) -> float:
    """Parameters held by the fullest device: the larger of the first stage (embedding) and the last (head).

    Layers are spread over pipeline stages as evenly as whole layers allow, and every matrix over tp;
    experts also over ep. Norms and routers are replicated in practice; counted as if split, an error below 0.1 %.
    """
    plan.check(spec)
    count = parameters(spec).by_part
    experts = count["experts"] / (spec.n_layers * plan.tp * plan.ep)
    body = sum(count[p] for p in ("attention", "ffn", "shared_experts", "router", "norms"))
    a_layer = experts + body / (spec.n_layers * plan.tp)
    stages = plan.layers_per_stage(spec.n_layers)
    embedding = count["embedding"] + count["positions"]
    head = count["head"] or (count["embedding"] if plan.pp > 1 else 0)    # a tied head is copied to its stage
    first, last = stages[0] * a_layer + embedding / plan.tp, stages[-1] * a_layer + head / plan.tp
    return first + head / plan.tp if plan.pp == 1 else max(first, last, stages[0] * a_layer)


def training_state(spec: ModelSpec, plan: ParallelPlan, dtype: str = "bf16",
                   gradient_dtype: str = "bf16") -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on the fullest device.

    The optimizer is Adam with an fp32 master copy and two fp32 moments, 12 bytes a parameter. ZeRO stage 1
    shards it over dp, stage 2 the gradients too, stage 3 the weights too (Rajbhandari et al. 2020,
    arXiv:1910.02054, figure 1). Mind `gradient_dtype`: fp32 gradients double their part.
    """
    n, shard = device_parameters(spec, plan), plan.dp
    return {
        "weights": n * dtype_bytes(dtype) / (shard if plan.zero_stage >= 3 else 1),
        "gradients": n * dtype_bytes(gradient_dtype) / (shard if plan.zero_stage >= 2 else 1),
        "optimizer": n * 12 / (shard if plan.zero_stage >= 1 else 1),
    }


def layer_activation_bytes(spec: ModelSpec, plan: ParallelPlan, seq_len: int) -> float:
    """Bytes one layer keeps for the backward pass of one micro-batch, in 16-bit.

    Korthikanti et al. 2022, arXiv:2205.05198, equations 1-4, written out per tensor so that it also
    covers grouped heads, gated blocks and experts; without dropout masks. Their 34 + 5as/h assumes
    multi-head attention, a 4h block and dropout. selective: scores are recomputed; full: only the layer's input stays.
    """
    tokens, d = plan.micro_batch * seq_len / plan.cp, spec.d_model
    shared = plan.tp if plan.sequence_parallel else 1     # what tensor parallelism alone replicates
    if plan.recompute == "full":
        return 2 * tokens * d / shared
    v_dim = spec.latent.v_dim if spec.latent else spec.head_dim
    qkv = spec.q_width + 2 * spec.kv_width
    width = spec.top_k * spec.d_expert + spec.d_shared if spec.is_moe else spec.d_ff
    kept_of_width = 3 if spec.gated_ffn else 2            # inputs and output of the activation
    copies = spec.top_k if spec.is_moe else 1             # a routed token is copied to each of its experts
    whole = 2 * d + d + d * copies                        # inputs of the two norms, and of the two blocks
    split = qkv + spec.n_heads * v_dim + kept_of_width * width
    scores = 0 if plan.recompute == "selective" else spec.n_heads * seq_len
    elements = whole / shared + (split + scores) / plan.tp
    return 2 * tokens * elements


def training(spec: ModelSpec, plan: ParallelPlan, seq_len: int, dtype: str = "bf16",
             gradient_dtype: str = "bf16") -> MemoryUse:
    """What the fullest device holds while training: state, and activations of the micro-batches in flight.

    Under 1F1B the first stage holds min(pp, n_micro_batches) micro-batches (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2.1). Logits, buffers and the framework's own share are left out.
    """
    state = training_state(spec, plan, dtype, gradient_dtype)
    in_flight = min(plan.pp, plan.n_micro_batches)
    layers = plan.layers_per_stage(spec.n_layers)[0]
    return MemoryUse({**state, "activations": in_flight * layers * layer_activation_bytes(spec, plan, seq_len)})


def serving(spec: ModelSpec, plan: ParallelPlan, batch: int, context: int, dtype: str = "bf16",
            kv_dtype: str = "bf16") -> MemoryUse:
    """What the fullest device holds while serving `batch` sequences of `context` tokens.

    KV heads are split over tp (replicated below one a rank) and layers over pp; dp replicas split the batch.
    """
    layers = plan.layers_per_stage(spec.n_layers)[0]
    cache = kv_cache_bytes(spec, -(-batch // plan.dp), context, kv_dtype, plan.tp)
    return MemoryUse({"weights": device_parameters(spec, plan) * dtype_bytes(dtype),
                      "kv_cache": cache * layers / spec.n_layers})
