"""Matrix products of rows sorted by expert: each run of rows meets its own expert's matrix."""

from __future__ import annotations

from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 10        # measured, benchmarks/results/moe.json: above it the plain product is as fast


def pieces(ends: Tensor, whole: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, experts, their ends): all at once, or one expert at a time so that a CPU's caches hold what it makes."""
    if whole:
        yield slice(None), slice(None), ends
        return
    start = 0
    for e, end in enumerate(ends.tolist()):
        yield slice(start, end), slice(e, e + 1), ends[e:e + 1] - start
        start = end


def times_transposed(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = rows @ weight^T: rows [n, d_in], weight [d_out, d_in], out [n, d_out].

    A few rows on a CPU are bound by reading the weight. Written as weight @ rows^T, and in two halves,
    the BLAS streams the weight once, on every core, instead of once per row on one.
    """
    n, (d_out, d_in) = len(rows), weight.shape
    usable = rows.device.type == "cpu" and rows.element_size() >= 4 and weight.stride(1) == 1 and d_out % 2 == 0
    if n > FEW_ROWS or not usable:
        torch.mm(rows, weight.t(), out=out)
    else:
        halves = torch.bmm(weight.view(2, d_out // 2, d_in), rows.t().expand(2, d_in, n))
        out.copy_(halves.view(d_out, n).t())


def why_not_grouped_mm(rows: Tensor, *others: Tensor) -> str | None:
    """Why torch's grouped_mm cannot or should not be used here; None when it should."""
    if not rows.is_cuda:
        return "on a CPU grouped_mm is the same loop without the fast case for few rows"
    if rows.dtype != torch.bfloat16:
        return f"on CUDA torch promises grouped_mm for bfloat16 only, not {rows.dtype}"
    if any(stride * 2 % 16 for t in (rows, *others) for stride in t.stride() if stride != 1):
        return "grouped_mm needs strides of a multiple of 16 bytes"
    return None


def grouped_rows(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [n, d_in], weight [n_experts, d_out, d_in] -> [n, d_out]; rows past ends[-1] come out zero."""
    if why_not_grouped_mm(rows, weight) is None:
        used = torch.arange(len(rows), device=rows.device)[:, None] < ends[-1]
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends).masked_fill(~used, 0)     # it leaves them unwritten
    out, start = rows.new_empty(len(rows), weight.shape[1]), 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            times_transposed(rows[start:end], weight[e], out[start:end])
        start = end
    out[start:] = 0
    return out


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor, out: Tensor) -> None:
    """out[e] = sum over e's rows of a[row] b[row]^T: a [n, p], b [n, q], out [n_experts, p, q].

    An expert without rows gets zeros: this is the gradient of its weight.
    """
    if why_not_grouped_mm(a, b) is None:
        out.copy_(F.grouped_mm(a.t(), b, offs=ends))
        return
    start = 0
    for e, end in enumerate(ends.tolist()):
        torch.mm(a[start:end].t(), b[start:end], out=out[e])
        start = end
