"""Interleaved timing of a subject against a named peer, and a results file that says where it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from typing import Callable, Mapping

RESULTS = pathlib.Path(__file__).parent / "results"


def interleaved(calls: Mapping[str, Callable[[], object]], runs: int = 5, warm_up: int = 1,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn A B A B, so that a drift of the machine touches all alike."""
    if runs < 5:
        raise ValueError(f"runs={runs} is not accepted; give at least 5, so that a median means something")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warm_up + runs):
        for name, call in calls.items():
            start = clock()
            call()
            if round_ >= warm_up:
                seconds[name].append(clock() - start)
            else:
                clock()
    return seconds


def summary(seconds: Mapping[str, list[float]], subject: str, peer: str,
            limit: Mapping[str, float] | None = None) -> dict:
    """Medians and ranges, the median of the pairwise ratios peer / subject, and % of a physical limit.

    limit: name -> the least seconds physics allows, where there is such a bound.
    """
    ratios = [b / a for a, b in zip(seconds[subject], seconds[peer])]
    out = {name: {"median": statistics.median(s), "min": min(s), "max": max(s)} for name, s in seconds.items()}
    for name, least in (limit or {}).items():
        out[name]["percent_of_limit"] = 100 * least / out[name]["median"]
    return {"seconds": out, "times_faster": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}}


def against_all(seconds: Mapping[str, list[float]], subject: str, least: float) -> dict:
    """`summary` against every peer at once: medians, % of the one limit, and times_faster by peer."""
    peers = [name for name in seconds if name != subject]
    every = {peer: summary(seconds, subject, peer, dict.fromkeys(seconds, least)) for peer in peers}
    return {"seconds": every[peers[0]]["seconds"], "times_faster": {peer: out["times_faster"] for peer, out in every.items()}}


def graph_seconds(call: Callable[[], object], replays: int = 20) -> float:
    """Seconds of one call inside a CUDA graph, so without its launches from the host; the least of seven tries."""
    import torch
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()

    def replay() -> None:
        for _ in range(replays):
            captured.replay()
        torch.cuda.synchronize()
    return min(interleaved({"graph": replay}, runs=7)["graph"]) / replays


def machine() -> dict:
    """The machine and the versions that a figure belongs to."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                    if line.startswith("model name")), cpu)
    packages = {}
    for name in ("gpt4lib", "llm-analysis", "torch", "numpy", "transformers"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=pathlib.Path(__file__).parent).stdout.strip()
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "packages": packages,
            "commit": commit, "date": datetime.date.today().isoformat()}


def write(name: str, results: dict) -> pathlib.Path:
    """results/NAME.json, replaced in one step so that a crash leaves the old one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    unfinished.replace(path)
    return path
