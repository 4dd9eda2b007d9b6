"""One training step on any layout: pipeline, sum, clip, step. What `train.py` repeats and the tests compare."""

import math
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gpt4lib.distributed.data import AdamW, FullySharded, Replicated
from gpt4lib.distributed.grid import connect
from gpt4lib.distributed.layout import build, check
from gpt4lib.distributed.pipeline import Pipeline, StepRecord
from gpt4lib.nn.numerics import Numerics
from gpt4lib.specs import ModelSpec, ParallelPlan


class StepResult(NamedTuple):
    """The same on every rank: mean cross-entropy, mean balance loss of the mixture layers, norm before clipping."""
    loss: float
    balance: float
    gradient_norm: float


class Trainer:
    """A model laid out by `plan` over the initialised world, with its optimizer.

    bfloat16 weights have fp32 masters and gradients. Noise (a router's jitter) is
    drawn from the seed, the step and the replica: the same on ranks that hold the same tokens, and again after a resume
    in the same layout. ValueError, one line, for a plan, a sequence length or a batch that does not fit;
    FloatingPointError, before anything is changed, when a gradient is not finite.
    """

    def __init__(self, spec: ModelSpec, plan: ParallelPlan, seq_len: int, *, adamw: AdamW = AdamW(), balance: float = 0.0,
                 seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", numerics: Numerics = Numerics(),
                 bucket_bytes: int = 25 * 2**20, timeout: timedelta | None = None) -> None:
        check(spec, plan, seq_len)
        sharded = plan.zero_stage == 3
        self.spec, self.plan, self.seq_len, self.adamw, self.device, self.seed = spec, plan, seq_len, adamw, device, seed
        self.groups = connect(plan, spec, torch.device(device).type, timeout)
        self.stages, self.pieces = build(spec, plan, self.groups, seed=seed, numerics=numerics, device=device,
                                         dtype=torch.promote_types(dtype, torch.float32) if sharded else dtype)
        self.optimizer = (FullySharded(self.stages, self.pieces, plan, self.groups, adamw, dtype) if sharded else
                          Replicated(self.stages, self.pieces, plan, self.groups, adamw, bucket_bytes))
        self.pipeline = Pipeline(self.stages, self.optimizer, dtype, balance)
        self.steps = 0

    def rows(self, batch: Tensor) -> list[Tensor]:
        """This replica's micro-batches of a global batch [global_batch, ..]: each is spread over all replicas."""
        plan = self.plan
        if len(batch) != plan.global_batch:
            raise ValueError(f"a batch of {len(batch)} is not micro_batch={plan.micro_batch} x n_micro_batches="
                             f"{plan.n_micro_batches} x dp={plan.dp}; give {plan.global_batch} sequences")
        return list(batch.view(plan.n_micro_batches, plan.dp, plan.micro_batch, *batch.shape[1:])[:, self.groups.at["dp"]])

    def backward(self, batch: Tensor | list[Tensor]) -> tuple[StepRecord, StepResult]:
        """Forward and backward of int64 [global_batch, seq_len + 1], gradients reduced and waiting for `step`.

        A rank that has read its own `rows` already gives the list of them.
        """
        micro = [m.to(self.device) for m in (self.rows(batch) if isinstance(batch, Tensor) else batch)]
        low, high = torch.stack(micro).aminmax()
        if low < 0 or high >= self.spec.vocab_size or micro[0].shape[1] != self.seq_len + 1:
            raise ValueError(f"sequences of {micro[0].shape[1]} tokens from {low} to {high} are not accepted; give "
                             f"seq_len + 1 = {self.seq_len + 1} of them, from 0 to vocab_size - 1 = {self.spec.vocab_size - 1}")
        at = self.groups.at
        self.optimizer.restart()
        with torch.random.fork_rng([micro[0].device] if micro[0].is_cuda else []):
            torch.manual_seed((self.seed * 1_000_003 + self.steps) * 2**20 + at["dp"] * 2**8 + at["pp"])
            record = self.pipeline.step([m[:, :-1] for m in micro], [m[:, 1:] for m in micro])
        norm = self.optimizer.reduce()
        first = at["tp"] == 0
        total = torch.tensor([first * record.loss / self.plan.dp, first * record.balance / self.plan.dp, norm.item()],
                             dtype=torch.float64, device=norm.device)
        dist.all_reduce(total)
        loss, balance, squared = total.tolist()
        return record, StepResult(loss, balance / max(self.spec.n_moe_layers, 1), squared ** 0.5)

    def step(self, batch: Tensor | list[Tensor], lr: float | None = None) -> tuple[StepRecord, StepResult]:
        """One optimizer step; the gradient is scaled down to `clip` where its global norm is larger."""
        record, result = self.backward(batch)
        if not math.isfinite(result.gradient_norm):
            raise FloatingPointError(f"the gradient's norm is {result.gradient_norm} at step {self.steps + 1}, with a loss of "
                                     f"{result.loss:.4g}; the weights are as before: lower lr or clip, or skip these data")
        scale = min(1.0, self.adamw.clip / (result.gradient_norm + 1e-6))
        self.optimizer.step(scale, self.adamw.lr if lr is None else lr)
        self.steps += 1
        return record, result
