"""Softmax attention over any number of key/value heads: the oracle, two fast paths, one dispatcher."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On Hopper cuDNN's kernel is about twice as fast as torch's default (huggingface/transformers pull request 48163).
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

FEW_ROWS = 8        # query rows of one key head; measured, benchmarks/results/decode_cpu.json: above it torch's kernel is as fast


def visible(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query may see, bool [n_queries, n_keys]; the queries are the last positions."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The definition, with every head written out. Vaswani et al. 2017, arXiv:1706.03762, section 3.2.

    q [batch, n_heads, n_queries, head_dim], k and v [batch, n_kv_heads, n_keys, width]; `sinks`, one
    logit a head, takes part in the softmax and carries no value.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5         # [batch, n_heads, n_queries, n_keys]
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    return weights[..., :k.shape[2]] @ v


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The query heads that share a key/value head become extra query rows, so K and V are read once.

    Same shapes as `reference`; mask [n_queries, n_keys], or [batch, 1, n_queries, n_keys] where sequences differ. This is
    how multi-query decoding saves its bandwidth on a CPU.
    """
    batch, n_heads, n_queries, width = q.shape
    n_kv, groups = k.shape[1], n_heads // k.shape[1]
    rows = q.reshape(batch, n_kv, groups * n_queries, width)
    mask = torch.cat([mask] * groups, -2)
    if rows.shape[2] <= FEW_ROWS and rows.device.type == "cpu" and rows.element_size() >= 4:
        scores = (k @ (rows * width ** -0.5).transpose(2, 3)).transpose(2, 3)     # the BLAS streams K, the tall side, once
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return out.reshape(batch, n_heads, n_queries, -1)


def choose(q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None) -> tuple[str, str]:
    """(path, reason): which implementation `attention` takes for these arguments, and why."""
    if sinks is not None:
        return "reference", "attention sinks are not part of torch's fused attention"
    if q.shape[2] == k.shape[2] and window is None:
        return "causal", "a whole sequence is torch's fused causal case, which skips what it masks"
    return "folded", "query heads sharing a key/value head become rows, so K and V are read once"


def attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, sinks: Tensor | None = None) -> Tensor:
    """Causal attention of the last `n_queries` positions over all keys, optionally within a window.

    q [batch, n_heads, n_queries, head_dim], k and v [batch, n_kv_heads, n_keys, width]
    -> [batch, n_heads, n_queries, v_dim]. Raises ValueError when the heads do not divide.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"n_heads={q.shape[1]} is not divisible by n_kv_heads={k.shape[1]}; "
                         f"query heads share key/value heads evenly")
    path, _ = choose(q, k, window, sinks)
    if path == "causal":
        with sdpa_kernel(BACKENDS, set_priority=True) if q.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    mask = visible(q.shape[2], k.shape[2], window, q.device)
    return folded(q, k, v, mask) if path == "folded" else reference(q, k, v, mask, sinks)
