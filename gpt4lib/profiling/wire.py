"""What goes over the wire: every collective torch.distributed is asked for, ours or PyTorch's own."""

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# torch's operator -> our name, and which of its arguments is the tensor of full size
COLLECTIVES = {"allreduce_": ("all_reduce", 0), "_reduce_scatter_base_": ("reduce_scatter", 1),
               "_allgather_base_": ("all_gather", 0), "allgather_": ("all_gather", 0),
               "alltoall_base_": ("all_to_all", 1), "send": ("send", 0), "broadcast_": ("broadcast", 0)}
SILENT = ("recv_", "irecv", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")       # nothing is sent
# the same collectives as DTensor and the functional API ask for them; the argument is the tensor put in
FUNCTIONAL = {"all_reduce": "all_reduce", "all_reduce_": "all_reduce", "reduce_scatter_tensor": "reduce_scatter",
              "all_gather_into_tensor": "all_gather", "all_to_all_single": "all_to_all"}


class Call(NamedTuple):
    """One collective: its name, the bytes of the whole tensor, the ranks of its group, the bytes this rank sends."""
    kind: str
    size: int
    ranks: tuple[int, ...]
    sent: int


def name_of(func) -> str:
    return func._schema.name.split("::")[1]


def _bytes(x: Any) -> int:
    return sum(map(_bytes, x)) if isinstance(x, (list, tuple)) else x.numel() * x.element_size()


class count_wire(TorchDispatchMode):
    """Collects every collective started inside the block, in order, as `Call`s in `.calls`::

        with count_wire() as wire:
            loss.backward()
        wire.sent()        # {"all_reduce": 4096, ...}, bytes this rank sends

    A reduce-scatter or an all-gather passes n - 1 of n pieces on, an all-reduce is both, an all-to-all sends
    what is not its own, a send everything. `tests/profiling/test_wire.py` runs the same rings with single sends.
    Receiving, barriers and the set-up of groups are not counted. NotImplementedError for a collective it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented                              # DTensor first: the collectives it starts come back here
        if func.namespace == "c10d" and name_of(func) not in SILENT:
            if name_of(func) not in COLLECTIVES:
                raise NotImplementedError(f"c10d.{name_of(func)} is not counted; accepted: {', '.join(COLLECTIVES)}")
            kind, which = COLLECTIVES[name_of(func)]
            group = next(g for a in args if isinstance(a, torch.ScriptObject)
                         and isinstance(g := dist.ProcessGroup.unbox(a), dist.ProcessGroup))
            self._add(kind, _bytes(args[which]), args[which], group, args[2:])
        elif func.namespace == "_c10d_functional" and name_of(func) not in SILENT:
            if name_of(func) not in FUNCTIONAL:
                raise NotImplementedError(f"{func} is not counted; accepted: {', '.join(FUNCTIONAL)}")
            group = args[-1]
            if not isinstance(group, dist.ProcessGroup):
                group = dist.distributed_c10d._resolve_process_group(group)
            kind = FUNCTIONAL[name_of(func)]
            size = _bytes(args[0]) * (group.size() if kind == "all_gather" else 1)
            self._add(kind, size, args[0], group, (None, None, args[2] if kind == "all_to_all" else None))
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, size: int, tensor: Any, group: dist.ProcessGroup, rest: tuple) -> None:
        """`rest`: what follows the tensors in torch's operator: the root of a broadcast, the splits of an all-to-all."""
        n = group.size()
        if kind == "all_to_all":
            splits = rest[2] or [len(tensor) // n] * n
            sent = size - splits[group.rank()] * (size // max(len(tensor), 1))
        elif kind in ("send", "broadcast"):
            sent = size if kind == "send" or group.rank() == rest[0] else 0
        else:
            sent = (2 if kind == "all_reduce" else 1) * (n - 1) * -(-size // n)
        self.calls.append(Call(kind, size, tuple(dist.get_process_group_ranks(group)), sent))

    def sent(self) -> dict[str, int]:
        """Bytes this rank sends, by kind of collective."""
        total: Counter = Counter()
        for call in self.calls:
            total[call.kind] += call.sent
        return dict(total)
