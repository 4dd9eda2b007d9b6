"""The feed-forward experts of a mixture: one oracle, three fast paths, one dispatcher, one custom op.

Routing is one tensor, `chosen` int64 [tokens, top_k]: the experts of every token. A slot is one entry of it;
a slot that holds n_experts was dropped and costs nothing. Everything else is derived from it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gpt4lib.kernels import grouped, support
from gpt4lib.kernels.activation import ACTIVATIONS, activate
from gpt4lib.kernels.support import SMALL_BATCH

PATHS = (None, "grouped", "triton", "triton_small")


class Dispatch(NamedTuple):
    """Slots sorted by expert. order[i] = token * top_k + choice; expert e owns order[ends[e-1]:ends[e]]."""
    order: Tensor                    # int64 [n_slots]
    ends: Tensor                     # int32 [n_experts]; slots past the last end were dropped


def dispatch(chosen: Tensor, n_experts: int) -> Dispatch:
    """Sort the slots, not the data: no host synchronisation, the same order every time."""
    expert, order = chosen.flatten().sort(stable=True)
    every = torch.arange(n_experts, device=chosen.device)
    return Dispatch(order, torch.searchsorted(expert, every, right=True, out_int32=True))


def combine(slots: Tensor, gates: Tensor) -> Tensor:
    """Weighted sum of each token's slots in fp32 or better: [n_slots, d], [tokens, top_k] -> [tokens, d].

    A reshape and a sum in the order of the choices: no atomics, so the result is the same every time.
    """
    wide = torch.promote_types(slots.dtype, torch.float32)
    by_choice, gates = slots.view(*gates.shape, slots.shape[1]).unbind(1), gates.to(wide)
    out = by_choice[0].to(wide) * gates[:, :1]
    for k, slot in enumerate(by_choice[1:], 1):
        out = torch.addcmul(out, slot.to(wide), gates[:, k:k + 1])
    return out.to(slots.dtype)


def within_capacity(chosen: Tensor, n_experts: int, capacity: int) -> Tensor:
    """`chosen` with the slots beyond each expert's capacity marked dropped (= n_experts).

    Priority: all first choices before all second ones, earlier tokens first (GShard, arXiv:2006.16668,
    algorithm 1). A token is chosen by an expert at most once, so a capacity above `tokens` changes nothing.
    """
    by_choice = chosen.t().flatten()
    expert, order = by_choice.sort(stable=True)
    rank = torch.arange(len(expert), device=chosen.device) - torch.searchsorted(expert, expert)
    kept = torch.empty_like(rank, dtype=torch.bool).scatter_(0, order, rank < capacity)
    return chosen.where(kept.view(chosen.shape[::-1]).t(), n_experts)


def reference(x: Tensor, chosen: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None,
              b_out: Tensor | None = None, activation: str = "swiglu") -> Tensor:
    """The definition: a loop over experts, each reading its own tokens. Jiang et al. 2024, arXiv:2401.04088."""
    out = torch.zeros_like(x)
    for e in range(len(w_in)):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        h = activate(F.linear(x[token], w_in[e], None if b_in is None else b_in[e]), activation)
        y = F.linear(h, w_out[e], None if b_out is None else b_out[e])
        out = out.index_add(0, token, gates[token, choice, None].to(x.dtype) * y)
    return out


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose(x: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None) -> tuple[str, str]:
    """(path, reason): which implementation `experts` takes for these arguments, and why."""
    missing = support.why_not_triton(x)
    if missing is None and b_in is not None:
        missing = "the Triton kernels have no expert biases"
    if missing is None and len(chosen) <= SMALL_BATCH and not _needs_gradient(x, w_in, w_out):
        return "triton_small", f"{len(chosen)} tokens fit one tile: only the experts they touch are read"
    if missing is None:
        return "triton", "CUDA: the gather and the activation are fused into the grouped products"
    detail = grouped.why_by_expert(x, chosen.numel(), w_in, w_out)
    return "grouped", f"{missing}; " + ("torch's grouped_mm" if detail is None else f"one expert at a time: {detail}")


@torch.library.custom_op("gpt4lib::experts", mutates_args=())
def _experts(x: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None,
             activation: str, path: str, save: bool) -> tuple[Tensor, Tensor]:
    """-> (slots [n_slots, d], what the backward pass needs: pre-activations in sorted order, or nothing)."""
    few = path == "triton_small" and not save
    order, ends = (None, None) if few else dispatch(chosen, len(w_in))
    if path != "grouped":
        from gpt4lib.kernels import experts_triton
        return experts_triton.forward(x, chosen, order, ends, w_in, w_out, activation, save, few)
    return grouped.forward(x, chosen, order, ends, w_in, w_out, b_in, b_out, activation, save)


@_experts.register_fake
def _(x, chosen, w_in, w_out, b_in, b_out, activation, path, save):
    return x.new_empty(chosen.numel(), x.shape[1]), x.new_empty(*(chosen.numel(), w_in.shape[1]) if save else (0,))


@torch.library.custom_op("gpt4lib::experts_backward", mutates_args=())
def _experts_backward(grad: Tensor, x: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor, z: Tensor,
                      activation: str, biases: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, w_out and the biases (empty without them), from that of the slots."""
    return grouped.backward(grad, x, chosen, *dispatch(chosen, len(w_in)), w_in, w_out, z, activation, biases)


