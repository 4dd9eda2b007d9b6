"""What parallel training has to equal: one process, PyTorch's own clipping and AdamW, no code of gpt4lib.distributed."""

from __future__ import annotations

import importlib
import sys
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt4lib.distributed.data import AdamW
from gpt4lib.distributed.launch import launch
from gpt4lib.distributed.layout import Piece, window
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.nn.moe import balance_loss, routings
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs import ModelSpec
from gpt4lib.specs.workload import ParallelPlan

SEQ = 8
ADAMW = AdamW(lr=1e-2, clip=0.8)                     # clips in some of the first steps and not in others
DENSE = ModelSpec("dense", n_layers=4, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=37, context=16)
MIXED = DENSE.with_(name="mixed", n_experts=4, top_k=2, d_expert=8, moe_layers=(1, 2, 3))
BIASED = DENSE.with_(name="biased", qkv_bias=True, out_bias=True, ffn_bias=True, head_bias=True)
Named = dict[str, Tensor]


class Run(NamedTuple):
    """What is compared; a rank's has pieces, and tensors of its pieces only."""
    losses: list[float]
    balances: list[float]
    norms: list[float]
    gradients: Named                                 # of the last step, before clipping
    weights: Named                                   # after the last step
    pieces: dict[str, Piece] = {}


def data(spec: ModelSpec, rows: int, steps: int, seq: int = SEQ) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(spec.vocab_size, (rows, seq + 1), generator=g) for _ in range(steps)]


def alone(spec: ModelSpec, batches: list[Tensor], n_micro: int, balance: float = 0.01, dtype: torch.dtype = torch.float64,
          model: Transformer | None = None, adamw: AdamW = ADAMW) -> Run:
    """The oracle."""
    model = model or Transformer(spec).to(dtype)
    alike = [[p for name, p in model.named_parameters() if (p.dim() > 1 and not name.endswith("bias")) is matrix]
             for matrix in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=alike[0], weight_decay=adamw.decay), dict(params=alike[1], weight_decay=0)],
                                  adamw.lr, adamw.betas, adamw.eps)
    losses, balances, norms = [], [], []
    for batch in batches:
        optimizer.zero_grad()
        loss = extra = 0
        for micro in batch.chunk(n_micro):
            with routings(model) as seen:
                logits = model(micro[:, :-1])
            loss += F.cross_entropy(logits.flatten(0, 1), micro[:, 1:].flatten()) / n_micro
            extra += sum(map(balance_loss, seen)) / max(len(seen), 1) / n_micro
        (loss + balance * extra).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip).item())
        optimizer.step()
        losses.append(loss.item())
        balances.append(torch.as_tensor(extra).item())
    return Run(losses, balances, norms, gradients, {name: p.detach() for name, p in model.named_parameters()})


def gradients(trainer: Trainer) -> Named:
    """This rank's pieces of the reduced gradients, whole over replicas; collective over data-parallel ranks."""
    if trainer.plan.zero_stage == 3:
        return {name: p.grad.full_tensor().clone() for name, p in trainer.optimizer.named}
    return {name: vector[start:stop].view_as(p).clone() for flat in trainer.optimizer.flats
            for vector in [flat.whole(flat.master.grad)] for name, p, start, stop in flat.segments}


def unreduced(it: Trainer) -> Named:
    """What the backward passes of this rank alone left, before anything is summed or averaged."""
    return {s.name: f.gradients[s.start:s.stop].view_as(s.parameter).clone() for f in it.optimizer.flats for s in f.segments}


def weights(trainer: Trainer) -> Named:
    return {name: t.clone() for name, t in trainer.optimizer.state("weight").items()}


def trainer(spec: ModelSpec, plan: ParallelPlan, **options) -> Trainer:
    return Trainer(spec, plan, SEQ, **{"adamw": ADAMW, "balance": 0.01, "dtype": torch.float64, "bucket_bytes": 4000, **options})


def on_a_rank(spec: ModelSpec, plan: ParallelPlan, steps: int = 5, **options) -> Run:
    """`steps` steps of a trainer on the batches the oracle sees."""
    it, results = trainer(spec, plan, **options), []
    for batch in data(spec, plan.global_batch, steps):
        _, result = it.backward(batch)
        results.append(result)
        grads = gradients(it)
        it.optimizer.step(min(1.0, it.adamw.clip / (result.gradient_norm + 1e-6)), it.adamw.lr)
    return Run(*map(list, zip(*results)), grads, weights(it), it.pieces)


