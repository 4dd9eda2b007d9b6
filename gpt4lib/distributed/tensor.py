"""Tensor parallelism from conjugate pairs of functions. Shoeybi et al. 2019, arXiv:1909.08053, section 3.

A *region* is what happens between `enter` and `leave`: every rank runs it on the same tokens with its own slice of
the weights, and the answers are summed on the way out. With sequence parallelism (Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2.2) the hidden states outside regions are split over the ranks along the tokens.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# torch 2.13 renamed them
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_into(whole: Tensor, mine: Tensor, group=None) -> None:
    """All-gather along the first dimension; on a CPU into a list of views, which gloo does in about half the time."""
    if whole.is_cuda:
        _gather_into(whole, mine, group=group)
    else:
        dist.all_gather(list(whole.chunk(dist.get_world_size(group))), mine, group=group)


def _sum(x: Tensor, group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)            # never reduce into a tensor autograd owns
    dist.all_reduce(total, group=group)
    return total


def _gather_tokens(x: Tensor, group) -> Tensor:
    """[batch, tokens / n, d] on each rank -> [batch, tokens, d] on all."""
    x = x.transpose(0, 1).contiguous()
    whole = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    gather_into(whole, x, group=group)
    return whole.transpose(0, 1)


def _scatter_tokens(x: Tensor, group) -> Tensor:
    """The sum over ranks of [batch, tokens, d], each keeping its [batch, tokens / n, d]."""
    x, n = x.transpose(0, 1).contiguous(), dist.get_world_size(group)
    mine = x.new_empty(x.shape[0] // n, *x.shape[1:])
    scatter_into(mine, x, group=group)
    return mine.transpose(0, 1)


class _CopyToRanks(torch.autograd.Function):
    """Identity forward, all-reduce backward: each rank used the input."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward, identity backward: the output is a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SplitTokens(torch.autograd.Function):
    """The same pair where tokens are split: all-gather forward and reduce-scatter backward, or the other way round."""

    @staticmethod
    def forward(ctx, x: Tensor, group, forth, back) -> Tensor:
        ctx.group, ctx.back = group, back
        return forth(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad, ctx.group), None, None, None


def enter(x: Tensor, group, sequence_parallel: bool = False) -> Tensor:
    """Into a region: hidden states whole on every rank."""
    if sequence_parallel:
        return _SplitTokens.apply(x, group, _gather_tokens, _scatter_tokens)
    return _CopyToRanks.apply(x, group)


def leave(x: Tensor, group, sequence_parallel: bool = False) -> Tensor:
    """Out of a region: the ranks' partial results summed."""
    if sequence_parallel:
        return _SplitTokens.apply(x, group, _scatter_tokens, _gather_tokens)
    return _SumOverRanks.apply(x, group)


def region(module: nn.Module, group, sequence_parallel: bool = False) -> None:
    """Make a module, whose weights are already this rank's slices, a region: its input enters, its output leaves."""
    module.register_forward_pre_hook(lambda _, args: (enter(args[0], group, sequence_parallel), *args[1:]))
    module.register_forward_hook(lambda _, __, out: leave(out, group, sequence_parallel))


def _slice(full: Tensor, dim: int, group) -> nn.Parameter:
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    if full.shape[dim] % n:
        raise ValueError(f"width {full.shape[dim]} is not divisible by tp={n}; choose a tp that divides it")
    return nn.Parameter(full.chunk(n, dim)[rank].detach().clone())


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output channels are split: x [.., n_in], whole, -> [.., n_out / tp]."""

    def __init__(self, full: nn.Linear, group=None) -> None:
        super().__init__()
        self.group, self.weight = group, _slice(full.weight, 0, group)
        self.bias = None if full.bias is None else _slice(full.bias, 0, group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(enter(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose input channels are split: x [.., n_in / tp] -> [.., n_out], whole on every rank.

    The bias is added once, after the sum.
    """

    def __init__(self, full: nn.Linear, group=None) -> None:
        super().__init__()
        self.group, self.weight = group, _slice(full.weight, 1, group)
        self.bias = None if full.bias is None else nn.Parameter(full.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = leave(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class PartialLinear(nn.Linear):
    """The last linear layer of a region: each of `terms` ranks adds its share of the bias, so the sum adds it once."""
    terms: int

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias / self.terms)


def vocab_parallel_embedding(tokens: Tensor, weight: Tensor, group) -> Tensor:
    """Rows of a table whose rows are split: tokens [..] -> [.., d], a partial sum: zero for rows of other ranks."""
    mine = tokens - dist.get_rank(group) * len(weight)
    inside = (mine >= 0) & (mine < len(weight))
    return F.embedding(mine.where(inside, 0), weight) * inside[..., None]


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, group, vocab_size: int) -> Tensor:
        start = dist.get_rank(group) * logits.shape[1]
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        z[:, max(vocab_size - start, 0):] = float("-inf")                 # rows that pad the table
        top = z.max(-1).values
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        z.sub_(top[:, None])
        inside = (targets >= start) & (targets < start + logits.shape[1])
        row = (targets - start).where(inside, 0)[:, None]
        picked = z.gather(1, row)[:, 0].where(inside, 0)
        sums = torch.stack([z.exp_().sum(-1), picked])                    # [2, tokens]: one collective for both
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(z.div_(sums[0][:, None]), row, inside)      # this rank's columns of the softmax
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        softmax, row, inside = ctx.saved_tensors
        dz = softmax.scatter_add(1, row, -inside.to(softmax.dtype)[:, None])
        return (dz * grad[:, None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, group, vocab_size: int) -> Tensor:
    """The cross-entropy of each token, fp32 or better, from logits whose columns are split over the ranks.

    logits [tokens, ceil(vocab_size / tp)], targets int64 [tokens] -> [tokens]. No rank ever holds a whole row: they
    exchange its maximum, its sum of exponentials and the target's logit. Shoeybi et al. 2019, section 3.
    """
    return _VocabParallelLoss.apply(logits, targets, group, vocab_size)
