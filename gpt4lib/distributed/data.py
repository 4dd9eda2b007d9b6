"""Data parallelism: plain with overlapped buckets, ZeRO stage 1, and PyTorch's own FSDP2 for stage 3.

Each replica has its own micro-batches; gradients are averaged over replicas, then AdamW steps on fp32 weights
(Loshchilov and Hutter 2017, arXiv:1711.05101). ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from gpt4lib.distributed.flat import Flat, decays, squared_norm
from gpt4lib.distributed.grid import Groups
from gpt4lib.distributed.layout import Piece, Stage
from gpt4lib.specs.workload import ParallelPlan

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


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


class _Optimizer:
    """What both kinds share: AdamW over some tensors, each with its moments."""
    optimizer: torch.optim.AdamW

    def _kept(self, p: Tensor, kind: str) -> Tensor:
        return {"weight": p.detach(), **self.optimizer.state.get(p, {})}.get(kind, torch.zeros_like(p))

    def _take(self, p: Tensor, kind: str, value: Tensor, step: int) -> None:
        self.optimizer.state[p]["step"] = torch.tensor(float(step), device=p.device)
        if kind == "weight":
            p.detach().copy_(value)
        else:
            self.optimizer.state[p][kind] = value


class Replicated(_Optimizer):
    """Optimizer of a model whose weights are whole on every replica: plain data parallelism, or ZeRO-1."""

    def __init__(self, stages: list[Stage], pieces: dict[str, Piece], plan: ParallelPlan, groups: Groups, adamw: AdamW = AdamW(),
                 bucket_bytes: int = 25 * 2**20) -> None:
        self.adamw, self.groups = adamw, groups
        named = [pair for stage in stages for pair in stage.named_parameters()]
        apart = [[pair for pair in named if (plan.ep > 1 and ".experts." in pair[0]) is experts] for experts in (False, True)]
        # experts that are spread over ranks have fewer replicas, but are averaged over as many micro-batches
        self.flats = [Flat(pairs, pieces, group, zero=plan.zero_stage > 0, n_micro=plan.n_micro_batches, replicas=plan.dp,
                           bucket_bytes=bucket_bytes)
                      for pairs, group in zip(apart, (groups.dp, groups.outer)) if pairs]
        self.optimizer = adamw.over([flat.master for flat in self.flats])

    def restart(self) -> None:
        for flat in self.flats:
            flat.restart()

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Nothing to prepare: buckets count their micro-batches."""

    def reduce(self) -> Tensor:
        """Finish the gradients; the squared norm of those this rank answers for."""
        gradients = [(flat.pieces[s.name], flat.gradients[s.start:s.stop]) for flat in self.flats for s in flat.segments]
        sum_partial(gradients, self.groups)
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

    def state(self, kind: str) -> dict[str, Tensor]:
        """Parameter -> its fp32 "weight", "exp_avg" or "exp_avg_sq", on the host; collective over data-parallel ranks.

        It is gathered whole over replicas, so for a while a rank's host holds 4 bytes for each of its parameters. On a
        CPU without ZeRO these are the optimizer's own tensors, which the next step changes.
        """
        found: dict[str, Tensor] = {}
        for flat in self.flats:
            vector = flat.whole(self._kept(flat.master, kind)).cpu()
            found |= {name: vector[start:stop].view_as(p) for name, p, start, stop in flat.segments}
        return found

    def load(self, kind: str, state: dict[str, Tensor], step: int) -> None:
        """Take over what `state(kind)` gave, after `step` steps of the optimizer."""
        for flat in self.flats:
            vector = torch.zeros_like(flat.weights, dtype=flat.master.dtype)
            for name, _, start, stop in flat.segments:
                vector[start:stop] = state[name].flatten()
            self._take(flat.master, kind, flat.shard(vector).clone(), step)      # a shard, not a window on the whole
            if kind == "weight":
                flat.publish()


class FullySharded(_Optimizer):
    """Optimizer of a model whose weights are sharded too, block by block: PyTorch's `fully_shard` (FSDP2), over all
    replicas, or over `shard` of them and copied over the rest (hybrid sharding). Zhao et al. 2023, arXiv:2304.11277."""

    def __init__(self, stages: list[Stage], pieces: dict[str, Piece], plan: ParallelPlan, groups: Groups, adamw: AdamW = AdamW(),
                 dtype: torch.dtype = torch.float32) -> None:
        self.pieces, self.adamw, self.groups, self.ep = pieces, adamw, groups, plan.ep
        mesh = groups.mesh["outer", "inner"] if plan.shard else groups.replicas
        wide = torch.promote_types(dtype, torch.float32)
        # under a pipeline weights stay gathered from a forward pass to the next backward one, as torchtitan has them
        policy = dict(mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide), reshard_after_forward=plan.pp == 1)
        for stage in stages:
            for layer in stage.layers.values():
                if plan.ep > 1 and layer.moe is not None:
                    fully_shard(layer.moe.experts, mesh=groups.mesh["outer"], **policy)
                fully_shard(layer, mesh=mesh, **policy)
            fully_shard(stage, mesh=mesh, **policy)
        self.named = [pair for stage in stages for pair in stage.named_parameters()]
        self.optimizer = adamw.over([p for _, p in self.named])

    def restart(self) -> None:
        self.optimizer.zero_grad()

    def before_backward(self, stage: Stage, last: bool) -> None:
        """Gradients of a step are reduced once, with the last micro-batch; until then each rank keeps them whole."""
        stage.set_requires_gradient_sync(last)
        stage.set_is_last_backward(last)

    def reduce(self) -> Tensor:
        for name, p in self.named:
            if ".experts." in name:          # their mean is over dp / ep replicas, the others' over dp (a divide factor of
                p.grad.div_(self.ep)         # FSDP's own needs NCCL, and counts twice for one replica in fp64)
        sum_partial([(self.pieces[name], p.grad.to_local().flatten()) for name, p in self.named], self.groups)
        total = torch.zeros((), dtype=torch.float64, device=self.named[0][1].device)
        for name, p in self.named:
            copies = [axis for axis, place in zip(p.device_mesh.mesh_dim_names, p.placements) if place.is_replicate()]
            if self.pieces[name].owned and all(self.groups.at[axis] == 0 for axis in copies):
                total += squared_norm(p.grad.to_local().flatten())
        return total

    @torch.no_grad()
    def step(self, scale: float, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        for name, p in self.named:
            p.grad.mul_(scale)
            if decays(name, p):
                p.mul_(1 - lr * self.adamw.decay)
        self.optimizer.step()

    def state(self, kind: str) -> dict[str, Tensor]:
        """As in `Replicated`, gathered one parameter at a time."""
        return {name: self._kept(p, kind).full_tensor().detach().cpu() for name, p in self.named}

    @torch.no_grad()
    def load(self, kind: str, state: dict[str, Tensor], step: int) -> None:
        for name, p in self.named:
            # every rank holds the whole tensor: nothing to send
            part = distribute_tensor(state[name].to(p.device, p.dtype), p.device_mesh, p.placements, src_data_rank=None)
            self._take(p, kind, part, step)


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