def several(cases: dict[str, tuple]) -> dict[str, Run]:
    """All cases of one world size in one launch; an error says which case."""
    runs = {}
    for name, (spec, plan) in cases.items():
        try:
            runs[name] = on_a_rank(spec, plan)
        except Exception as error:
            error.add_note(f"in the case {name!r}")
            raise
    return runs


def compare(ranks: list[Run], expected: Run, *, atol: float, rtol: float = 0) -> None:
    """Losses and norms of every rank, and each of its pieces of every gradient and weight, are the oracle's."""
    close = dict(rtol=rtol, atol=atol)
    for run in ranks:
        for numbers in ("losses", "balances", "norms"):
            torch.testing.assert_close(getattr(run, numbers), getattr(expected, numbers), **close,
                                       msg=lambda m: f"{numbers}: {m}")
        for what in ("gradients", "weights"):
            for name, mine in getattr(run, what).items():
                full = getattr(expected, what)[name].to(mine.dtype)
                torch.testing.assert_close(mine, run.pieces[name].take(full), **close, msg=lambda m: f"{what} of {name}: {m}")


def replicas_agree(ranks: list[Run]) -> int:
    """Ranks with the same piece of a parameter hold the same bits; the number of pairs compared."""
    first: dict[tuple, Tensor] = {}
    compared = 0
    for run in ranks:
        for name, mine in run.weights.items():
            kept = first.setdefault((name, run.pieces[name].cuts), mine)
            assert torch.equal(kept, mine), f"{name} differs between ranks"
            compared += kept is not mine
    return compared


def covered(ranks: list[Run], plan: ParallelPlan, shapes: Named) -> None:
    """The ranks' pieces hold every element of every parameter, and owners exactly once a replica."""
    held, owned = ({name: torch.zeros(p.shape, dtype=torch.long) for name, p in shapes.items()} for _ in range(2))
    for run in ranks:
        assert set(run.weights) == set(run.gradients) == set(run.pieces)
        for name, p in run.pieces.items():
            for box in p.chunks():
                window(held[name], box.offsets, box.sizes).add_(1)
                window(owned[name], box.offsets, box.sizes).add_(int(p.owned))
    for name in shapes:
        assert held[name].min() > 0 and (owned[name] == plan.dp // (plan.ep if ".experts." in name else 1)).all(), name


def same_rows(plan: ParallelPlan) -> Tensor:
    """A batch of one sequence again and again: every micro-batch of every replica has the same gradient."""
    return data(DENSE, 1, 1)[0].repeat(plan.global_batch, 1)


class Workers:
    """What a module of tests runs on several processes: all workers for one number of them in one launch."""

    def __init__(self, module: str) -> None:
        self.module, self.by_size, self.results = module, {}, {}

    def on(self, n: int) -> Callable:
        """Decorates a worker for n processes. Calling it in a test gives its results by rank; it is judged there."""
        def add(worker: Callable) -> Callable:
            self.by_size.setdefault(n, []).append(worker)
            return lambda: [results[worker.__name__] for results in self._launched(n)]
        return add

    def _launched(self, n: int) -> list:
        if n not in self.results:
            self.results[n] = RuntimeError("the launch failed: see the first test that needed it")
            try:
                self.results[n] = launch(n, work, self.module, n)
            except RuntimeError as error:
                # Seen once in some hundred launches and never again, in 80 more under load and with malloc's checks on:
                # a rank died in native code. Its stack stands on stderr; a second death is a failure.
                if "exit code -11" not in str(error):
                    raise
                print(f"{self.module} on {n} processes: {error}; trying once more", file=sys.stderr)
                self.results[n] = launch(n, work, self.module, n)
        if isinstance(self.results[n], Exception):
            raise self.results[n]
        return self.results[n]


def work(module: str, n: int) -> dict:
    results = {}
    for worker in importlib.import_module(module).workers.by_size[n]:
        try:
            results[worker.__name__] = worker()
        except Exception as error:
            error.add_note(f"in the worker {worker.__name__!r}")
            raise
    return results
