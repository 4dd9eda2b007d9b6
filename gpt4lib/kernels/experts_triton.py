"""Grouped matrix products for a mixture of experts in Triton: indices are sorted and padded, data never is.

One kernel serves both products of the layer, for many tokens and for few: the first product gathers token rows
and ends in the activation, the second scatters rows back to their slots. Tan et al. 2024, arXiv:2403.08245.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt4lib.kernels.support import SMALL_BATCH, interpreting


@triton.jit
def expert_gemm(a, w, out, z, chosen, tokens, order, tile_expert, tile_start, ends, n, f, d,
                TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, FEW: tl.constexpr, FIRST: tl.constexpr,
                ACTIVATION: tl.constexpr, SAVE: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, F32: tl.constexpr):
    """out = activation(a w^T) for one tile of rows and one block of their expert's f output channels.

    Many tokens: rows are sorted by expert; FIRST gathers them from tokens and writes them sorted, otherwise they
    are read sorted and scattered to slots. FEW: no sort; every expert looks for itself among all choices, and
    leaves before reading a weight if nobody chose it. "swiglu": w has n = 2 f rows, gate then up, accumulated side
    by side. SAVE keeps a w^T in z.
    """
    if FEW:
        expert, block = tl.program_id(0), tl.program_id(1)
        token, choice = tl.arange(0, ROWS), tl.arange(0, TOP_K_PAD)
        mine = tl.load(chosen + token[:, None] * TOP_K + choice[None, :],
                       mask=(token < tokens)[:, None] & (choice < TOP_K)[None, :], other=-1) == expert
        real = tl.sum(mine.to(tl.int32), 1) > 0                      # a token chooses an expert at most once
        if tl.sum(real.to(tl.int32), 0) == 0:
            return
        target = token * TOP_K + tl.sum(mine.to(tl.int32) * choice[None, :], 1)
        source = token if FIRST else target
    else:
        pid = tl.program_id(0)                                       # GROUP tiles in turn share a block of w in L2
        above = pid // (GROUP * BLOCKS) * GROUP
        height = tl.minimum(tl.num_programs(0) // BLOCKS - above, GROUP)
        tile = above + pid % (GROUP * BLOCKS) % height
        block = pid % (GROUP * BLOCKS) // height
        expert = tl.load(tile_expert + tile)
        if expert < 0:                                               # the map is as long as it could ever need to be
            return
        row = tl.load(tile_start + tile) + tl.arange(0, ROWS)
        real = row < tl.load(ends + expert)
        slot = tl.load(order + row, mask=real, other=0)
        source = slot // TOP_K if FIRST else row
        target = row if FIRST else slot
    source, target = source.to(tl.int64), target.to(tl.int64)
    col, depth = block * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
    at_a = a + source[:, None] * d + depth[None, :]
    at_w = w + (expert.to(tl.int64) * n + col[None, :]) * d + depth[:, None]
    acc, up = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, d, DEPTH):
        inside = depth < d - start
        x = tl.load(at_a, mask=real[:, None] & inside[None, :], other=0.0)
        y = tl.load(at_w, mask=inside[:, None] & (col < f)[None, :], other=0.0)
        if F32:
            x, y = x.to(tl.float32), y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision="ieee")
        if ACTIVATION == "swiglu":
            y = tl.load(at_w + f * d, mask=inside[:, None] & (col < f)[None, :], other=0.0)
            if F32:
                y = y.to(tl.float32)
            up = tl.dot(x, y, up, input_precision="ieee")
        at_a += DEPTH
        at_w += DEPTH
    stored = real[:, None] & (col < f)[None, :]
    if SAVE:
        at_z = z + target[:, None] * n + col[None, :]
        tl.store(at_z, acc.to(z.dtype.element_ty), mask=stored)
        if ACTIVATION == "swiglu":
            tl.store(at_z + f, up.to(z.dtype.element_ty), mask=stored)
    if ACTIVATION == "swiglu":
        acc = acc * tl.sigmoid(acc) * up
    if ACTIVATION == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":                                    # 0.5 (1 + tanh u) = sigmoid(2 u)
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    tl.store(out + target[:, None] * f + col[None, :], acc.to(out.dtype.element_ty), mask=stored)


def tile_map(ends: Tensor, n_slots: int, rows: int) -> tuple[Tensor, Tensor]:
    """Which expert each tile of `rows` sorted rows belongs to (-1: none), and where it starts; int32 [tiles].

    Runs of unknown length need at most n_slots / rows + n_experts tiles: the host knows that without asking.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    last = ((ends - starts + rows - 1) // rows).cumsum(0)            # tiles up to and with each expert
    tile = torch.arange(triton.cdiv(n_slots, rows) + len(ends), device=ends.device)
    expert = torch.searchsorted(last, tile, right=True)
    e = expert.clamp(max=len(ends) - 1)
    before = last[e] - (ends - starts + rows - 1)[e] // rows
    start = starts[e] + (tile - before) * rows
    return torch.where(expert < len(ends), e, -1).int(), start.int()


def blocks(n_slots: int, n_experts: int, width: int, itemsize: int, save: bool = False) -> dict[str, int]:
    """Tile sizes from the shape alone; tests compile the largest for sm_90 without spills. Keeping what the backward
    pass needs takes registers too, so those tiles are narrower."""
    rows = next(r for r in (16, 32, 64, 128) if r >= min(n_slots / n_experts, 128 if itemsize == 2 else 64))
    large = rows == 128
    return dict(ROWS=rows, COLS=min(128 if large and not save else 64, max(16, triton.next_power_of_2(width))),
                DEPTH=64 if itemsize == 2 else 32, GROUP=8, num_warps=8 if rows * itemsize == 256 else 4, num_stages=3)


def few_blocks(width: int, itemsize: int) -> dict[str, int]:
    """Many narrow blocks, so that a single token's two experts still occupy every multiprocessor."""
    return dict(ROWS=SMALL_BATCH, COLS=min(32, max(16, triton.next_power_of_2(width))), DEPTH=256 // itemsize, GROUP=1,
                num_warps=4, num_stages=4)


def forward(x: Tensor, chosen: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor, activation: str,
            save: bool, few: bool) -> tuple[Tensor, Tensor]:
    """See `experts.experts`; -> (slots [n_slots, d], pre-activations in sorted order or nothing)."""
    x, chosen, w_in, w_out = (t.contiguous() for t in (x, chosen, w_in, w_out))
    (tokens, d), top_k, (n_experts, n, _), f = x.shape, chosen.shape[1], w_in.shape, w_out.shape[2]
    n_slots = tokens * top_k
    h, z = x.new_empty(n_slots, f), x.new_empty(*(n_slots, n) if save else (0,))
    out = x.new_zeros(n_slots, d)                                    # dropped slots stay zero
    size = blocks(n_slots, n_experts, f, x.element_size())
    expert, start = (None, None) if few else tile_map(ends, n_slots, size["ROWS"])
    for first, a, w, y, n_out, act in ((True, x, w_in, h, f, activation), (False, h, w_out, out, d, "")):
        size = (few_blocks(n_out, x.element_size()) if few else
                blocks(n_slots, n_experts, n_out, x.element_size(), save and first))
        n_blocks = triton.cdiv(n_out, size["COLS"])
        expert_gemm[(n_experts, n_blocks) if few else (len(expert) * n_blocks,)](
            a, w, y, z, chosen, tokens, order, expert, start, ends, w.shape[1], n_out, a.shape[1],
            TOP_K=top_k, TOP_K_PAD=triton.next_power_of_2(top_k), FEW=few, FIRST=first, ACTIVATION=act,
            SAVE=save and first, BLOCKS=n_blocks, F32=interpreting(), **size)
    return out, z
