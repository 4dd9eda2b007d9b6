"""The process grid: which rank stands where, and with whom it talks. Plain arithmetic, no process group."""

from __future__ import annotations

from dataclasses import dataclass

AXES = ("pp", "dp", "tp")          # slowest first: tensor-parallel neighbours are adjacent ranks, in one node


@dataclass(frozen=True)
class ProcessGrid:
    """pp x dp x tp ranks. Tensor parallelism varies fastest, so that its ranks share a node.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 3.2, takeaway 1.
    """
    tp: int = 1
    dp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            value = getattr(self, axis)
            if type(value) is not int or value < 1:
                raise ValueError(f"{axis}={value!r} is not accepted; give an integer >= 1")

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    def check(self, world_size: int, devices_per_node: int | None = None) -> None:
        """ValueError, one line, if the grid does not fill the world or splits tensor parallelism over nodes."""
        if self.world_size != world_size:
            raise ValueError(f"tp={self.tp} x dp={self.dp} x pp={self.pp} needs {self.world_size} processes, "
                             f"there are {world_size}; change a degree or the number of processes")
        if devices_per_node and self.tp > 1 and devices_per_node % self.tp:
            raise ValueError(f"tp={self.tp} does not divide the {devices_per_node} devices of a node; "
                             f"tensor parallelism has to stay inside one")

    def coordinates(self, rank: int) -> dict[str, int]:
        """{"pp": ..., "dp": ..., "tp": ...} of a rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank} is not accepted; give 0 to {self.world_size - 1}")
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return {"pp": pp, "dp": dp, "tp": tp}

    def rank(self, pp: int, dp: int, tp: int) -> int:
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ along one axis only, each in order of that axis."""
        if axis not in AXES:
            raise ValueError(f"axis={axis!r} is not known; accepted: {', '.join(AXES)}")
        members: dict[tuple, list[int]] = {}
        for rank in range(self.world_size):
            where = self.coordinates(rank)
            members.setdefault(tuple(where[a] for a in AXES if a != axis), []).append(rank)
        return list(members.values())
