"""Parameters as one flat vector: what plain data parallelism and ZeRO-1 reduce in buckets and shard."""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt4lib.distributed.layout import Piece
from gpt4lib.distributed.tensor import gather_into, scatter_into


class Segment(NamedTuple):
    """A parameter's place in the flat vector."""
    name: str
    parameter: nn.Parameter
    start: int
    stop: int


class Flat:
    """Parameters as one vector of weights and one of gradients, in buckets that are reduced as soon as they are complete.

    The vectors are padded to n equal shards. With `zero`, a rank keeps the optimizer's state of its shard only: 1/n of
    every bucket. A gradient is added to the vector, in fp32 at least, after each backward pass of a micro-batch; when
    all `n_micro` are in, the bucket starts its all-reduce, or reduce-scatter, while the backward pass goes on. Last in
    the vector stand the partial gradients, few and small, which wait for the end.

    A step is `restart`, backward passes, `reduce`, `norm_squared`, `decay`, the optimizer on `master`, `publish`.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], pieces: dict[str, Piece], group: dist.ProcessGroup, *,
                 zero: bool, n_micro: int, replicas: int, bucket_bytes: int) -> None:
        self.pieces, self.group, self.zero, self.n_micro, self.replicas = pieces, group, zero, n_micro, replicas
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes} is not accepted; give an integer >= 1")
        self.segments, length = [], 0
        # gradients arrive from the last layer to the first
        for name, p in sorted(reversed(named), key=lambda pair: bool(pieces[pair[0]].partial)):
            self.segments.append(Segment(name, p, length, length + p.numel()))
            length += p.numel()
        self.length, like = length, named[0][1]
        padded = -(-length // self.n) * self.n
        self.weights = like.new_zeros(padded)
        wide = torch.promote_types(like.dtype, torch.float32)
        self.gradients = torch.zeros(padded, dtype=wide, device=like.device)
        step = max(bucket_bytes // self.gradients.element_size() // self.n, 1) * self.n
        self.buckets = [(a, min(a + step, padded)) for a in range(0, padded, step)]
        for s in self.segments:
            self.weights[s.start:s.stop] = s.parameter.detach().flatten()
            s.parameter.data = self.weights[s.start:s.stop].view_as(s.parameter)
            s.parameter.register_post_accumulate_grad_hook(partial(self._arrived, s))
        # where the rank's parts lie in the vector
        self.mine = [(a + (b - a) // self.n * self.rank, a + (b - a) // self.n * (self.rank + 1))
                     for a, b in self.buckets] if zero else [(0, self.length)]
        # every parameter with its places in the shard
        self.parts: list[tuple[Segment, slice]] = []
        offset = 0
        for a, b in self.mine:
            for s in self.segments:
                low, high = max(s.start, a), min(s.stop, b)
                if low < high:
                    self.parts.append((s, slice(offset + low - a, offset + high - a)))
            offset += b - a
        self.waiting = [[s for s in self.segments if s.start < b and s.stop > a] for a, b in self.buckets]
        # the same memory as the weights where those are whole and fp32 already
        self.master = nn.Parameter(self.shard(self.weights).to(wide))
        self.restart()

    def shard(self, vector: Tensor) -> Tensor:
        """The rank's part of every bucket, one after the other; the whole vector itself without ZeRO."""
        parts = [vector[a:b] for a, b in self.mine]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _split(self, shard: Tensor) -> tuple[Tensor, ...]:
        """A shard's part of every bucket."""
        return shard.split([b - a for a, b in self.mine])

    def restart(self) -> None:
        """Forget every gradient: those of a step that was abandoned too."""
        self.gradients.zero_()
        self.master.grad = None
        self.seen = {s.name: 0 for s in self.segments}
        self.works: list = []

    def _arrived(self, s: Segment, p: nn.Parameter) -> None:
        self.gradients[s.start:s.stop].add_(p.grad.flatten())
        p.grad = None
        self.seen[s.name] += 1
        if self.seen[s.name] == self.n_micro:
            self._launch()

    def _launch(self, force: bool = False) -> None:
        """Start reducing every next bucket whose gradients are final; always in the same order on all ranks."""
        while self.n > 1 and len(self.works) < len(self.buckets):
            if not force and any(self.seen[s.name] < self.n_micro or self.pieces[s.name].partial
                                 for s in self.waiting[len(self.works)]):
                return
            a, b = self.buckets[len(self.works)]
            if self.zero:
                mine = self.gradients.new_empty((b - a) // self.n)
                work = scatter_into(mine, self.gradients[a:b], group=self.group, async_op=True)
            else:
                mine, work = None, dist.all_reduce(self.gradients[a:b], group=self.group, async_op=True)
            self.works.append((work, mine))

    def reduce(self) -> None:
        """Start what is left, wait for all, and give the mean over replicas to the optimizer."""
        self._launch(force=True)
        for i, (work, mine) in enumerate(self.works):
            work.wait()
            if mine is not None:                               # back into the vector: no second buffer of that size
                self.gradients[slice(*self.mine[i])] = mine
        self.master.grad = self.shard(self.gradients).to(self.master.dtype).div_(self.replicas)

    def norm_squared(self) -> Tensor:
        """Of the gradients that this rank answers for: summed over all ranks, each counts once."""
        mine = [squared_norm(self.master.grad[part]) for s, part in self.parts
                if self.pieces[s.name].owned and (self.zero or self.rank == 0)]
        return sum(mine, self.master.new_zeros((), dtype=torch.float64))

    def decay(self, factor: float) -> None:
        for s, part in self.parts:
            if decays(s.name, s.parameter):
                self.master.data[part].mul_(1 - factor)

    def publish(self) -> None:
        """The stepped weights back into the model: with ZeRO every rank gathers the others' shards."""
        if self.master.data_ptr() != self.weights.data_ptr():
            for (a, b), part in zip(self.mine, self._split(self.master.data)):
                self.weights[a:b] = part
        for (a, b), mine in zip(self.buckets, self.mine) if self.zero else ():
            gather_into(self.weights[a:b], self.weights[slice(*mine)].clone(), group=self.group)

    def whole(self, shard: Tensor) -> Tensor:
        """A shard-sized vector of the optimizer, gathered from all ranks, in the order of `segments`."""
        if not self.zero:
            return shard
        out = shard.new_empty(len(self.weights))
        for (a, b), part in zip(self.buckets, self._split(shard)):
            gather_into(out[a:b], part.contiguous(), group=self.group)
        return out


def decays(name: str, p: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, and not to the stacked biases of experts, which only look like one."""
    return p.dim() > 1 and not name.endswith("bias")


def squared_norm(x: Tensor, row: int = 4096) -> Tensor:
    """The sum of squares of a vector, fp64: in x's own precision within short rows, so without a wide copy of x."""
    whole = len(x) // row * row
    rows = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1)
    return rows.double().square().sum() + x[whole:].double().square().sum()
