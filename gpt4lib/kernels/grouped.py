"""The experts in plain PyTorch, on rows sorted by expert: all at once, or one expert at a time.

torch's grouped_mm multiplies every run of rows by its own expert's matrix in one call. One expert at a time keeps what
each makes in a CPU's caches and has a fast case for a few rows. `why_by_expert` says which, and why.
"""

from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt4lib.kernels.activation import activate, activate_backward

# Rows an expert gets on average, measured on two CPUs (benchmarks/results/moe_cpu.json): up to the first, a weight is
# best read the other way round; above the second, the whole batch's activations no longer fit a CPU's caches.
FEW_ROWS, MANY_ROWS = 10, 128


def why_by_expert(x: Tensor, n_slots: int, w_in: Tensor, w_out: Tensor) -> str | None:
    """Why the experts run one at a time; None when torch's grouped_mm takes them all at once."""
    if any(stride * x.element_size() % 16 for t in (x, w_in, w_out) for stride in t.stride() if stride != 1):
        return "grouped_mm needs strides of a multiple of 16 bytes"
    if n_slots == 0:
        return "there is no slot"
    if x.is_cuda:
        return None if x.dtype == torch.bfloat16 else f"on CUDA torch promises grouped_mm for bfloat16 only, not {x.dtype}"
    if x.dtype != torch.float32:
        return f"on a CPU grouped_mm is used for float32 only, not {x.dtype}"
    if not FEW_ROWS < n_slots / len(w_in) <= MANY_ROWS:
        return f"{n_slots} slots over {len(w_in)} experts are few enough for the fast case or too many for a CPU's caches"
    return None


def forward(x: Tensor, chosen: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None,
            b_out: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """See `experts.experts`; -> (slots [n_slots, d], pre-activations in sorted order or nothing)."""
    top_k, n_slots = chosen.shape[1], len(order)
    if why_by_expert(x, n_slots, w_in, w_out) is None:
        expert = _expert_of_row(ends, n_slots)
        z = _with_bias(_all_rows(x[order // top_k], w_in, ends), b_in, expert)
        y = _with_bias(_all_rows(activate(z, activation), w_out, ends), b_out, expert)
        return torch.empty_like(y).index_copy_(0, order, y), z if save else z.new_empty(0)
    runs = list(_runs(ends))
    longest = max(end - start for _, start, end in runs)
    slots, y = x.new_zeros(n_slots, x.shape[1]), x.new_empty(longest, x.shape[1])       # dropped slots stay zero
    z = x.new_empty(n_slots if save else longest, w_in.shape[1])
    for e, start, end in runs:
        if end == start:
            continue
        rows = slice(start, end) if save else slice(0, end - start)
        slot = order[start:end]
        times_transposed(x[slot // top_k], w_in[e], z[rows])
        if b_in is not None:
            z[rows] += b_in[e]
        times_transposed(activate(z[rows], activation), w_out[e], y[:end - start])
        slots[slot] = y[:end - start] if b_out is None else y[:end - start] + b_out[e]
    return slots, z if save else z.new_empty(0)


def backward(grad: Tensor, x: Tensor, chosen: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor, z: Tensor,
             activation: str, biases: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, w_out and the biases (empty without them), from that of the slots."""
    top_k, n_slots = chosen.shape[1], len(order)
    if why_by_expert(x, n_slots, w_in, w_out) is None:
        grad = grad[order]
        dz = activate_backward(_all_rows(grad, w_out.transpose(1, 2), ends), z, activation)
        nobody = torch.diff(ends, prepend=ends.new_zeros(1)).eq(0)[:, None, None]    # unwritten on some GPUs: pytorch #172439
        dw_in = F.grouped_mm(dz.t(), x[order // top_k], offs=ends).masked_fill_(nobody, 0)
        dw_out = F.grouped_mm(grad.t(), activate(z, activation), offs=ends).masked_fill_(nobody, 0)
        dx = torch.empty_like(grad).index_copy_(0, order, _all_rows(dz, w_in.transpose(1, 2), ends))
        used = torch.arange(n_slots, device=ends.device) < ends[-1]
        who = F.one_hot(_expert_of_row(ends, n_slots), len(w_in) + 1)[:, :-1].t().float()      # sums in fp32, no atomics
        db_in, db_out = ((who @ d.where(used[:, None], 0).float()).to(d.dtype) if biases else z.new_empty(0) for d in (dz, grad))
        return dx.view(len(x), top_k, x.shape[1]).sum(1), dw_in, dw_out, db_in, db_out
    dx, dw_in, dw_out = torch.zeros_like(grad), torch.empty_like(w_in), torch.empty_like(w_out)
    db_in, db_out = (z.new_zeros(w.shape[:2] if biases else 0) for w in (w_in, w_out))
    for e, start, end in _runs(ends):
        slot, before = order[start:end], z[start:end]
        g = grad[slot]
        torch.mm(g.t(), activate(before, activation), out=dw_out[e])             # zeros where no row came
        dz = activate_backward(g @ w_out[e], before, activation)
        torch.mm(dz.t(), x[slot // top_k], out=dw_in[e])
        dx[slot] = dz @ w_in[e]
        if biases:
            db_in[e], db_out[e] = dz.sum(0), g.sum(0)
    return dx.view(len(x), top_k, x.shape[1]).sum(1), dw_in, dw_out, db_in, db_out


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


def _runs(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, start, end) of its rows, on the host."""
    stops = ends.tolist()
    return zip(range(len(stops)), [0, *stops], stops)


def _all_rows(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [n, d_in], weight [n_experts, d_out, d_in] -> [n, d_out]; rows past ends[-1], which grouped_mm leaves
    unwritten, come out zero."""
    out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    if out.is_cuda:                                        # the host does not know ends[-1], and should not wait for it
        return out.masked_fill_(torch.arange(len(out), device=out.device)[:, None] >= ends[-1], 0)
    out[int(ends[-1]):] = 0
    return out


def _expert_of_row(ends: Tensor, n_slots: int) -> Tensor:
    """int64 [n_slots], n_experts for dropped rows."""
    return torch.searchsorted(ends, torch.arange(n_slots, device=ends.device), right=True)


def _with_bias(rows: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return rows if bias is None else rows + F.pad(bias, (0, 0, 0, 1))[expert]
