"""Counters on a live model. They look at tensors and operators, never at a formula."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gpt4lib.nn.cache import KVCache
from gpt4lib.nn.moe import routings
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs.model import ModelSpec

# The first matching fragment of a parameter's name decides its part.
PART_OF_NAME = ((".moe.router", "router"), (".moe.experts", "experts"), (".moe.shared", "shared_experts"), (".ffn", "ffn"),
                (".attention", "attention"), ("norm", "norms"), *((name, name) for name in ("embedding", "positions", "head")))

# torch counts the GPU kernels of fused attention, but not the CPU one: same rule, one more operator.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}


def count_parameters(model: Transformer) -> dict[str, int]:
    """Parameters of the live modules by part, and "total"; a shared tensor counts once."""
    counted = {part: 0 for _, part in PART_OF_NAME}
    for name, p in model.named_parameters():
        counted[next(part for fragment, part in PART_OF_NAME if fragment in name)] += p.numel()
    counted["total"] = sum(counted.values())
    return counted


@torch.no_grad()
def count_flop(model: Transformer, tokens: Tensor, cache: KVCache | None = None) -> int:
    """FLOP of one forward pass as torch's own operator counter sees them (matrix products only;
    attention scores are counted for every query and key the operator is given)."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(tokens, cache)
    return counter.get_total_flops()


def forward_flop(spec: ModelSpec, batch: int, tokens: int) -> int:
    """`count_flop` of a model of this shape and of any size: its tensors are fake, without memory or arithmetic."""
    with FakeTensorMode():
        return count_flop(Transformer(spec), torch.empty(batch, tokens, dtype=torch.long))


@torch.no_grad()
def experts_touched(model: Transformer, tokens: Tensor) -> list[int]:
    """How many distinct experts one forward pass calls in each mixture layer, in layer order."""
    with routings(model) as seen:
        model(tokens)
    return [routing.chosen.unique().numel() for routing in seen]


def kv_cache_bytes(cache: KVCache) -> int:
    """Bytes the cache holds now."""
    return cache.bytes
