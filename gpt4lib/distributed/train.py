"""`torchrun --nproc-per-node 8 -m gpt4lib.distributed.train --tp 2 --pp 2 --dp 2 ...`: train a model on any layout."""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gpt4lib.cli import Parser, counted, layout, options
from gpt4lib.distributed import checkpoint, launch
from gpt4lib.distributed.data import AdamW
from gpt4lib.distributed.grid import ProcessGrid
from gpt4lib.distributed.layout import check
from gpt4lib.distributed.trainer import StepResult, Trainer
from gpt4lib.nn import data
from gpt4lib.profiling import count_wire, forward_flop
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan
from gpt4lib.specs.checks import positive, require, require_known

# What is trained when nobody says what: GPT-4's shape as reported, at a size for one core.
TOY = ModelSpec("toy", n_layers=4, d_model=64, n_heads=4, n_kv_heads=1, d_ff=128, vocab_size=256, context=256,
                n_experts=4, top_k=2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def parser() -> Parser:
    p = Parser(prog="gpt4lib.distributed.train", description="Train a model on any layout of processes; start it with torchrun.",
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options(p, "distributed")
    p.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    return p


def settle(args: argparse.Namespace, here: launch.Place) -> tuple[ModelSpec, ParallelPlan]:
    """What to train and how it is laid out; ValueError before any process group starts."""
    spec = TOY if args.model == "toy" else ModelSpec.load(args.model)
    require_known("dtype", args.dtype, DTYPES)
    require(args.device == "cpu" or args.device == "cuda" and torch.cuda.device_count() > here.local_rank,
            f"--device {args.device} is not here for local rank {here.local_rank}; accepted: cpu, or cuda with a GPU a process")
    counted(args, "dp", "micro_batch", "seq_len", "steps", "save_every", "timeout")
    counted(args, "warmup", "balance", least=0)
    for name in ("lr", "clip"):
        positive(f"--{name}", getattr(args, name))
    if args.metrics and not Path(args.metrics).absolute().parent.is_dir():
        raise ValueError(f"--metrics {args.metrics}: its folder does not exist; make it first")
    dp = args.dp or max(here.world_size // max(args.tp * args.pp, 1), 1)
    require(args.global_batch >= 1 and args.global_batch % (args.micro_batch * dp) == 0,
            f"global_batch={args.global_batch} is not divisible by micro_batch={args.micro_batch} x dp={dp}; change one")
    plan = ParallelPlan(**layout(args) | {"dp": dp, "n_micro_batches": args.global_batch // (args.micro_batch * dp)})
    ProcessGrid.of(plan).check(here.world_size, here.per_node)
    check(spec, plan, args.seq_len)
    if args.hardware:
        DeviceSpec.preset(args.hardware).peak_flop_rate(args.dtype)
    return spec, plan


def tokens_of(args: argparse.Namespace) -> Tensor:
    """What it is trained on; ValueError if that is less than a sequence."""
    tokens = data.read(args.data) if args.data else data.split()[0]
    if len(tokens) < args.seq_len + 1:
        raise ValueError(f"the data holds {len(tokens)} tokens; give at least seq_len + 1 = {args.seq_len + 1}")
    return tokens


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth. Hoffmann et al. 2022, arXiv:2203.15556, section 3.1, use the same."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1)))


class Report:
    """Rank 0's progress on stderr and its log; silent on the others."""

    def __init__(self, args: argparse.Namespace, spec: ModelSpec, plan: ParallelPlan) -> None:
        self.args, self.speaks = args, dist.get_rank() == 0
        self.tokens = plan.global_batch * args.seq_len
        self.flop = 3 * forward_flop(spec, plan.global_batch, args.seq_len) if self.speaks else 0      # backward is twice forward
        self.peak = plan.n_devices * DeviceSpec.preset(args.hardware).peak_flop_rate(args.dtype) if args.hardware else None

    def __call__(self, step: int, result: StepResult, lr: float, seconds: float, sent: list[dict[str, int]] | None) -> None:
        if not self.speaks:
            return
        record = {"step": step, **result._asdict(), "lr": lr, "seconds": seconds, "tokens_per_second": self.tokens / seconds,
                  "flop_per_second": self.flop / seconds, "mfu": self.peak and self.flop / seconds / self.peak,
                  **({"sent_bytes_by_rank": sent} if sent else {})}
        if self.args.metrics:
            with open(self.args.metrics, "a", encoding="utf8") as file:
                file.write(json.dumps(record) + "\n")
        last, live = step == self.args.steps, sys.stderr.isatty()
        if live or last or step % max(self.args.steps // 20, 1) == 0:
            bar = "#" * round(20 * step / self.args.steps)
            mfu = f"  mfu {record['mfu']:.1%}" if self.peak else ""
            sys.stderr.write(f"{chr(13) if live else ''}[{bar:<20}] step {step}/{self.args.steps}  loss {result.loss:.4f}  "
                             f"{record['tokens_per_second']:,.0f} tokens/s{mfu}{chr(10) if last or not live else ''}")
            sys.stderr.flush()


def run(args: argparse.Namespace, spec: ModelSpec, plan: ParallelPlan, tokens: Tensor) -> None:
    """Train in the initialised world."""
    device = f"cuda:{torch.cuda.current_device()}" if args.device == "cuda" else "cpu"
    trainer = Trainer(spec, plan, args.seq_len, adamw=AdamW(args.lr, clip=args.clip), balance=args.balance if spec.is_moe else 0,
                      seed=args.seed, dtype=DTYPES[args.dtype], device=device, timeout=timedelta(seconds=args.timeout))
    if args.checkpoint and (found := checkpoint.latest(args.checkpoint)):
        checkpoint.load(found, trainer)
    report, first = Report(args, spec, plan), trainer.steps
    while (step := trainer.steps) < args.steps:
        start, lr = time.perf_counter(), learning_rate(step, args)
        # every rank draws where all sequences of this step start, and reads its own
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - args.seq_len, (plan.global_batch,), generator=generator)
        rows = [data.at(tokens, mine, args.seq_len) for mine in trainer.rows(starts)]
        sent = None
        with count_wire() if step == first else nullcontext() as wire:      # counting slows every operator: one step is enough
            _, result = trainer.step(rows, lr)
        if wire:
            sent = [None] * plan.n_devices
            dist.all_gather_object(sent, wire.sent())
        report(trainer.steps, result, lr, time.perf_counter() - start, sent)
        if args.checkpoint and (trainer.steps % args.save_every == 0 or trainer.steps == args.steps):
            checkpoint.save(args.checkpoint, trainer)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when trained, 2 on bad input, one line on stderr of rank 0; a failing rank names itself and ends the job."""
    here = launch.place()
    try:
        args = parser().parse_args(argv)
        spec, plan = settle(args, here)
        tokens = tokens_of(args)
        launch.join_world(args.timeout, args.device)
        run(args, spec, plan, tokens)
    except (ValueError, OSError) as error:
        if here.rank == 0 or dist.is_initialized():                      # before, every rank says the same
            who = f"rank {here.rank}: " if dist.is_initialized() else ""
            sys.stderr.write(f"gpt4lib.distributed.train: {who}{' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        sys.stderr.write(f"rank {here.rank} of {here.world_size} failed: {type(error).__name__}: {error}\n")
        raise
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
