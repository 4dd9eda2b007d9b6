"""The device a benchmark runs on: how to wait for it, what it is, and what it can do at best, measured."""

from __future__ import annotations

import statistics
import time

import torch

CUDA = torch.cuda.is_available()


def waited(call):
    """The call, and on CUDA the device waited for."""
    def run() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()
    return run


def where(dtype: torch.dtype) -> dict:
    """Device, dtype and threads, for the results file."""
    return {"dtype": str(dtype).removeprefix("torch."), "device": torch.cuda.get_device_name() if CUDA else "cpu",
            "threads": torch.get_num_threads()}


def seconds(call, runs: int = 9) -> float:
    """Median seconds of a call, waited for."""
    out, call = [], waited(call)
    for _ in range(runs + 2):
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return statistics.median(out[2:])


def measure(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product, and bytes/s: read on a CPU (a sum), read plus written on a GPU (a copy; a kernel
    that only reads can pass it by a few per cent)."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    flop_per_second = 2 * n ** 3 / seconds(lambda: a @ b)
    memory = torch.randn((1 << 28 if device == "cpu" else 1 << 32) // 4, device=device)
    if device == "cpu":
        return {"flop_per_second": flop_per_second, "bytes_per_second": memory.nbytes / seconds(lambda: memory.sum())}
    other = torch.empty_like(memory)
    return {"flop_per_second": flop_per_second, "bytes_per_second": 2 * memory.nbytes / seconds(lambda: other.copy_(memory))}
