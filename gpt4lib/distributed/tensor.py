"""Tensor parallelism from two conjugate functions. Shoeybi et al. 2019, arXiv:1909.08053, section 3."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _CopyToRanks(torch.autograd.Function):
    """Identity forward, all-reduce backward: every rank used the input, so its gradients add up."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)     # never reduce into a tensor autograd owns
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward, identity backward: the output is a sum, so each term's gradient is the sum's."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _slice(full: Tensor, dim: int, group) -> Tensor:
    """This rank's equal part of a dimension; ValueError if it does not divide."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    if full.shape[dim] % n:
        raise ValueError(f"width {full.shape[dim]} is not divisible by tp={n}; choose a tp that divides it")
    return full.chunk(n, dim)[rank].detach().clone()


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output channels are split: x [.., n_in], whole, -> [.., n_out / tp]."""

    def __init__(self, full: nn.Linear, group=None) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(_slice(full.weight, 0, group))
        self.bias = None if full.bias is None else nn.Parameter(_slice(full.bias, 0, group))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(_CopyToRanks.apply(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose input channels are split: x [.., n_in / tp] -> [.., n_out], whole on every rank.

    The bias is added once, after the sum.
    """

    def __init__(self, full: nn.Linear, group=None) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(_slice(full.weight, 1, group))
        self.bias = None if full.bias is None else nn.Parameter(full.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = _SumOverRanks.apply(nn.functional.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias
