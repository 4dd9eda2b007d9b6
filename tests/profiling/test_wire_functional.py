"""The wire counter sees what DTensor and the functional collectives ask for, as it sees the plain ones."""

import pytest
import torch

from gpt4lib.distributed.flat import squared_norm
from gpt4lib.distributed.launch import launch


def one_rank():
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from gpt4lib.distributed.tensor import ColumnParallelLinear, RowParallelLinear
    from gpt4lib.profiling.wire import count_wire
    mesh, group = init_device_mesh("cpu", (2,)), dist.group.WORLD
    up, down, found = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), {}
    ours = torch.nn.Sequential(ColumnParallelLinear(up), RowParallelLinear(down))
    theirs = parallelize_module(torch.nn.Sequential(up, down), mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for name, model in (("ours", ours), ("DTensor", theirs)):
        x = torch.ones(4, 8, requires_grad=True)
        with count_wire() as wire:
            model(x).sum().backward()
        found[name] = wire.sent()
    x = torch.ones(6, 5)
    for name, call in (("reduce_scatter", lambda: functional.reduce_scatter_tensor(x, "sum", 0, group)),
                       ("all_gather", lambda: functional.all_gather_tensor(x, 0, group)),
                       ("all_to_all", lambda: functional.all_to_all_single(x, None, None, group))):
        with count_wire() as wire:
            functional.wait_tensor(call())
        found[name] = wire.sent()
    return found


def test_dtensor_sends_what_the_conjugate_pair_sends_and_functional_collectives_count():
    for found in launch(2, one_rank):
        assert found["ours"] == found["DTensor"] == {"all_reduce": 2 * 4 * 8 * 4}      # once each way, [4, 8] of fp32
        assert found["reduce_scatter"] == {"reduce_scatter": 3 * 5 * 4}
        assert found["all_gather"] == {"all_gather": 6 * 5 * 4}
        assert found["all_to_all"] == {"all_to_all": 3 * 5 * 4}


def test_a_norm_without_a_wide_copy_is_the_norm():
    for n in (0, 5, 4096, 10_000):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n))
        # fp32 within rows of 4,096: a relative error of some units of 2 ** -24
        torch.testing.assert_close(squared_norm(x), x.double().square().sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(squared_norm(x.double()), x.double().square().sum(), rtol=1e-14, atol=0)


def unknown():
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    from gpt4lib.profiling.wire import count_wire
    with count_wire(), pytest.raises(NotImplementedError, match="broadcast.* is not counted; accepted: all_reduce"):
        functional.broadcast(torch.ones(2), 0, dist.group.WORLD)
    return True


def test_a_functional_collective_that_is_not_known_is_refused():
    assert launch(2, unknown) == [True, True]
