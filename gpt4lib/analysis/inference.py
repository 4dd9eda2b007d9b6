"""The least time one decode step can take: the bytes it must read, or the arithmetic it must do."""

from gpt4lib.analysis import flops, memory, roofline
from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan, dtype_bytes


def weights_read(spec: ModelSpec, batch):
    """Parameters a decode step of `batch` tokens reads: all that is shared, and distinct experts.

    The embedding is a look-up of `batch` rows and is left out; a tied table is read once, as the
    head. batch may be an array.
    """
    count = parameters(spec)
    touched = (roofline.distinct_experts(spec.n_experts, spec.top_k, batch) / spec.n_experts if spec.is_moe else 0)
    looked_up = count.by_part["positions"] + (0 if spec.tied else count.by_part["embedding"])
    return count.total - looked_up - (1 - touched) * count.by_part["experts"]


def decode_bytes(spec: ModelSpec, batch, context, dtype: str = "bf16", kv_dtype: str = "bf16", tp: int = 1):
    """Bytes one step of `batch` sequences reads on one of tp ranks.

    Its share of the weights, and its KV cache once, at the context it has now; the states of linear
    layers are read and written back. batch and context may be arrays.
    """
    cache = memory.kv_cache_bytes(spec, batch, context, kv_dtype, tp)
    state = 2 * memory.linear_state_bytes(spec, batch, tp=tp)
    return weights_read(spec, batch) * dtype_bytes(dtype) / tp + cache + state


def decode_step(spec: ModelSpec, device: DeviceSpec, plan: ParallelPlan, batch: int, context: int,
                dtype: str = "bf16", kv_dtype: str = "bf16") -> roofline.Time:
    """Roofline of one new token for each of `batch` sequences of one replica; no communication.

    Tensor parallelism divides it. Pipeline stages work one after the other, so pp leaves the
    latency of a token as it is and multiplies how many batches are under way: each stage is free
    again after 1/pp of it.
    """
    plan.check(spec)
    flop = flops.decode(spec, batch, context, absorbed=spec.latent is not None).total / plan.tp
    moved = decode_bytes(spec, batch, context, dtype, kv_dtype, plan.tp)
    return roofline.time(device, dtype, flop, moved)
