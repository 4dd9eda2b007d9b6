"""Import time, and training estimates per second, against llm-analysis 0.2.2 in the same run.

    python benchmarks/estimates.py          writes results/estimates.json
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import runner

PEER = "llm-analysis"
SEQ_LEN = 2048


def imports(module: str):
    """A fresh interpreter that imports one module."""
    return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def ours(n: int):
    """n estimates: memory of the fullest device by part, and FLOP of a step, for GPT-3 at tensor 8 x pipeline 16."""
    from gpt4lib import ModelSpec, ParallelPlan, flops, memory
    spec = ModelSpec.preset("gpt-3-175b")

    def run() -> None:
        for i in range(n):
            plan = ParallelPlan(tp=8, pp=16, zero_stage=1, micro_batch=1 + i % 4)
            memory.training(spec, plan, SEQ_LEN)
            one = flops.forward(spec, plan.micro_batch, SEQ_LEN, causal=True)
            flops.backward(one)
    return run


def theirs(n: int):
    """The same model, devices and batches through their training entry point, with its logging off."""
    logging.disable(logging.CRITICAL)
    from llm_analysis.analysis import DSZeRO, LLMAnalysis
    from llm_analysis.config import GPUConfig, ModelConfig, ParallelismConfig
    model = ModelConfig("gpt-3-175b", 96, 96, 12288, 50257, max_seq_len=2048, expansion_ratio=4)
    gpu = GPUConfig("a100-80gb", 80, 2039, 300, 1e-5, 312)

    def run() -> None:
        for i in range(n):
            analysis = LLMAnalysis(model, gpu, parallelism_config=ParallelismConfig(tp_size=8, pp_size=16),
                                   flops_efficiency=0.5, hbm_memory_efficiency=0.9)
            analysis.training(batch_size_per_gpu=1 + i % 4, gradient_accumulation_steps=1, seq_len=SEQ_LEN,
                              total_num_tokens=10**9, ds_zero=DSZeRO.STAGE_1)
    return run


def main() -> int:
    if importlib.util.find_spec("llm_analysis") is None:
        print(f"{PEER} is not installed; see benchmarks/README.md for the environment", file=sys.stderr)
        return 2
    n = 200
    loads = runner.interleaved({"gpt4lib": imports("gpt4lib.cli"), PEER: imports("llm_analysis.analysis")})
    runs = runner.interleaved({"gpt4lib": ours(n), PEER: theirs(n)}, runs=7)
    results = {"import_process": runner.summary(loads, "gpt4lib", PEER),
               "training_estimates": {"estimates_per_run": n, **runner.summary(runs, "gpt4lib", PEER)}}
    for name in ("gpt4lib", PEER):
        rate = n / results["training_estimates"]["seconds"][name]["median"]
        results["training_estimates"]["seconds"][name]["estimates_per_second"] = round(rate)
        print(f"{name:13} {rate:9,.0f} estimates/s   import {results['import_process']['seconds'][name]['median']:.3f} s")
    print(f"wrote {runner.write('estimates', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
