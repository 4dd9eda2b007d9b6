"""Every dimension of parallel training against PyTorch's own of the same layout: step time, bytes sent, optimizer bytes.

    python benchmarks/parallel.py                                    2 and 4 processes, writes results/parallel_cpu.json
    torchrun --nproc-per-node 4 benchmarks/parallel.py --device cuda    on a machine with 4 GPUs, results/parallel_cuda.json

With more processes than cores the seconds say nothing about scaling: only the ratio of two programs at the same layout does.
Seconds of the CPU, summed over ranks, are recorded too: they hardly depend on who else uses the machine. `--case data,zero --processes 2`
measures these again and keeps the other rows of the same machine and day.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import runner
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gpt4lib import ModelSpec
from gpt4lib.distributed.expert import ParallelExperts
from gpt4lib.distributed.grid import connect
from gpt4lib.distributed.launch import join_world, launch, place
from gpt4lib.distributed.layout import build
from gpt4lib.distributed.pipeline import Pipeline
from gpt4lib.distributed.tensor import ColumnParallelLinear, RowParallelLinear
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.kernels.experts import experts
from gpt4lib.nn.moe import Experts
from gpt4lib.nn.transformer import Transformer
from gpt4lib.profiling.wire import count_wire
from gpt4lib.specs.workload import ParallelPlan

SPEC = ModelSpec(name="benchmark", n_layers=4, d_model=512, n_heads=8, head_dim=64, d_ff=2048, vocab_size=1024, context=256)
GPU_SPEC = SPEC.with_(n_layers=8, d_model=4096, n_heads=32, head_dim=128, d_ff=16384, vocab_size=32768, context=2048)
RUNS, WARM_UP = 9, 2


def sizes(device: str) -> tuple[ModelSpec, int, int]:
    """The model, tokens of a sequence, and sequences of a micro-batch."""
    return (GPU_SPEC, 2048, 1) if device == "cuda" else (SPEC, 128, 1)


def compare(ours, peer, name: str, alike) -> dict:
    """Both once for the bytes, then in turn for the seconds; `alike` raises unless they computed the same."""
    calls, sent = {"gpt4lib": ours, name: peer}, {}
    for who, call in calls.items():
        call()                                                  # what is set up in the first step is not counted
        with count_wire() as wire:
            call()
        sent[who] = wire.sent()
    alike()

    cpu: dict[str, list[float]] = {who: [] for who in calls}

    def together(who, call):
        def run() -> None:
            start = time.process_time()
            call()
            cpu[who].append(time.process_time() - start)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            dist.barrier()                                      # the slowest rank is the step
        return run
    times = runner.interleaved({who: together(who, call) for who, call in calls.items()}, runs=RUNS, warm_up=WARM_UP)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (sent, cpu))
    out = runner.summary(times, "gpt4lib", name)
    spent = {who: [sum(rank[who][i] for _, rank in every) for i in range(WARM_UP, WARM_UP + RUNS)] for who in calls}
    cpu_out = runner.summary(spent, "gpt4lib", name)
    return {**out, "cpu_seconds_of_all_ranks": cpu_out["seconds"], "times_less_cpu": cpu_out["times_faster"],
            "bytes_sent_by_rank": {who: [s[who] for s, _ in every] for who in calls}}


def close(ours: torch.Tensor, peer: torch.Tensor) -> None:
    torch.testing.assert_close(ours, peer, rtol=0, atol=2e-4 * float(peer.abs().max()) + 1e-9)


def trained(model: nn.Module, x: torch.Tensor, result: dict):
    """A forward and backward pass; the input's gradient is kept."""
    def step() -> None:
        model.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        model(leaf).square().mean().backward()
        result[model] = leaf.grad
    return step


