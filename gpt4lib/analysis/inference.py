"""The least time one decode step can take: the bytes it must read, or the arithmetic it must do."""

from __future__ import annotations

from gpt4lib.analysis import flops, memory, roofline
from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs.hardware import DeviceSpec, dtype_bytes
from gpt4lib.specs.model import ModelSpec


def decode_bytes(spec: ModelSpec, batch: int, context: int, dtype: str = "bf16", kv_dtype: str = "bf16") -> float:
    """Bytes one step of `batch` sequences reads: shared weights, the distinct experts, the KV cache.

    The embedding is a look-up of `batch` rows and is left out; a tied table is read once, as the head.
    """
    count = parameters(spec)
    touched = (roofline.distinct_experts(spec.n_experts, spec.top_k, batch) / spec.n_experts
               if spec.is_moe else 0)
    skipped = 0 if spec.tied else count.by_part["embedding"]
    weights = count.total - skipped - count.by_part["positions"] - (1 - touched) * count.by_part["experts"]
    return weights * dtype_bytes(dtype) + memory.kv_cache_bytes(spec, batch, context, kv_dtype)


def decode_step(spec: ModelSpec, device: DeviceSpec, n_devices: int, batch: int, context: int,
                dtype: str = "bf16") -> roofline.Time:
    """Roofline of one step on n_devices that share bytes and arithmetic evenly; no communication."""
    t = roofline.time(device, dtype, flops.decode(spec, batch, context).total,
                      decode_bytes(spec, batch, context, dtype))
    return roofline.Time(t.seconds / n_devices, t.bound_by)
