"""Tensor parallelism on two real processes equals one process: outputs and every gradient."""

import pytest
import torch
from torch import nn

from gpt4lib.distributed.tensor import ColumnParallelLinear, RowParallelLinear
from tests.distributed import oracle

CLOSE = dict(rtol=0, atol=1e-12)                  # fp64: only the order of one sum differs
workers = oracle.Workers(__name__)


def layers():
    torch.manual_seed(0)
    return nn.Linear(6, 8).double(), nn.Linear(8, 5).double()


def run(up, down):
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6).requires_grad_()
    out = down(nn.functional.gelu(up(x)))
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad, **{f"{name}.{kind}": p.grad for name, layer in (("up", up), ("down", down))
                                                 for kind, p in layer.named_parameters()}}


@workers.on(2)
def parallel():
    up, down = layers()
    with pytest.raises(ValueError, match="width 5 is not divisible by tp=2"):
        ColumnParallelLinear(down)
    return run(ColumnParallelLinear(up), RowParallelLinear(down))


@pytest.mark.parametrize("what, dim", [("out", None), ("x", None), ("up.weight", 0), ("up.bias", 0), ("down.weight", 1),
                                       ("down.bias", None)])
def test_two_ranks_equal_one(what, dim):
    expected = run(*layers())[what]
    for rank, mine in enumerate(parallel()):
        torch.testing.assert_close(mine[what], expected if dim is None else expected.chunk(2, dim)[rank], **CLOSE)