def tensor_mlp(device: str) -> dict:
    """Column- and row-parallel layers against `parallelize_module`."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    spec, tokens, _ = sizes(device)
    mesh, result = init_device_mesh(device, (dist.get_world_size(),)), {}
    torch.manual_seed(0)
    x = torch.randn(2 * tokens, spec.d_model, device=device)
    full = [(nn.Linear(spec.d_model, spec.d_ff, device=device), nn.Linear(spec.d_ff, spec.d_model, device=device))
            for _ in range(spec.n_layers)]
    ours = nn.Sequential(*(m for up, down in full for m in (ColumnParallelLinear(up, mesh.get_group()), nn.GELU(),
                                                            RowParallelLinear(down, mesh.get_group()))))
    cuts = {str(3 * i + at): cut() for i in range(spec.n_layers) for at, cut in ((0, ColwiseParallel), (2, RowwiseParallel))}
    peer = parallelize_module(nn.Sequential(*(m for up, down in full for m in (up, nn.GELU(), down))), mesh, cuts)
    return compare(trained(ours, x, result), trained(peer, x, result), "parallelize_module",
                   lambda: close(result[ours], result[peer]))


class Layers(nn.Module):
    """Transformer layers one after the other, without embedding and head."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        for layer in self.layers:
            x = layer(x, None, positions)
        return x


def tensor_transformer(device: str) -> dict:
    """The layers of a dense transformer against `parallelize_module`, with its advice to prepare attention's input once."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
    spec, tokens, batch = sizes(device)
    n, result = dist.get_world_size(), {}
    plan = ParallelPlan(tp=n)
    groups = connect(plan, spec, device)
    ours = Layers(build(spec, plan, groups, device=device)[0][0].layers.values())
    peer = Layers(Transformer(spec).to(device).layers)
    once = (Replicate(), None, None)
    for layer in peer.layers:
        layer.attention.spec = spec.with_(n_heads=spec.n_heads // n, n_kv_heads=spec.n_kv_heads // n)
        parallelize_module(layer, groups.mesh["tp"], {
            "attention": PrepareModuleInput(input_layouts=once, desired_input_layouts=once),
            **{f"attention.{w}": ColwiseParallel() for w in ("query", "key", "value")}, "attention.out": RowwiseParallel(),
            "ffn.up": ColwiseParallel(), "ffn.down": RowwiseParallel()})
    torch.manual_seed(0)
    x = torch.randn(2 * batch, tokens, spec.d_model, device=device)
    return compare(trained(ours, x, result), trained(peer, x, result), "parallelize_module",
                   lambda: close(result[ours], result[peer]))


class Unreduced:
    """The pipeline alone, without an optimizer: gradients stay where they are."""

    def before_backward(self, stage, last: bool) -> None:
        pass


def staged(device: str, n_micro: int):
    """A pipeline of all ranks: plan, this rank's stage twice over, and the micro-batches."""
    spec, tokens, batch = sizes(device)
    plan = ParallelPlan(pp=dist.get_world_size(), micro_batch=batch, n_micro_batches=n_micro)
    groups = connect(plan, spec, device)
    stages = [build(spec, plan, groups, device=device)[0][0] for _ in "ab"]
    torch.manual_seed(0)
    rows = torch.randint(spec.vocab_size, (n_micro * batch, tokens + 1), device=device)
    return plan, groups, stages, rows


