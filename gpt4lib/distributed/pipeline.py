"""The pipeline itself: a replay of a `Schedule` by one rank, with its neighbours at the other end of each link."""

import contextlib
import time
from dataclasses import dataclass, field
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gpt4lib.distributed.data import FullySharded, Replicated
from gpt4lib.distributed.layout import Stage
from gpt4lib.distributed.schedule import Action, Schedule, Span
from gpt4lib.nn.moe import balance_loss, routings


@dataclass
class StepRecord:
    """What one rank did in a step: its losses (zero on ranks that do not compute them) and its actions in time."""
    loss: float = 0.0                # mean cross-entropy of this replica, on the last stage
    balance: float = 0.0             # sum over this rank's mixture layers of their balance loss
    in_flight: int = 0               # forwards held at most
    spans: list[Span] = field(default_factory=list)


class Pipeline:
    """Runs the forward and backward passes of one step on this rank's chunks of the model.

    `stages` are the rank's chunks in order, `dtype` that of hidden states; gradients go to the optimizer, of the loss
    averaged over micro-batches. A pipeline of one stage is plain gradient accumulation. `balance` weights the mixture
    layers' balance loss, each counted over all replicas of the micro-batch. Recorded times are the host's: on CUDA, when
    work was queued.
    """

    def __init__(self, stages: list[Stage], optimizer: Replicated | FullySharded, dtype: torch.dtype,
                 balance: float = 0.0) -> None:
        self.stages, self.optimizer, self.dtype, self.balance = stages, optimizer, dtype, balance
        self.plan, self.groups, self.spec = stages[0].plan, stages[0].groups, stages[0].spec
        self.schedule = Schedule(self.plan.pp, self.plan.n_micro_batches, self.plan.schedule, self.plan.n_chunks)
        self.rank, self.moe_layers = self.groups.at["pp"], max(self.spec.n_moe_layers, 1)
        self.device = next(stages[0].parameters()).device

    def step(self, tokens: Sequence[Tensor], targets: Sequence[Tensor]) -> StepRecord:
        """One int64 [micro_batch, seq_len] a micro-batch, each given to every stage; only the ends look at them."""
        self.record, self.saved, self.sends, self.batches = StepRecord(), {}, [], (tokens, targets)
        batch, length = tokens[0].shape
        self.hidden = batch, length // (self.plan.tp if self.plan.sequence_parallel else 1), self.spec.d_model
        for action in self.schedule.order(self.rank):
            self.start = time.perf_counter()
            (self._forward if action.kind == "F" else self._backward)(action)
            self.record.in_flight = max(self.record.in_flight, len(self.saved))
            self.record.spans.append(Span(self.rank, action, self.start, time.perf_counter()))
        for work, _ in self.sends:                       # until here the buffers have to live
            work.wait()
        self.record.loss, self.record.balance = float(self.record.loss), float(self.record.balance)
        return self.record

    def _forward(self, action: Action) -> None:
        _, m, c = action
        stage = self.stages[c]
        x = self.batches[0][m] if stage.first else self._receive("F").requires_grad_()
        with routings(stage) if self.balance else contextlib.nullcontext([]) as seen:
            out = stage(x)
        extra = []
        if seen:
            balance = sum(balance_loss(r, group=self.groups.dp) for r in seen)
            self.record.balance += balance.detach() / self.plan.n_micro_batches
            # a router stands inside a region, where gradients are summed over the tensor-parallel ranks
            extra = [balance * (self.balance / self.moe_layers / self.plan.n_micro_batches / self.plan.tp)]
        if stage.last:
            out = stage.loss(out, self.batches[1][m]) / self.plan.n_micro_batches      # once, before backward
            self.record.loss += out.detach()                                             # no .item(): that would wait
        else:
            self._send("F", out)
        self.saved[m, c] = x, [out, *extra]

    def _backward(self, action: Action) -> None:
        _, m, c = action
        stage, (x, roots) = self.stages[c], self.saved.pop((m, c))
        grads = [None if stage.last else self._receive("B"), None]                 # losses need none
        self.optimizer.before_backward(stage, last=m == self.plan.n_micro_batches - 1)
        torch.autograd.backward(roots, grads[:len(roots)])
        if not stage.first:
            self._send("B", x.grad)

    def _send(self, kind: str, x: Tensor) -> None:
        x = x.detach().contiguous()
        peer = self._peer(self.rank + (1 if kind == "F" else -1))
        self.sends.append((dist.isend(x, peer, group=self.groups.edges[kind, self.rank]), x))

    def _receive(self, kind: str) -> Tensor:
        stage = (self.rank + (-1 if kind == "F" else 1)) % self.plan.pp
        x = torch.empty(self.hidden, device=self.device, dtype=self.dtype)
        dist.recv(x, self._peer(stage), group=self.groups.edges[kind, stage])
        self.start = time.perf_counter()                 # waiting is not work
        return x

    def _peer(self, stage: int) -> int:
        """The rank of another stage of this pipeline; past the last comes the first."""
        return self.groups.grid.rank(stage % self.plan.pp, self.groups.at["dp"], self.groups.at["tp"])
