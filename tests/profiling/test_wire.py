"""What the counter says a collective sends is what its ring really sends, piece by piece; ours or PyTorch's own."""

import pytest
import torch
import torch.distributed as dist

from gpt4lib.analysis import collectives
from gpt4lib.distributed.launch import launch
from gpt4lib.distributed.tensor import gather_into, scatter_into
from gpt4lib.profiling import count_wire


class Ring:
    """The oracle: all-reduce as n - 1 turns of passing a growing sum on, then n - 1 of passing the result on."""

    def __init__(self):
        self.n, self.rank, self.sent = dist.get_world_size(), dist.get_rank(), 0

    def pass_on(self, piece: torch.Tensor) -> torch.Tensor:
        got = torch.empty_like(piece)
        work = dist.isend(piece, (self.rank + 1) % self.n)
        dist.recv(got, (self.rank - 1) % self.n)
        work.wait()
        self.sent += piece.numel() * piece.element_size()
        return got

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        pieces = list(x.chunk(self.n))
        for turn in range(self.n - 1):
            got = self.pass_on(pieces[(self.rank - turn - 1) % self.n].clone())
            pieces[(self.rank - turn - 2) % self.n] = pieces[(self.rank - turn - 2) % self.n] + got
        return pieces[self.rank]

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        pieces = {self.rank: mine}
        for turn in range(self.n - 1):
            pieces[(self.rank - turn - 1) % self.n] = self.pass_on(pieces[(self.rank - turn) % self.n])
        return torch.cat([pieces[r] for r in range(self.n)])


def rings(length):
    x = torch.arange(float(length)) * (dist.get_rank() + 1)
    n, sent = dist.get_world_size(), {}
    total = x.clone()
    with count_wire() as wire:
        dist.all_reduce(total)
        part = torch.empty(length // n)
        scatter_into(part, x)
        whole = torch.empty(length)
        gather_into(whole, part)
    for kind, run in (("all_reduce", lambda r: r.all_gather(r.reduce_scatter(x))), ("reduce_scatter", lambda r: r.reduce_scatter(x)),
                      ("all_gather", lambda r: r.all_gather(part))):
        ring = Ring()
        assert torch.equal(run(ring), {"all_reduce": total, "reduce_scatter": part, "all_gather": whole}[kind]), kind
        sent[kind] = ring.sent
    return wire.sent(), sent


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_collective_sends_what_its_ring_sends(n):
    """Integers are summed, so results are equal bit by bit, and the closed form counts the same bytes."""
    for counted, sent in launch(n, rings, 60):
        assert counted == sent == {k: getattr(collectives, k)(240, n) for k in counted}


def mixed():
    rank = dist.get_rank()
    with count_wire() as wire:
        dist.all_to_all_single(torch.empty(5 if rank else 4, 2), torch.ones(6 if rank else 3, 2), [2, 3] if rank else [1, 3],
                               [3, 3] if rank else [1, 2])
        if rank == 0:
            dist.send(torch.ones(7), 1)
        else:
            dist.recv(torch.empty(7), 0)
        dist.broadcast(torch.ones(5), 1)
    return wire.sent(), wire.calls


def test_uneven_exchanges_sends_and_broadcasts():
    (zero, calls), (one, _) = launch(2, mixed)
    assert zero == {"all_to_all": 2 * 2 * 4, "send": 28, "broadcast": 0} and one == {"all_to_all": 3 * 2 * 4, "broadcast": 20}
    assert calls[0].ranks == (0, 1) and calls[0].size == 3 * 2 * 4


def torchs_own():
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(torch.nn.Linear(8, 4, bias=False))
    loss = model(torch.ones(1, 8)).sum()
    with count_wire() as wire:
        loss.backward()
    return wire.sent()


def test_collectives_that_pytorch_starts_are_counted_too():
    assert launch(2, torchs_own) == [{"all_reduce": 8 * 4 * 4}] * 2