def pipeline(device: str) -> dict:
    """1F1B against `torch.distributed.pipelining.Schedule1F1B` on the same stages."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    n, rank = dist.get_world_size(), dist.get_rank()
    plan, groups, (mine, other), rows = staged(device, 2 * n)
    ours = Pipeline([mine], Unreduced(), torch.float32)
    theirs = Schedule1F1B(PipelineStage(other, rank, n, torch.device(device), group=groups.mesh.get_group("pp")), 2 * n,
                          loss_fn=lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten()))
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    micro = [(a, b) for a, b in zip(x.split(plan.micro_batch), y.split(plan.micro_batch))]

    def step() -> None:
        mine.zero_grad(set_to_none=True)
        ours.step(*zip(*micro))

    def peer() -> None:
        other.zero_grad(set_to_none=True)
        theirs.step(*([x] if rank == 0 else []), **({"target": y, "losses": []} if rank == n - 1 else {}), return_outputs=False)
    return compare(step, peer, "Schedule1F1B",
                   lambda: [close(p.grad, q.grad) for p, q in zip(mine.parameters(), other.parameters())])


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state that this rank really holds."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def data(device: str, zero: bool = False) -> dict:
    """A whole step of AdamW with clipping, plain or ZeRO-1, against DistributedDataParallel."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel
    spec, tokens, batch = sizes(device)
    plan = ParallelPlan(dp=dist.get_world_size(), micro_batch=batch, n_micro_batches=2, zero_stage=int(zero))
    ours = Trainer(spec, plan, tokens, device=device)
    adamw, model = ours.adamw, Transformer(spec).to(device)
    peer = DistributedDataParallel(model, gradient_as_bucket_view=True)
    by = [{"params": [p for p in model.parameters() if (p.dim() > 1) is matrix], "weight_decay": adamw.decay * matrix}
          for matrix in (True, False)]
    kind = dict(lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, fused=True)
    optimizer = (ZeroRedundancyOptimizer(by, torch.optim.AdamW, **kind) if zero else torch.optim.AdamW(by, **kind))
    torch.manual_seed(0)
    rows = torch.randint(spec.vocab_size, (plan.global_batch, tokens + 1), device=device)

    def step() -> None:
        total, micro = torch.zeros((), device=device), ours.rows(rows)
        for i, m in enumerate(micro):
            peer.require_backward_grad_sync = i == len(micro) - 1
            loss = F.cross_entropy(peer(m[:, :-1]).flatten(0, 1), m[:, 1:].flatten()) / len(micro)
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        nn.utils.clip_grad_norm_(model.parameters(), adamw.clip)
        optimizer.step()
        optimizer.zero_grad()

    def alike() -> None:
        mine = dict(ours.stages[0].named_parameters())
        for name, p in model.named_parameters():
            assert (mine[name] - p).abs().max() < 2.2 * 2 * adamw.lr, name     # two steps, each at most lr where a sign is noise
        assert sum((mine[n] - p).abs().sum() for n, p in model.named_parameters()) < 1e-6 * sum(p.numel() for p in model.parameters())
    out = compare(lambda: ours.step(rows), step, "ZeroRedundancyOptimizer" if zero else "DistributedDataParallel", alike)
    bytes_held = {"gpt4lib": {"state": held(ours.optimizer.optimizer), "fp32 copy": sum(
                      f.master.nbytes for f in ours.optimizer.flats if f.master.data_ptr() != f.weights.data_ptr())},
                  "peer": {"state": held(optimizer.optim if zero else optimizer), "fp32 copy": 0}}
    return {**out, "parameters": sum(p.numel() for p in model.parameters()), "optimizer_bytes_held": bytes_held}


def zero(device: str) -> dict:
    """ZeRO-1 against ZeroRedundancyOptimizer over DistributedDataParallel."""
    return data(device, zero=True)


class PlainExperts(Experts):
    """What one would write with torch's own differentiable all-to-all; the local products are the same as ours."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        ep, local = dist.get_world_size(), len(self.w_in)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=ep * local)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        send, receive = (c.view(ep, local).sum(1).tolist() for c in (counts, theirs))
        rows = functional.all_to_all_single_autograd(x[order // chosen.shape[1]], receive, send, dist.group.WORLD)
        mine = torch.arange(local, device=x.device).repeat(ep).repeat_interleave(theirs)[:, None]
        out = experts(rows, mine, self.w_in, self.w_out, activation=self.activation)
        back = functional.all_to_all_single_autograd(out, send, receive, dist.group.WORLD)
        return torch.empty_like(back).index_copy(0, order, back)


def expert(device: str) -> dict:
    """Expert parallelism of one mixture layer's experts."""
    spec, tokens, _ = sizes(device)
    n, rank, result = dist.get_world_size(), dist.get_rank(), {}
    few = spec.with_(n_experts=8, top_k=2, d_expert=spec.d_model)
    torch.manual_seed(0)
    whole = Experts(few)
    layers = [ParallelExperts(few), PlainExperts(few)]
    for layer in layers:
        layer.group = dist.group.WORLD
        layer.w_in, layer.w_out = (nn.Parameter(w.detach().chunk(n)[rank].clone().to(device)) for w in (whole.w_in, whole.w_out))
    torch.manual_seed(rank)
    x = torch.randn(8 * tokens, spec.d_model, device=device)
    chosen = torch.rand(len(x), few.n_experts, device=device).topk(few.top_k).indices
    def step(layer):
        def run() -> None:
            layer.zero_grad(set_to_none=True)
            leaf = x.detach().requires_grad_()
            layer(leaf, chosen).square().mean().backward()
            result[layer] = leaf.grad
        return run
    return compare(*map(step, layers), "all_to_all_single_autograd", lambda: close(*(result[layer] for layer in layers)))


