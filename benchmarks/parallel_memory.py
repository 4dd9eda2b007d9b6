"""Bytes a rank really holds in a training step, by part, beside what `analysis.memory` says; exact counts, no timing.

    python benchmarks/parallel_memory.py

State is the live tensors, activations the peak of what autograd keeps for backward passes (distinct storages; parameters
apart). The formula is for 16-bit tensors and this runs in fp32, so it is doubled; it counts slices under sequence
parallelism, as Megatron-LM stores them, where ours keeps what it gathered.
"""

from __future__ import annotations

from dataclasses import replace

import runner
import torch

from gpt4lib.analysis import memory, pipeline
from gpt4lib.distributed.launch import launch
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.profiling import Kept
from gpt4lib.specs import ModelSpec
from gpt4lib.specs.workload import ParallelPlan

SEQ = 128
DENSE = ModelSpec("dense", n_layers=4, d_model=256, n_heads=8, d_ff=1024, vocab_size=512, context=SEQ, positions="learned",
                  tied=False)
ONE = ParallelPlan(micro_batch=2, n_micro_batches=4, recompute="selective")      # fused attention keeps no scores anyway
PLANS = {"one process": ONE, "tensor 2": replace(ONE, tp=2), "tensor 2, sequence": replace(ONE, tp=2, sequence_parallel=True),
         "pipeline 2": replace(ONE, pp=2), "pipeline 4": replace(ONE, pp=4),
         "pipeline 2, two chunks": replace(ONE, pp=2, n_chunks=2), "gpipe 2": replace(ONE, pp=2, schedule="gpipe"),
         "data 2": replace(ONE, dp=2), "data 2, ZeRO-1": replace(ONE, dp=2, zero_stage=1)}


def one_step(spec: ModelSpec, plan: ParallelPlan) -> dict:
    trainer = Trainer(spec, plan, SEQ)
    batch = torch.randint(spec.vocab_size, (plan.global_batch, SEQ + 1), generator=torch.Generator().manual_seed(0))
    trainer.step(batch)
    flats = trainer.optimizer.flats
    # the layers alone: the formula leaves out logits and embedding
    kept = Kept(layer for stage in trainer.stages for layer in stage.layers.values())
    trainer.step(batch)
    moments = sum(t.nbytes for held in trainer.optimizer.optimizer.state.values() for t in held.values() if t.dim())
    masters = sum(f.master.nbytes for f in flats if f.zero or f.master.data_ptr() != f.weights.data_ptr())
    return {"stage": trainer.groups.at["pp"], "weights": sum(f.weights.nbytes for f in flats),
            "gradients": sum(f.gradients.nbytes for f in flats), "optimizer": moments + masters, "activations": kept.peak}


def predicted(spec: ModelSpec, plan: ParallelPlan, stage: int) -> dict:
    held = pipeline.in_flight(plan.pp, plan.n_micro_batches, stage, plan.n_chunks, plan.schedule) / plan.n_chunks
    layers = sum(memory.layer_activation_bytes(spec, plan, SEQ, i) for i in plan.layers_of(spec.n_layers, stage))
    return {**memory.state(memory.stage_parameters(spec, plan, stage), plan, "fp32", "fp32"), "activations": 2 * held * layers}


def main() -> int:
    rows = []
    for name, plan in PLANS.items():
        for rank, found in enumerate(launch(plan.n_devices, one_step, DENSE, plan)):
            stage = found.pop("stage")
            expected = predicted(DENSE, plan, stage)
            rows.append({"plan": name, "rank": rank, "counted": found, "predicted": expected})
            if rank in (0, plan.n_devices - 1):
                print(f"{name:24} rank {rank}  " + "  ".join(f"{part} {n:,} = {n / expected[part]:.3f} x predicted"
                                                              for part, n in found.items()), flush=True)
    shape = {"n_layers": DENSE.n_layers, "d_model": DENSE.d_model, "seq_len": SEQ, "threads": 1, "dtype": "float32"}
    runner.write("parallel_memory", {"shape": shape, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
