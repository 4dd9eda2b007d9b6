"""Real processes on this machine, for chapters, tests and a first try; on a cluster `torchrun` starts them.

The one place that reads the environment: what torchrun tells each process.
"""

import faulthandler
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, Callable, NamedTuple


class Place(NamedTuple):
    """What torchrun says about this process."""
    rank: int
    world_size: int
    local_rank: int
    per_node: int


def place() -> Place:
    """From torchrun's environment; a process on its own is a world of one."""
    read = lambda name, default: int(os.environ.get(name, default))                # noqa: E731
    return Place(read("RANK", 0), read("WORLD_SIZE", 1), read("LOCAL_RANK", 0), read("LOCAL_WORLD_SIZE", 1))


def join_world(timeout_seconds: float = 600, device: str = "cpu") -> None:
    """Start torch.distributed: gloo on CPU, NCCL on CUDA; a peer that is silent for `timeout_seconds` is an error."""
    import torch
    import torch.distributed as dist
    if device == "cuda":
        torch.cuda.set_device(place().local_rank)
    # started without torchrun
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds), **alone)


def _work(connection, target: Any, args: tuple, rank: int, n: int, store: str, timeout_seconds: float) -> None:
    import torch
    import torch.distributed as dist
    faulthandler.enable()                                         # a crash in native code says where, on stderr
    try:
        if isinstance(target, tuple):                                               # source of a notebook's function
            space: dict[str, Any] = {}
            exec(target[1], space)
            target = space[target[0]]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n,
                                timeout=timedelta(seconds=timeout_seconds))
        connection.send_bytes(pickle.dumps((True, target(*args), 0.0)))   # plain bytes: tensors too outlive this process
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        connection.send_bytes(pickle.dumps((False, f"raised:\n{traceback.format_exc()}", time.monotonic())))
        os._exit(1)


def launch(n: int, target: Callable[..., Any], *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """Run `target(*args)` in n processes joined by torch.distributed (gloo, one thread each); their results by rank.

    `target` is an importable function, or one defined in a notebook cell that imports what it needs. RuntimeError
    naming the rank when one raises, dies or is not done within `timeout_seconds`; the others are stopped.
    """
    if target.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        if not target.__name__.isidentifier():
            raise ValueError("a lambda of a notebook cannot be sent to another process; give a function made with def")
        target = (target.__name__, inspect.getsource(target))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt4lib.distributed.trainer", "torch._dynamo"])     # which every optimizer imports
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe(duplex=False) for _ in range(n)]
        workers = [context.Process(target=_work, args=(pairs[r][1], target, args, r, n, f"{folder}/store", timeout_seconds),
                                   daemon=True) for r in range(n)]
        try:
            for worker, (_, child) in zip(workers, pairs):
                worker.start()
                child.close()                                                       # so that a death is an end of file
            deadline, left = time.monotonic() + timeout_seconds, {pairs[r][0]: r for r in range(n)}
            failures: list[tuple[float, str]] = []          # a failing rank takes its peers with it: the first is to blame
            while left and (ready := wait(list(left), max(deadline - time.monotonic(), 0))):
                for connection in ready:
                    rank = left.pop(connection)
                    try:
                        fine, results[rank], when = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        workers[rank].join(5)
                        fine, results[rank], when = False, f"died with exit code {workers[rank].exitcode}", 0.0
                    if not fine:
                        failures.append((when, f"rank {rank} of {n} {results[rank]}"))
                        deadline = min(deadline, time.monotonic() + 1)
            if failures:
                raise RuntimeError(min(failures)[1])
            if left:
                who = f"rank {', '.join(map(str, left.values()))} of {n} {'is' if len(left) == 1 else 'are'}"
                raise RuntimeError(f"{who} not done after {timeout_seconds:g} s")
            for worker in workers:
                worker.join(10)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                    worker.join()
    return [results[r] for r in range(n)]