def timeline(device: str) -> list[list[tuple]]:
    """[(stage, kind, micro, chunk, start, end)] of every rank in each of 11 steps of six micro-batches."""
    plan, _, (stage, _), rows = staged(device, 6)
    run, seen = Pipeline([stage], Unreduced(), torch.float32), []
    micro = rows.split(plan.micro_batch)
    for _ in range(13):
        stage.zero_grad(set_to_none=True)
        dist.barrier()
        seen.append([(s.stage, *s.action, s.start, s.end) for s in run.step([m[:, :-1] for m in micro], [m[:, 1:] for m in micro]).spans])
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, seen[2:])
    return [sum(step, []) for step in zip(*every)]


def median_step(steps: list[list[tuple]]) -> dict:
    """The step of median length, from its earliest start; perf_counter is one clock for all processes of a machine."""
    length = lambda step: max(s[5] for s in step) - min(s[4] for s in step)              # noqa: E731
    step = sorted(steps, key=length)[len(steps) // 2]
    zero = min(s[4] for s in step)
    rows = [{"stage": s[0], "kind": s[1], "micro": s[2], "chunk": s[3], "start": s[4] - zero, "end": s[5] - zero} for s in step]
    return {"pp": 2, "n_micro": 6, "schedule": "1f1b", "seconds": length(step), "spans": rows}


CASES = (tensor_mlp, tensor_transformer, pipeline, data, zero, expert)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", default="2,4", help="on a CPU; torchrun decides on CUDA")
    parser.add_argument("--case", default=",".join(c.__name__ for c in CASES) + ",timeline")
    arguments = parser.parse_args()
    device, wanted, world = arguments.device, arguments.case.split(","), place().world_size
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        join_world(device=device)
    rows, recorded = earlier(device)
    for n in [world] if device == "cuda" else map(int, arguments.processes.split(",")):
        for case in (c for c in CASES if c.__name__ in wanted):
            row = case(device) if device == "cuda" else launch(n, case, device, timeout_seconds=600)[0]
            rows[case.__name__, n] = {"case": case.__name__, "processes": n, "peer": list(row["seconds"])[1],
                                      "load": os.getloadavg()[0], **row}
            print(f"{n} {case.__name__:20}" + "  ".join(f"{w} {s['median'] * 1e3:.1f} ms" for w, s in row["seconds"].items()) +
                  f"  ratio {row['times_faster']['median']:.3f}, of CPU {row['times_less_cpu']['median']:.3f}", flush=True)
            save(device, rows, recorded)
        if n == 2 and "timeline" in wanted:
            steps = timeline(device) if device == "cuda" else launch(2, timeline, device, timeout_seconds=600)[0]
            recorded = {"load": os.getloadavg()[0], **median_step(steps)}
            save(device, rows, recorded)
    return 0


def earlier(device: str) -> tuple[dict, dict | None]:
    """What was recorded before on this machine today: (case, processes) -> row, and the timeline."""
    path = runner.RESULTS / f"parallel_{device}.json"
    old, here = json.loads(path.read_text()) if path.exists() else {}, runner.machine()
    if any(old.get("machine", {}).get(k) != here[k] for k in ("cpu", "date", "packages")):
        return {}, None
    return {(row["case"], row["processes"]): row for row in old["rows"]}, old["timeline"]


def save(device: str, rows: dict, recorded: dict | None) -> None:
    if place().rank == 0:
        spec, tokens, batch = sizes(device)
        shape = {"d_model": spec.d_model, "n_layers": spec.n_layers, "d_ff": spec.d_ff, "seq_len": tokens, "micro_batch": batch,
                 "dtype": "float32", "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": 1,
                 "backend": "nccl" if device == "cuda" else "gloo"}
        note = (f"each process has one thread; with {os.cpu_count()} cores seconds at 2 and at 4 processes cannot be compared, "
                f"only the two programs of one row can")
        runner.write("parallel_" + device, {"shape": shape, "note": note, "rows": list(rows.values()), "timeline": recorded})


if __name__ == "__main__":
    sys.exit(main())
