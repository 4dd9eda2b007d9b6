"""Same numbers as PyTorch's own parallelism: DTensor, torch.distributed.pipelining, ZeroRedundancyOptimizer, DDP."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gpt4lib.distributed.tensor import ColumnParallelLinear, RowParallelLinear
from gpt4lib.nn.transformer import Transformer
from gpt4lib.specs.workload import ParallelPlan as Plan
from tests.distributed import oracle
from tests.distributed.oracle import ADAMW, DENSE, data, on_a_rank, trainer

CLOSE = dict(rtol=0, atol=1e-12)              # fp64: only the order of sums differs, three steps of AdamW magnify it
workers = oracle.Workers(__name__)


def loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@workers.on(2)
def two_linear_layers():
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    peer = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).double()
    ours = nn.Sequential(ColumnParallelLinear(peer[0]), nn.GELU(), RowParallelLinear(peer[2]))
    parallelize_module(peer, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found = []
    for model in (peer, ours):
        mine = x.clone().requires_grad_()
        out = model(mine)
        out.square().sum().backward()
        local = {name: getattr(p.grad, "to_local", lambda: p.grad)() for name, p in model.named_parameters()}
        found.append({"out": out.detach(), "x": mine.grad, **local})
    return found


@pytest.mark.parametrize("what", ["out", "x", "0.weight", "0.bias", "2.weight", "2.bias"])
def test_column_and_row_parallel_layers_equal_dtensor(what):
    for peer, ours in two_linear_layers():
        torch.testing.assert_close(ours[what], peer[what], **CLOSE)


@workers.on(2)
def one_forward_one_backward():
    plan = Plan(pp=2, n_micro_batches=4)
    batch = data(DENSE.with_(tied=False), 4, 1)[0]
    it, peer = (trainer(DENSE.with_(tied=False), plan) for _ in range(2))
    record, result = it.backward(batch)
    rank, module, losses = dist.get_rank(), peer.stages[0], []
    for p in module.parameters():
        p._post_accumulate_grad_hooks.clear()                      # the peer leaves gradients in .grad, as PyTorch does
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=loss)
    schedule.step(*([batch[:, :-1]] if rank == 0 else []), **({} if rank == 0 else dict(target=batch[:, 1:], losses=losses)))
    return result, oracle.gradients(it), {name: p.grad for name, p in module.named_parameters()}, [x.item() for x in losses]


def test_the_pipeline_equals_torch_s_1f1b():
    """Both on the same stages: the mean of its losses, and every gradient (it too divides by the number of micro-batches)."""
    (told, *_), (result, _, _, losses) = one_forward_one_backward()
    assert told == result and result.loss == pytest.approx(sum(losses) / 4, rel=1e-13) and len(losses) == 4
    for _, ours, peer, _ in one_forward_one_backward():
        assert set(ours) == set(peer)
        for name in ours:
            torch.testing.assert_close(ours[name], peer[name], **CLOSE)


@workers.on(2)
def replicas():
    """Three steps with DDP, once with a plain AdamW and once with a sharded one, next to ours with ZeRO 0 and 1."""
    rank, plan = dist.get_rank(), Plan(dp=2, micro_batch=2)
    found = {zero: on_a_rank(DENSE, Plan(dp=2, micro_batch=2, zero_stage=zero), 3) for zero in (0, 1)}
    whole = Transformer(DENSE).double()
    for name in ("ddp", "zero"):
        model = copy.deepcopy(whole)
        parallel = DistributedDataParallel(model)
        matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
        groups = [dict(params=matrices, weight_decay=ADAMW.decay), dict(params=vectors, weight_decay=0.0)]
        options = dict(lr=ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps)
        optimizer = (torch.optim.AdamW(groups, **options) if name == "ddp" else
                     ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **options))
        for batch in data(DENSE, plan.global_batch, 3):
            mine = batch.chunk(2)[rank]
            optimizer.zero_grad()
            loss(parallel(mine[:, :-1]), mine[:, 1:]).backward()
            gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
            torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip)
            optimizer.step()
        found[name] = gradients, {key: p.detach() for key, p in model.named_parameters()}
    return found


@pytest.mark.parametrize("peer", ["ddp", "zero"])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_data_parallelism_equals_ddp_and_the_zero_redundancy_optimizer(zero_stage, peer):
    """Gradients of the third step and weights after it, with our clipping and PyTorch's."""
    for rank in replicas():
        gradients, weights = rank[peer]
        for name, mine in rank[zero_stage].gradients.items():
            torch.testing.assert_close(mine, gradients[name], **CLOSE)
            torch.testing.assert_close(rank[zero_stage].weights[name], weights[name], **CLOSE)
