"""Tensor parallelism on two real processes equals one process: outputs and every gradient."""

import pathlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gpt4lib.distributed.tensor import ColumnParallelLinear, RowParallelLinear


def layers():
    torch.manual_seed(0)
    return nn.Linear(6, 8).double(), nn.Linear(8, 5).double()


def forward(up, down, x):
    return down(torch.nn.functional.gelu(up(x)))


def one_rank(rank, world, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
        whole, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
        up, down = layers()
        expected = forward(up, down, whole)
        expected.square().sum().backward()
        column, row = ColumnParallelLinear(up), RowParallelLinear(down)
        got = forward(column, row, mine)
        got.square().sum().backward()
        close = dict(rtol=0, atol=1e-12)           # fp64: only the order of one sum differs
        torch.testing.assert_close(got, expected, **close)
        torch.testing.assert_close(mine.grad, whole.grad, **close)
        torch.testing.assert_close(column.weight.grad, up.weight.grad.chunk(world, 0)[rank], **close)
        torch.testing.assert_close(column.bias.grad, up.bias.grad.chunk(world, 0)[rank], **close)
        torch.testing.assert_close(row.weight.grad, down.weight.grad.chunk(world, 1)[rank], **close)
        torch.testing.assert_close(row.bias.grad, down.bias.grad, **close)
        with pytest.raises(ValueError, match="width 5 is not divisible by tp=2"):
            ColumnParallelLinear(down)
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: pathlib.Path):
    mp.spawn(one_rank, (2, tmp_path / "store"), nprocs=2)      # raises if a rank raises
