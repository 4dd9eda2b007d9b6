"""Data parallelism: plain with overlapped buckets, ZeRO stage 1, and PyTorch's own FSDP2 for stage 3.

Each replica has its own micro-batches; gradients are averaged over replicas, then AdamW steps on fp32 weights
(Loshchilov and Hutter 2017, arXiv:1711.05101). ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gpt4lib.distributed.grid import Groups
from gpt4lib.distributed.layout import Piece, Stage
from gpt4lib.distributed.tensor import gather_into, scatter_into
from gpt4lib.specs.workload import ParallelPlan

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(NamedTuple):
    """Hyperparameters; `decay` is for matrices only, `clip` the largest global norm of the gradient."""
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0

    def over(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        # fused: one pass over a long vector, where the default makes eight; decay is ours, by parameter
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, weight_decay=0, fused=True)


class Segment(NamedTuple):
    """A parameter's place in the flat vector."""
    name: str
    parameter: nn.Parameter
    start: int
    stop: int


class Flat:
    """Parameters as one vector of weights and one of gradients, in buckets that are reduced as soon as they are complete.

    The vectors are padded to n equal shards. With `zero`, a rank keeps the optimizer's state of its shard only: 1/n of
    every bucket. A gradient is added to the vector in `gradient_dtype` after each backward pass of a micro-batch; when
    all `n_micro` are in, the bucket starts its all-reduce, or reduce-scatter, while the backward pass goes on.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], pieces: dict[str, Piece], group: dist.ProcessGroup, *,
                 zero: bool, n_micro: int, replicas: int, gradient_dtype: torch.dtype, bucket_bytes: int) -> None:
        self.pieces, self.group, self.zero, self.n_micro, self.replicas = pieces, group, zero, n_micro, replicas
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.segments, length = [], 0
        for name, p in reversed(named):                        # gradients arrive from the last layer to the first
            self.segments.append(Segment(name, p, length, length + p.numel()))
            length += p.numel()
        self.length, like = length, named[0][1]
        padded = -(-length // self.n) * self.n
        self.weights = like.new_zeros(padded)
        self.gradients = torch.zeros(padded, dtype=gradient_dtype, device=like.device)
        step = max(bucket_bytes // self.gradients.element_size() // self.n, 1) * self.n
        self.buckets = [(a, min(a + step, padded)) for a in range(0, padded, step)]
        for _, p, start, stop in self.segments:
            self.weights[start:stop] = p.detach().flatten()
            p.data = self.weights[start:stop].view_as(p)
            p.register_post_accumulate_grad_hook(self._arrived)
        self.place = {id(s.parameter): s for s in self.segments}
        # the same memory as the weights where those are whole and fp32 already
        self.master = nn.Parameter(self.shard(self.weights).to(torch.promote_types(like.dtype, torch.float32)))
        self.restart()

    def shard(self, vector: Tensor) -> Tensor:
        """The rank's part of every bucket, one after the other; the whole vector itself without ZeRO."""
        parts = [vector[a:b] for a, b in self._mine()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mine(self) -> list[tuple[int, int]]:
        """Where the rank's parts lie in the vector."""
        if not self.zero:
            return [(0, self.length)]
        return [(a + (b - a) // self.n * self.rank, a + (b - a) // self.n * (self.rank + 1)) for a, b in self.buckets]

    def restart(self) -> None:
        self.gradients.zero_()
        self.seen = {s.name: 0 for s in self.segments}
        self.works: list = []

    def _arrived(self, p: nn.Parameter) -> None:
        s = self.place[id(p)]
        self.gradients[s.start:s.stop].add_(p.grad.flatten())
        p.grad = None
        self.seen[s.name] += 1
        if self.seen[s.name] == self.n_micro:
            self._launch()

    def _ready(self, s: Segment) -> bool:
        return self.seen[s.name] >= self.n_micro and not self.pieces[s.name].partial

    def _launch(self, force: bool = False) -> None:
        """Start reducing every next bucket whose gradients are final; always in the same order on all ranks."""
        while self.n > 1 and len(self.works) < len(self.buckets):
            a, b = self.buckets[len(self.works)]
            if not force and not all(self._ready(s) for s in self.segments if s.start < b and s.stop > a):
                return
            if self.zero:
                mine = torch.empty((b - a) // self.n, dtype=self.gradients.dtype, device=self.gradients.device)
                work = scatter_into(mine, self.gradients[a:b], group=self.group, async_op=True)
            else:
                mine, work = None, dist.all_reduce(self.gradients[a:b], group=self.group, async_op=True)
            self.works.append((work, mine))

    def partial_gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        for name, _, start, stop in self.segments:
            yield self.pieces[name], self.gradients[start:stop]

    def reduce(self) -> None:
        """Start what is left, wait for all, and give the mean over replicas to the optimizer."""
        self._launch(force=True)
        for (work, mine), (a, b) in zip(self.works, self.buckets):
            work.wait()
            if mine is not None:                               # back into the vector: no second buffer of that size
                self.gradients[a + self.rank * len(mine):a + (self.rank + 1) * len(mine)] = mine
        self.master.grad = self.shard(self.gradients).to(self.master.dtype).div_(self.replicas)

    def _parts(self) -> Iterator[tuple[Segment, slice]]:
        """Every parameter with its places in the shard."""
        offset = 0
        for a, b in self._mine():
            for s in self.segments:
                lo, hi = max(s.start, a), min(s.stop, b)
                if lo < hi:
                    yield s, slice(offset + lo - a, offset + hi - a)
            offset += b - a

    def norm_squared(self) -> Tensor:
        """Of the gradients that this rank answers for: summed over all ranks, each counts once."""
        mine = [squared_norm(self.master.grad[part]) for s, part in self._parts()
                if self.pieces[s.name].owned and (self.zero or self.rank == 0)]
        return sum(mine, self.master.new_zeros((), dtype=torch.float64))

    def decay(self, factor: float) -> None:
        for s, part in self._parts():
            if s.parameter.dim() > 1:
                self.master.data[part].mul_(1 - factor)

    def publish(self) -> None:
        """The stepped weights back into the model: with ZeRO every rank gathers the others' shards."""
        offset = 0
        for a, b in self._mine() if self.master.data_ptr() != self.weights.data_ptr() else ():
            self.weights[a:b] = self.master.data[offset:offset + b - a]
            offset += b - a
        if self.zero:
            for a, b in self.buckets:
                part = (b - a) // self.n
                mine = self.weights[a + part * self.rank:a + part * (self.rank + 1)].clone()
                gather_into(self.weights[a:b], mine, group=self.group)

    def whole(self, shard: Tensor) -> Tensor:
        """A shard-sized vector of the optimizer, gathered from all ranks, in the order of `segments`."""
        if not self.zero:
            return shard
        out, offset = shard.new_empty(len(self.weights)), 0
        for a, b in self.buckets:
            part = (b - a) // self.n
            gather_into(out[a:b], shard[offset:offset + part].contiguous(), group=self.group)
            offset += part
        return out


class Replicated:
    """Optimizer of a model whose weights are whole on every replica: plain data parallelism, or ZeRO-1."""

    def __init__(self, stages: list[Stage], pieces: dict[str, Piece], plan: ParallelPlan, groups: Groups, adamw: AdamW = AdamW(),
                 gradient_dtype: torch.dtype | None = None, bucket_bytes: int = 25 * 2**20) -> None:
        self.adamw, self.groups = adamw, groups
        named = [pair for stage in stages for pair in stage.named_parameters()]
        gradient_dtype = gradient_dtype or torch.promote_types(named[0][1].dtype, torch.float32)
        apart = [[pair for pair in named if (plan.ep > 1 and ".experts." in pair[0]) is experts] for experts in (False, True)]
        # experts that are spread over ranks have fewer replicas, but are averaged over as many micro-batches
        self.flats = [Flat(pairs, pieces, group, zero=plan.zero_stage > 0, n_micro=plan.n_micro_batches, replicas=plan.dp,
                           gradient_dtype=gradient_dtype, bucket_bytes=bucket_bytes)
                      for pairs, group in zip(apart, (groups.dp, groups.outer)) if pairs]
        self.optimizer = adamw.over([flat.master for flat in self.flats])

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Nothing to prepare: buckets count their micro-batches."""

    def reduce(self) -> Tensor:
        """Finish the gradients; the squared norm of those this rank answers for."""
        sum_partial([pair for flat in self.flats for pair in flat.partial_gradients()], self.groups)
        for flat in self.flats:
            flat.reduce()
        return sum(flat.norm_squared() for flat in self.flats)

    def step(self, scale: float, lr: float) -> None:
        """AdamW on gradients times `scale`, then the new weights everywhere."""
        self.optimizer.param_groups[0]["lr"] = lr
        for flat in self.flats:
            flat.master.grad.mul_(scale)
            flat.decay(lr * self.adamw.decay)
        self.optimizer.step()
        for flat in self.flats:
            flat.publish()
            flat.restart()
            flat.master.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Parameter -> its fp32 "weight" and moments, whole over replicas; collective over data-parallel ranks."""
        found: dict[str, dict[str, Tensor]] = {}
        for flat in self.flats:
            kept = self.optimizer.state.get(flat.master, {})
            for kind, shard in [("weight", flat.master.data), *((m, kept.get(m, torch.zeros_like(flat.master))) for m in MOMENTS)]:
                vector = flat.whole(shard.detach())
                for name, p, start, stop in flat.segments:
                    found.setdefault(name, {})[kind] = vector[start:stop].view_as(p)
        return found

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        """Take over what `state` gave, after `step` steps of the optimizer."""
        for flat in self.flats:
            kept = self.optimizer.state[flat.master] = {"step": torch.tensor(float(step), device=flat.master.device)}
            for kind in ("weight", *MOMENTS):
                vector = torch.zeros_like(flat.weights, dtype=flat.master.dtype)
                for name, _, start, stop in flat.segments:
                    vector[start:stop] = state[name][kind].flatten()
                if kind == "weight":
                    flat.master.data.copy_(flat.shard(vector))
                else:
                    kept[kind] = flat.shard(vector)
            flat.publish()


class FullySharded:
    """Optimizer of a model whose weights are sharded too, block by block: PyTorch's `fully_shard` (FSDP2), over all
    replicas, or over `shard` of them and copied over the rest (hybrid sharding). Zhao et al. 2023, arXiv:2304.11277."""

    def __init__(self, stages: list[Stage], pieces: dict[str, Piece], plan: ParallelPlan, groups: Groups, adamw: AdamW = AdamW(),
                 dtype: torch.dtype = torch.float32) -> None:
        self.stages, self.pieces, self.adamw, self.groups, self.ep = stages, pieces, adamw, groups, plan.ep
        mesh = groups.mesh["outer", "inner"] if plan.shard else groups.mesh["outer", "inner"]._flatten("dp")
        wide = torch.promote_types(dtype, torch.float32)
        policy = dict(mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide), reshard_after_forward=plan.pp == 1)
        for stage in stages:
            for layer in stage.layers.values():
                if plan.ep > 1 and layer.moe is not None:
                    fully_shard(layer.moe.experts, mesh=groups.mesh["outer"], **policy)
                fully_shard(layer, mesh=mesh, **policy)
            fully_shard(stage, mesh=mesh, **policy)
        self.named = [pair for stage in stages for pair in stage.named_parameters()]
        self.optimizer = adamw.over([p for _, p in self.named])

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Gradients of a step are reduced once, with the last micro-batch."""
        stage.set_requires_gradient_sync(last)
        stage.set_is_last_backward(last)

    def reduce(self) -> Tensor:
        for name, p in self.named:
            if ".experts." in name:          # their mean is over dp / ep replicas, the others' over dp (a divide factor of
                p.grad.div_(self.ep)         # FSDP's own needs NCCL, and counts twice for one replica in fp64)
        sum_partial([(self.pieces[name], p.grad.to_local().flatten()) for name, p in self.named], self.groups)
        mine = []
        for name, p in self.named:
            copies = [axis for axis, place in zip(p.device_mesh.mesh_dim_names, p.placements) if place.is_replicate()]
            if self.pieces[name].owned and all(self.groups.at[axis] == 0 for axis in copies):
                mine.append(squared_norm(p.grad.to_local().flatten()))
        return sum(mine, torch.zeros((), dtype=torch.float64, device=self.named[0][1].device))

    @torch.no_grad()
    def step(self, scale: float, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        for _, p in self.named:
            p.grad.mul_(scale)
            if p.dim() > 1:
                p.mul_(1 - lr * self.adamw.decay)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"weight": p.detach().full_tensor(),
                       **{m: self.optimizer.state[p][m].full_tensor() if p in self.optimizer.state else torch.zeros(
                           p.shape, dtype=p.dtype, device=p.device) for m in MOMENTS}} for name, p in self.named}

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        from torch.distributed.tensor import distribute_tensor
        for name, p in self.named:
            whole = {kind: distribute_tensor(t.to(p.device, p.dtype), p.device_mesh, p.placements) for kind, t in state[name].items()}
            p.copy_(whole["weight"])
            self.optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **{m: whole[m] for m in MOMENTS}}


def squared_norm(x: Tensor, row: int = 4096) -> Tensor:
    """The sum of squares of a vector, fp64: in x's own precision within short rows, so without a wide copy of x."""
    whole = len(x) // row * row
    rows = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1)
    return rows.double().square().sum() + x[whole:].double().square().sum()


def sum_partial(gradients: list[tuple[Piece, Tensor]], groups: Groups) -> None:
    """Add up, in place, what replicas of a parameter within one copy of the model each saw of its gradient.

    One collective a group: tensor-parallel ranks, sharers of a key/value head, and last the two ends of the pipeline,
    whose copies of a tied embedding have to agree before anything is sharded over replicas.
    """
    for axis in ("tp", "kv", "ends"):
        mine = [grad for piece, grad in gradients if axis in piece.partial]
        if mine:
            total = torch.cat(mine)
            dist.all_reduce(total, group=getattr(groups, axis))
            for grad, part in zip(mine, total.split([len(g) for g in mine])):
                grad.copy_(part)
