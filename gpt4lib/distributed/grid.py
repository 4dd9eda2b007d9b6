"""The process grid: which rank stands where, and with whom it talks."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TYPE_CHECKING

from gpt4lib.specs import ModelSpec, ParallelPlan
from gpt4lib.specs.checks import require, require_counts, require_known

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "outer", "inner", "tp")    # slowest first: tensor-parallel neighbours are adjacent ranks, in one node


@dataclass(frozen=True)
class ProcessGrid:
    """pp x dp x tp ranks; dp = outer x inner, where experts (or ZeRO-3's shards) are spread over the inner part.

    Tensor parallelism varies fastest, so that its ranks share a node. Plain arithmetic, no process group.
    Source: Narayanan et al. 2021, arXiv:2104.04473, section 3.2, takeaway 1.
    """
    tp: int = 1
    dp: int = 1
    pp: int = 1
    inner: int = 1

    def __post_init__(self) -> None:
        require_counts(self, 1, "tp", "dp", "pp", "inner")
        if self.dp % self.inner:
            raise ValueError(f"dp={self.dp} is not divisible by ep or shard {self.inner}; choose one that divides it")

    @classmethod
    def of(cls, plan: ParallelPlan) -> "ProcessGrid":
        return cls(plan.tp, plan.dp, plan.pp, max(plan.ep, plan.shard or 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of AXES."""
        return self.pp, self.dp // self.inner, self.inner, self.tp

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    def check(self, world_size: int, devices_per_node: int | None = None) -> None:
        """ValueError, one line, if the grid does not fill the world or splits tensor parallelism over nodes."""
        require(self.world_size == world_size, f"tp={self.tp} x dp={self.dp} x pp={self.pp} needs {self.world_size} processes, "
                f"there are {world_size}; change a degree or the number of processes")
        if devices_per_node and self.tp > 1 and devices_per_node % self.tp:
            raise ValueError(f"tp={self.tp} does not divide the {devices_per_node} devices of a node; tensor parallelism has to "
                             f"stay inside one")

    def coordinates(self, rank: int) -> dict[str, int]:
        """{"pp": ..., "outer": ..., "inner": ..., "tp": ..., "dp": ...} of a rank."""
        require(0 <= rank < self.world_size, f"rank={rank} is not accepted; give 0 to {self.world_size - 1}")
        at, rest = {}, rank
        for axis, length in zip(reversed(AXES), reversed(self.shape)):
            rest, at[axis] = divmod(rest, length)
        return {**at, "dp": at["outer"] * self.inner + at["inner"]}

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ along one axis only ("dp" is outer and inner), each in order of that axis."""
        require_known("axis", axis, (*AXES, "dp"))
        varies = ("outer", "inner", "dp") if axis == "dp" else (axis, "dp")
        members: dict[tuple, list[int]] = {}
        for rank in range(self.world_size):
            where = self.coordinates(rank)
            members.setdefault(tuple(where[a] for a in AXES if a not in varies), []).append(rank)
        return list(members.values())


class Groups(NamedTuple):
    """What one rank talks through. None where it would be alone; the meshes are the same groups as PyTorch's DeviceMesh."""
    at: dict[str, int]
    grid: ProcessGrid
    mesh: "DeviceMesh"                   # all of AXES
    replicas: "DeviceMesh"               # outer and inner as one dimension
    dp: "ProcessGroup"
    outer: "ProcessGroup"
    inner: "ProcessGroup | None"
    tp: "ProcessGroup | None"
    kv: "ProcessGroup | None"            # tensor-parallel ranks that hold the same key/value head
    ends: "ProcessGroup | None"          # first and last stage, which share a tied embedding
    edges: dict[tuple[str, int], Any]    # ("F" or "B", sending stage) -> the two ranks of that link, one way


def connect(plan: ParallelPlan, spec: ModelSpec, device: str = "cpu", timeout: timedelta | None = None) -> Groups:
    """The process groups of a plan; every rank of the initialised world calls it.

    A peer that is silent for `timeout` (None: PyTorch's 10 to 30 minutes) is an error. Each link of the pipeline, forward
    and backward, is a group of its own: NCCL runs the transfers of one group in order, so two ranks that first send to
    each other through the same one would wait for ever.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    grid = ProcessGrid.of(plan)
    at = grid.coordinates(dist.get_rank())

    def own(ranks: list[list[int]]) -> Any:
        """Create all these groups, on every rank in the same order; this rank's, or None."""
        groups = [dist.new_group(r, timeout=timeout) for r in ranks]
        return next((g for g, r in zip(groups, ranks) if dist.get_rank() in r), None)

    axes = [own(grid.groups(axis)) for axis in AXES]
    mesh = DeviceMesh.from_group(axes, device, mesh=torch.arange(grid.world_size).view(grid.shape), mesh_dim_names=AXES)
    dp, pipelines = own(grid.groups("dp")), grid.groups("pp")
    edges = {(kind, s): own([[ranks[s], ranks[(s + step) % plan.pp]] for ranks in pipelines])
             for kind, step in (("F", 1), ("B", -1)) for s in range(plan.pp)} if plan.pp > 1 else {}
    ends = own([[r[0], r[-1]] for r in pipelines]) if plan.pp > 1 and spec.tied else None
    sharers = max(plan.tp // spec.n_kv_heads, 1) if spec.latent is None else 1
    kv = own([r[i:i + sharers] for r in grid.groups("tp") for i in range(0, plan.tp, sharers)]) if sharers > 1 else None
    return Groups(at, grid, mesh, DeviceMesh.from_group(dp, device, mesh_dim_names=("dp",)), dp, axes[1],
                  axes[2] if grid.inner > 1 else None, axes[3] if plan.tp > 1 else None, kv, ends, edges)
