"""The simulator against the engine it imitates, and how fast it is.

    python benchmarks/simulator.py        writes results/simulator_cpu.json, or results/simulator_cuda.json where there is a GPU

Step times of this machine are measured on two mixes of requests and fitted by five numbers; with them as its clock the simulator
answers other mixes, all at once and arriving over time, and the real engine does the same. Then a day of GPT-4 as reported on 128 GPUs.
"""

from __future__ import annotations

import random
import sys
import time

import limits
import numpy as np
import runner
import torch
from limits import CUDA
from serving import BUDGET, DEVICE, DTYPE, SPEC, mix

from gpt4lib import ClusterSpec, ModelSpec, ParallelPlan
from gpt4lib.analysis.serving_estimator import ServingEstimator
from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving import simulator
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.engine import Engine
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.scheduler import Scheduler, Step
from gpt4lib.serving.simulator import Cost, Lane, Request

SEATS, BLOCKS, SIZE = 16, 2000, 16


def parts(step: Step) -> list[float]:
    """What a step's time is taken to be linear in: itself, its decoding sequences, their context, its tokens of prompts, their pairs."""
    decodes = [stop for _, start, stop in step.work if stop - start == 1]
    pieces = [(start, stop) for _, start, stop in step.work if stop - start > 1]
    return [1, len(decodes), sum(decodes), sum(b - a for a, b in pieces), sum((b - a) * (a + b) / 2 for a, b in pieces)]


def real(model: Transformer, requests: list[Request]) -> tuple[list[float], list[float], list[list[float]], list[float]]:
    """The engine answers a trace in real time: (first tokens, ends) after arrival, and every step's parts and seconds."""
    engine, steps, taken = Engine(model, BLOCKS, SIZE, SEATS, max_batched_tokens=BUDGET, prefix_cache=False), [], []
    engine.on_step = lambda step: steps.append(parts(step))
    feed, open_, first, ends, start = list(reversed(requests)), {}, [], [], time.perf_counter()
    dice = random.Random(0)
    while feed or engine.work:
        now = time.perf_counter() - start
        while feed and feed[-1].arrival <= now:
            r = feed.pop()
            (answer,) = engine.add([dice.randrange(SPEC.vocab_size) for _ in range(r.prompt)], SamplingParams(max_tokens=r.answer))
            open_[answer] = r.arrival
        if not engine.work:
            time.sleep(max(feed[-1].arrival - now, 0))
            continue
        before = time.perf_counter()
        for answer in engine.step():
            now = time.perf_counter() - start
            if len(answer.generated) == 1:
                first.append(now - open_[answer])
            if answer.finish_reason:
                ends.append(now)
        taken.append(time.perf_counter() - before)
    return first, ends, steps, taken


def fitted(steps: list[list[float]], seconds: list[float]) -> np.ndarray:
    """Five costs >= 0 by least squares: those that come out negative are left out, one after the other."""
    x, y, kept = np.array(steps), np.array(seconds), list(range(5))
    while True:
        found = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
        if (found >= 0).all():
            return np.bincount(kept, found, 5)
        del kept[int(found.argmin())]


def imitated(costs: np.ndarray, requests: list[Request]) -> simulator.Report:
    weights = costs.tolist()

    def clock(step: Step) -> Cost:
        seconds = sum(w * p for w, p in zip(weights, parts(step)))
        return Cost(seconds, seconds)
    scheduler = Scheduler(BlockPool(BLOCKS, SIZE), SEATS, BUDGET, prefix_cache=False)
    return simulator.simulate(requests, [Lane(scheduler, clock, [0.0])])


def cross_check() -> list[dict]:
    """Total time, and mean time to the first token, of the engine and of its imitation on mixes the costs were not fitted to."""
    model = Transformer(SPEC, seed=0).to(DEVICE, DTYPE).requires_grad_(False)
    trace = lambda n, seed, rate: [Request(i / rate if rate else 0.0, len(p), a) for i, (p, a) in enumerate(zip(*mix(n, seed=seed)))]
    real(model, trace(4, 9, 0))
    full, few = real(model, trace(48, 1, 0)), real(model, trace(24, 5, 3.0))              # steps of many sequences and of few
    costs, rows = fitted(full[2] + few[2], full[3] + few[3]), []
    for name, n, seed, rate in (("all at once", 48, 2, 0), ("2 a second", 32, 3, 2.0), ("4 a second", 48, 4, 4.0)):
        requests = trace(n, seed, rate)
        first, ends, *_ = real(model, requests)
        report = imitated(costs, requests)
        rows.append({"mix": name, "requests": n, "engine_seconds": max(ends), "simulated_seconds": report.seconds,
                     "error": report.seconds / max(ends) - 1, "engine_ttft": sum(first) / n, "simulated_ttft": sum(report.ttft) / n})
        print(rows[-1], flush=True)
    return rows


def a_day() -> dict:
    """Diurnal load on GPT-4 as reported, TP8 x PP16 on A100s of 40 GB: the simulator's own speed."""
    estimator = ServingEstimator(ModelSpec.preset("gpt-4"), ClusterSpec.around("a100-40gb"), ParallelPlan(tp=8, pp=16))
    start = time.perf_counter()
    report = simulator.simulate(simulator.diurnal(4.0, prompt=1000, answer=200),
                                simulator.cluster(estimator, max_batched_tokens=1318))
    seconds = time.perf_counter() - start
    return {"requests": len(report.ttft), "prompt_tokens": report.prompt_tokens, "answer_tokens": report.answer_tokens,
            "steps": report.steps, "seconds": seconds, "tokens_per_second": (report.prompt_tokens + report.answer_tokens) / seconds,
            "answer_tokens_per_second": report.answer_tokens / seconds}


def full_batches() -> dict:
    """512 sequences decoding all the time, on one Llama-3.1-8B: the speed where steps are full."""
    estimator = ServingEstimator(ModelSpec.preset("llama-3.1-8b"), ClusterSpec.around("h100-sxm"))
    requests = [Request(0.0, 100, 400) for _ in range(2048)]
    start = time.perf_counter()
    report = simulator.simulate(requests, simulator.cluster(estimator, max_running=512))
    seconds = time.perf_counter() - start
    return {"answer_tokens": report.answer_tokens, "seconds": seconds, "answer_tokens_per_second": report.answer_tokens / seconds}


def main() -> int:
    results = {"shape": limits.where(DTYPE), "cross_check": cross_check(), "full_batches": full_batches(), "a_day": a_day()}
    print(results["full_batches"], results["a_day"])
    print(f"wrote {runner.write('simulator_' + DEVICE, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