@_experts_backward.register_fake
def _(grad, x, chosen, w_in, w_out, z, activation, biases):
    bias = [z.new_empty(w.shape[:2] if biases else 0) for w in (w_in, w_out)]
    return x.new_empty(x.shape), w_in.new_empty(w_in.shape), w_out.new_empty(w_out.shape), *bias


def _keep(ctx, inputs, output) -> None:
    x, chosen, w_in, w_out, b_in, _, ctx.activation, *_ = inputs
    ctx.biases = b_in is not None
    ctx.set_materialize_grads(False)                 # nobody asks for the gradient of what is kept: no zeros for it
    ctx.save_for_backward(x, chosen, w_in, w_out, output[1])


def _differentiate(ctx, grad: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    dx, dw_in, dw_out, db_in, db_out = _experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.biases)
    return dx, None, dw_in, dw_out, *((db_in, db_out) if ctx.biases else (None, None)), None, None, None


_experts.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.gpt4lib.experts)
def _flop(x_shape, chosen_shape, w_in_shape, w_out_shape, *_, **__) -> int:
    """Two FLOP per slot and weight of one expert, as torch counts every matrix product."""
    slots = chosen_shape[0] * chosen_shape[1]
    return 2 * slots * (w_in_shape[1] * w_in_shape[2] + w_out_shape[1] * w_out_shape[2])


@register_flop_formula(torch.ops.gpt4lib.experts_backward)
def _flop_backward(grad_shape, x_shape, chosen_shape, w_in_shape, w_out_shape, *_, **__) -> int:
    return 2 * _flop(x_shape, chosen_shape, w_in_shape, w_out_shape)


def experts(x: Tensor, chosen: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None,
            b_out: Tensor | None = None, *, activation: str = "swiglu", path: str | None = None) -> Tensor:
    """Every slot through its expert: x [tokens, d], chosen int64 [tokens, top_k] -> [tokens * top_k, d].

    w_in [n_experts, 2 f, d] for "swiglu" (gate rows, then up), [n_experts, f, d] otherwise; w_out
    [n_experts, d, f]; all of one dtype. The choices of a token are distinct and at most n_experts, which marks a dropped
    slot: it comes out zero. Both biases or none. `path` forces one of "grouped",
    "triton", "triton_small"; None asks `choose`. Differentiable in x, weights and biases.
    Raises ValueError, one line, for shapes that do not fit or a path that cannot run.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; accepted: {', '.join(ACTIVATIONS)}")
    n, width, d = w_in.shape
    f = width // 2 if activation == "swiglu" else width
    if x.shape[1] != d or tuple(w_out.shape) != (n, d, f) or len(chosen) != len(x):
        raise ValueError(f"x {tuple(x.shape)}, chosen {tuple(chosen.shape)}, w_in {tuple(w_in.shape)} and w_out "
                         f"{tuple(w_out.shape)} do not fit; w_out must be ({n}, {d}, {f}) and x one row per choice")
    if (b_in is None) != (b_out is None) or b_in is not None and (b_in.shape, b_out.shape) != (w_in.shape[:2], w_out.shape[:2]):
        shapes = [None if b is None else tuple(b.shape) for b in (b_in, b_out)]
        raise ValueError(f"b_in, b_out of shapes {shapes} do not fit; give both, ({n}, {width}) and ({n}, {d}), or none")
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(f"x is {x.dtype}, w_in {w_in.dtype}, w_out {w_out.dtype}; give all three the same dtype")
    if path not in PATHS:
        raise ValueError(f"path={path!r} is not known; accepted: {', '.join(map(str, PATHS))}")
    if path not in (None, "grouped"):
        support.require_triton(x, path)
        if b_in is not None or path == "triton_small" and len(x) > SMALL_BATCH:
            raise ValueError(f"path={path!r} has no biases and takes at most {SMALL_BATCH} tokens if small; got "
                             f"{len(x)} tokens{' and biases' if b_in is not None else ''}; leave path out")
    path = path or choose(x, chosen, w_in, w_out, b_in)[0]
    return _experts(x, chosen, w_in, w_out, b_in, b_out, activation, path, _needs_gradient(x, w_in, w_out, b_in, b_out))[0]
