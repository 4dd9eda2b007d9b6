"""One decode step of multi-query attention against torch's fused attention, repeated keys and GPTBigCode's layer.

    python benchmarks/decode.py       writes results/decode_cpu.json, or results/decode_cuda.json where there is a GPU

On a CPU the cache is fp32 and small; on a GPU it is bfloat16, paged, and up to several gigabytes.
"""

from __future__ import annotations

import sys

import limits
import runner
import torch
import torch.nn.functional as F
from limits import CUDA

from gpt4lib.kernels import attention, decode

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PAGE = 64
# name, batch, query heads, key/value heads, head_dim, keys, queries
CPU_CASES = [("multi-query", 16, 32, 1, 128, 4096, 1), ("multi-query, 8 query heads", 16, 8, 1, 128, 4096, 1),
             ("grouped-query", 4, 32, 8, 128, 4096, 1), ("multi-head", 1, 32, 32, 128, 4096, 1),
             ("multi-query, 5 guesses verified", 4, 32, 1, 128, 4096, 5)]
GPU_CASES = [("multi-query", 256, 32, 1, 128, 8192, 1), ("grouped-query", 32, 32, 8, 128, 4096, 1),
             ("grouped-query, long", 8, 32, 8, 128, 32768, 1), ("GPT-4's heads, one rank of eight", 64, 21, 1, 128, 8192, 1),
             ("grouped-query, 5 guesses verified", 32, 32, 8, 128, 4096, 5)]


def repeated(q, k, v, mask):
    """Every key/value head copied to its query heads, then plain softmax: transformers' eager attention."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def bigcode(q, k, v, mask):
    """GPTBigCode's own attention, called as its layer calls it: one key head for all query heads."""
    from transformers.models.gpt_bigcode import modeling_gpt_bigcode as peer
    module = torch.nn.Module().eval()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    return peer.eager_attention_forward(module, q, k, v, bias[None, None], q.shape[-1] ** -0.5)[0].transpose(1, 2)


def paged(k, v):
    """The same keys in pages in a shuffled order: (k_pages, v_pages, table, lengths)."""
    batch, heads, keys, width = k.shape
    order = torch.randperm(batch * keys // PAGE, device=k.device)
    pages = [torch.empty(len(order), PAGE, heads, width, device=k.device, dtype=k.dtype) for _ in "kv"]
    for pool, t in zip(pages, (k, v)):
        pool[order] = t.transpose(1, 2).reshape(-1, PAGE, heads, width)
    return *pages, order.view(batch, -1).int(), torch.full((batch,), keys, dtype=torch.int32, device=k.device)


def implementations(q, k, v) -> dict:
    """Name -> a call that computes the same attention, ours first."""
    queries, keys = q.shape[2], k.shape[2]
    mask = attention.visible(queries, keys, None, q.device)
    unmasked = None if queries == 1 else mask                  # a single query sees every key
    calls = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=unmasked, enable_gqa=True),
             "repeated keys": lambda: repeated(q, k, v, mask)}
    if k.shape[1] == 1:
        calls["GPTBigCode"] = lambda: bigcode(q, k, v, mask)
    if not CUDA:
        return {"gpt4lib": lambda: attention.attention(q, k, v), **calls}
    pages = paged(k, v)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    flex = torch.compile(flex_attention)
    causal = create_block_mask(lambda b, h, i, j: j <= i + keys - queries, None, None, queries, keys, device=q.device)
    calls["flex"] = lambda: flex(q, k, v, block_mask=causal, enable_gqa=True)
    return {"gpt4lib": lambda: decode.paged_attention(q, *pages), **calls}


def main() -> int:
    limit, rows = limits.measure(DEVICE, DTYPE), []
    for name, batch, heads, n_kv, width, keys, queries in GPU_CASES if CUDA else CPU_CASES:
        torch.manual_seed(0)
        q, k, v = (torch.randn(batch, h, n, width, device=DEVICE, dtype=DTYPE)
                   for h, n in ((heads, queries), (n_kv, keys), (n_kv, keys)))
        calls = implementations(q, k, v)
        ours = calls["gpt4lib"]()
        tolerance = (2e-2 if CUDA else 1e-5) * float(ours.abs().max())
        for other, call in calls.items():                      # the same work, or the comparison means nothing
            torch.testing.assert_close(call(), ours, rtol=0, atol=tolerance, msg=lambda m: f"{other}: {m}")
        read, flop = 2 * k.nbytes, 4 * batch * heads * queries * keys * width
        least = max(read / limit["bytes_per_second"], flop / limit["flop_per_second"])
        with torch.no_grad():
            times = runner.interleaved({n: limits.waited(c) for n, c in calls.items()}, runs=15, warm_up=3)
        row = {"case": name, "batch": batch, "n_heads": heads, "n_kv_heads": n_kv, "head_dim": width, "keys": keys,
               "queries": queries, "kv_bytes": read, "flop": flop, "path": decode.choose(q, k.transpose(1, 2))[0],
               "bound_by": "memory" if least > flop / limit["flop_per_second"] else "compute",
               **runner.against_all(times, "gpt4lib", least)}
        if CUDA:
            row["graph_seconds"] = runner.graph_seconds(calls["gpt4lib"])
            row["graph_percent_of_limit"] = 100 * least / row["graph_seconds"]
        rows.append(row)
        print(f"{name:34}{row['bound_by']:8}" + "  ".join(f"{n} {s['median'] * 1e3:.3f} ms ({s['percent_of_limit']:.0f} %)"
                                       for n, s in row["seconds"].items()), flush=True)
    print(f"wrote {runner.write('decode_' + DEVICE, {'shape': limits.where(DTYPE), 'limit': limit, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
