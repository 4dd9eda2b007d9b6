"""Expert parallelism: each rank keeps some of the experts, and tokens travel to them and back."""

import torch
import torch.distributed as dist
from torch import Tensor

from gpt4lib.kernels.experts import dispatch, experts
from gpt4lib.nn.moe import Experts


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, as many to each as `send` says; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


class ParallelExperts(Experts):
    """`Experts` of which this rank holds n_experts / ep, stacked; x [tokens, d_model], chosen [tokens, top_k],
    with the numbers of all experts, -> [slots, d_model].

    The slots are sorted by expert as in the local layer, which is also by rank; only counts, then rows, go over the
    wire, any number of them, none too. Dropped slots stay at home. Lepikhin et al. 2020, arXiv:2006.16668, section 3.2.
    """
    group: dist.ProcessGroup

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        ep, mine = dist.get_world_size(self.group), len(self.w_in)
        order, ends = dispatch(chosen, ep * mine)
        # slots of each expert, [ep * mine]: those I send, those I get
        counts = ends.diff(prepend=ends.new_zeros(1)).long()
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        send, receive = (c.view(ep, mine).sum(1).tolist()
                         for c in (counts, theirs))
        kept = order[:sum(send)]
        x = x[kept // chosen.shape[1]]
        rows = _AllToAll.apply(x, send, receive, self.group)
        local = torch.arange(mine, device=x.device).repeat(ep)
        local = local.repeat_interleave(theirs)[:, None]
        slots = experts(rows, local, self.w_in, self.w_out, self.in_bias,
                        self.out_bias, activation=self.activation)
        back = _AllToAll.apply(slots, receive, send, self.group)
        out = back.new_zeros(chosen.numel(), x.shape[1])
        return out.index_copy(0, kept, back)
