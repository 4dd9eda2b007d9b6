"""The process grid is a partition along every axis, and keeps tensor parallelism inside a node."""

import pytest

from gpt4lib.distributed.grid import AXES, ProcessGrid


@pytest.mark.parametrize("grid", [ProcessGrid(), ProcessGrid(2, 3, 4), ProcessGrid(8, 1, 15), ProcessGrid(1, 6, 1, 2),
                                  ProcessGrid(2, 4, 2, 4)])
def test_groups_partition_the_world(grid):
    lengths = dict(zip(AXES, grid.shape)) | {"dp": grid.dp}
    for axis, length in lengths.items():
        groups = grid.groups(axis)
        assert sorted(r for g in groups for r in g) == list(range(grid.world_size))
        for g in groups:
            assert [grid.coordinates(r)[axis] for r in g] == list(range(length))
    for r in range(grid.world_size):
        at = grid.coordinates(r)
        assert grid.rank(at["pp"], at["dp"], at["tp"]) == r


def test_tensor_parallel_ranks_are_neighbours():
    assert ProcessGrid(tp=8, pp=15, dp=2).groups("tp")[3] == list(range(24, 32))


@pytest.mark.parametrize("act, words", [
    (lambda: ProcessGrid(tp=0), "tp=0"), (lambda: ProcessGrid(2, 2).check(5), "needs 4 processes, there are 5"),
    (lambda: ProcessGrid(3, 1).check(3, devices_per_node=8), "tp=3 does not divide the 8 devices"),
    (lambda: ProcessGrid(dp=6, inner=4), "dp=6 is not divisible by ep or shard 4"),
    (lambda: ProcessGrid(2).coordinates(2), "rank=2"), (lambda: ProcessGrid().groups("xp"), "axis='xp'")])
def test_misuse_is_named(act, words):
    with pytest.raises(ValueError, match=words):
        act()
