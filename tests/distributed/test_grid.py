"""The process grid is a partition along every axis, and keeps tensor parallelism inside a node."""

import pytest

from gpt4lib.distributed.grid import AXES, ProcessGrid


@pytest.mark.parametrize("grid", [ProcessGrid(), ProcessGrid(2, 3, 4), ProcessGrid(8, 1, 15), ProcessGrid(1, 5, 1)])
def test_groups_partition_the_world(grid):
    for axis in AXES:
        groups = grid.groups(axis)
        assert sorted(r for g in groups for r in g) == list(range(grid.world_size))
        assert all(len(g) == getattr(grid, axis) for g in groups)
        for g in groups:
            assert [grid.coordinates(r)[axis] for r in g] == list(range(getattr(grid, axis)))
    assert all(grid.rank(**grid.coordinates(r)) == r for r in range(grid.world_size))


def test_tensor_parallel_ranks_are_neighbours():
    assert ProcessGrid(tp=8, pp=15, dp=2).groups("tp")[3] == list(range(24, 32))


@pytest.mark.parametrize("act, words", [
    (lambda: ProcessGrid(tp=0), "tp=0"), (lambda: ProcessGrid(2, 2).check(5), "needs 4 processes, there are 5"),
    (lambda: ProcessGrid(3, 1).check(3, devices_per_node=8), "tp=3 does not divide the 8 devices"),
    (lambda: ProcessGrid(2).coordinates(2), "rank=2"), (lambda: ProcessGrid().groups("xp"), "axis='xp'")])
def test_misuse_is_named(act, words):
    with pytest.raises(ValueError, match=words):
        act()
