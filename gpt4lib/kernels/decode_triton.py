"""Split-K flash-decoding over pages in Triton: one kernel reads chunks of keys, one merges what they found.

All query heads of a key/value head, and all queries of a sequence, share one tile, so each key is read once.
Dao et al. 2023, "Flash-Decoding for long-context inference"; Kwon et al. 2023, arXiv:2309.06180.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt4lib.kernels.support import interpreting

MAX_ROWS = 64            # more query rows than this are cut into several tiles
LAUNCH = dict(num_warps=4, num_stages=3)


@triton.jit
def split(q, k, v, table, lengths, parts, lse, scale, window, page_size,
          q_batch, q_head, q_query, k_page, k_row, k_head, v_page, v_row, v_head, table_batch, splits,
          GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
          CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KEYS: tl.constexpr, F32: tl.constexpr):
    """One chunk of one sequence's keys for one key/value head: partial output and log2 of the weights' sum."""
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = (tl.program_id(1) // TILES).to(tl.int64)                  # 64-bit: a stride times an index can pass 2^31
    n = tl.load(lengths + b)
    lo = s * CHUNK
    if lo >= n:
        return
    hi = tl.minimum(lo + CHUNK, n)
    row = (tl.program_id(1) % TILES) * ROWS + tl.arange(0, ROWS)     # row = head in group * QUERIES + query
    real = row < GROUP * QUERIES
    position = n - QUERIES + row % QUERIES                           # of each row's query in its sequence
    col = tl.arange(0, COLS)
    at_q = b * q_batch + (head * GROUP + row // QUERIES) * q_head + (row % QUERIES) * q_query
    x = tl.load(q + at_q[:, None] + col[None, :], mask=real[:, None] & (col < WIDTH)[None, :], other=0.0)
    if F32:
        x = x.to(tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if window > 0:                                                   # whole tiles before the first visible key
        lo += tl.maximum(n - QUERIES - window + 1 - lo, 0) // KEYS * KEYS
    for start in range(lo, hi, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < hi
        page = tl.load(table + b * table_batch + key // page_size, mask=there, other=0).to(tl.int64)
        inside = (key % page_size).to(tl.int64)
        keys = tl.load(k + (page * k_page + inside * k_row + head * k_head)[None, :] + col[:, None],
                       mask=there[None, :] & (col < WIDTH)[:, None], other=0.0)
        values = tl.load(v + (page * v_page + inside * v_row + head * v_head)[:, None] + col[None, :],
                         mask=there[:, None] & (col < WIDTH)[None, :], other=0.0)
        if F32:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        score = tl.dot(x, keys, input_precision="ieee") * scale      # [ROWS, KEYS], in powers of two
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if window > 0:
            seen = seen & (key[None, :] > position[:, None] - window)
        score = tl.where(seen, score, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new == -float("inf"), 0.0, new)              # a row that saw nothing yet: no inf - inf
        weight = tl.exp2(score - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        top = new
    safe = tl.where(total > 0, total, 1.0)
    at = ((b * tl.num_programs(1) + tl.program_id(1)) * splits + s) * ROWS + tl.arange(0, ROWS)
    tl.store(parts + at[:, None] * COLS + col[None, :], acc / safe[:, None], mask=real[:, None])
    tl.store(lse + at, tl.where(total > 0, top + tl.log2(safe), -float("inf")), mask=real)


@triton.jit
def merge(parts, lse, lengths, out, splits, GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
          TILES: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One query's chunks in order. A loop to the sequence's own length, so the order never depends on the batch."""
    b, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col = tl.arange(0, COLS)
    first = ((b.to(tl.int64) * HEADS + head) * TILES + row // ROWS) * splits * ROWS + row % ROWS
    top, total = -float("inf"), 0.0
    acc = tl.zeros((COLS,), tl.float32)
    for s in range(0, tl.cdiv(tl.load(lengths + b), CHUNK)):
        at = first + s * ROWS
        found = tl.load(lse + at)
        new = tl.maximum(top, found)
        base = tl.where(new == -float("inf"), 0.0, new)
        keep, weight = tl.exp2(top - base), tl.exp2(found - base)
        acc = acc * keep + tl.load(parts + at * COLS + col) * weight
        total, top = total * keep + weight, new
    to = ((b.to(tl.int64) * HEADS + head) * GROUP * QUERIES + row) * WIDTH + col
    tl.store(out + to, (acc / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty), mask=col < WIDTH)


def blocks(group: int, queries: int, width: int) -> dict[str, int]:
    """Tile sizes from the shape alone."""
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(group * queries)))
    cols = max(16, triton.next_power_of_2(width))
    return dict(ROWS=rows, COLS=cols, KEYS=64 if cols <= 128 else 32, TILES=triton.cdiv(group * queries, rows))


def forward(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, window: int, chunk: int) -> Tensor:
    """See `decode.paged_attention`. The grid is known on the host: no synchronisation, safe in a CUDA graph."""
    batch, heads, queries, width = q.shape
    n_kv, page_size = k_pages.shape[2], k_pages.shape[1]
    group = heads // n_kv
    size = blocks(group, queries, width)
    splits = triton.cdiv(table.shape[1] * page_size, chunk)
    tiles = n_kv * size["TILES"]
    parts = torch.empty(batch, tiles, splits, size["ROWS"], size["COLS"], device=q.device, dtype=torch.float32)
    lse = parts.new_empty(parts.shape[:-1])
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    q = q if q.stride(3) == 1 else q.contiguous()
    if k_pages.stride(3) != 1 or v_pages.stride(3) != 1:
        raise ValueError("the last dimension of the pages must be contiguous; store a key's channels side by side")
    keys = size.pop("KEYS")                                # merging knows no keys
    shared = dict(GROUP=group, QUERIES=queries, WIDTH=width, CHUNK=chunk, **size)
    split[(batch, tiles, splits)](
        q, k_pages, v_pages, table, lengths, parts, lse, width ** -0.5 * 1.4426950408889634, window, page_size,
        *q.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], table.stride(0), splits,
        KEYS=keys, F32=interpreting(), **shared, **LAUNCH)
    merge[(batch, n_kv, group * queries)](parts, lse, lengths, out, splits, HEADS=n_kv, **shared)
    return out
