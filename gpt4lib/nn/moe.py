"""Feed-forward blocks, and a mixture of them with a learned router."""

import contextlib
from typing import Iterator, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpt4lib.kernels.experts import combine, experts, within_capacity
from gpt4lib.nn.numerics import Numerics
from gpt4lib.specs.model import ModelSpec


class FeedForward(nn.Module):
    """Up, activation, down; gated (SwiGLU, Shazeer 2020, arXiv:2002.05202) or plain GELU."""

    def __init__(self, d_model: int, width: int, gated: bool, bias: bool, gelu: str = "none") -> None:
        super().__init__()
        self.gelu = gelu
        self.gate = nn.Linear(d_model, width, bias=bias) if gated else None
        self.up = nn.Linear(d_model, width, bias=bias)
        self.down = nn.Linear(width, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate=self.gelu))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Routing(NamedTuple):
    """What a router decided: all [tokens, ..]. `chosen` may hold n_experts, a slot dropped for capacity."""
    logits: Tensor                   # fp32 or fp64 [tokens, n_experts]
    chosen: Tensor                   # int64 [tokens, top_k]
    gates: Tensor                    # like logits [tokens, top_k]

    @property
    def dropped(self) -> int:
        """Slots that found their expert full."""
        return int((self.chosen == self.logits.shape[1]).sum())


class Router(nn.Linear):
    """x [tokens, d_model] -> Routing, decided in fp32 or better whatever the model's dtype.

    A bfloat16 softmax picks other experts for some tokens, so that is not a matter of taste. `renormalise`
    makes the top_k gates sum to one (Mixtral; the same as a softmax over the chosen logits, and computed so);
    without it they are the probabilities themselves (Switch, OLMoE). `jitter` multiplies the input by noise in
    [1 - jitter, 1 + jitter] while training (Fedus et al. 2021, arXiv:2101.03961, section 2.2). With a
    `capacity_factor`, an expert takes ceil(factor * tokens * top_k / n_experts) slots and drops the rest;
    training only, because at inference a token would then depend on its batch mates; padding takes slots like any token.
    A model's routers are built with the defaults: set the attributes of `layer.router` for others.
    """

    def __init__(self, spec: ModelSpec, renormalise: bool = True, jitter: float = 0.0,
                 capacity_factor: float | None = None) -> None:
        super().__init__(spec.d_model, spec.n_experts, bias=spec.router_bias)
        self.top_k, self.renormalise, self.jitter, self.capacity_factor = spec.top_k, renormalise, jitter, capacity_factor

    def forward(self, x: Tensor) -> Routing:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(x.device.type, enabled=False):       # autocast would put the product back into bfloat16
            logits = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        top, chosen = logits.topk(self.top_k)
        gates = top.softmax(-1) if self.renormalise else logits.softmax(-1).gather(1, chosen)
        if self.training and self.capacity_factor is not None:
            n_experts = logits.shape[1]
            chosen = within_capacity(chosen, n_experts, -int(-self.capacity_factor * chosen.numel() // n_experts))
        return Routing(logits, chosen, gates)


class Experts(nn.Module):
    """The weights of all experts, stacked: x [tokens, d_model], chosen [tokens, top_k] -> [slots, d_model].

    Stacked, so that sharding and optimizers see every expert used in every step.
    """

    def __init__(self, spec: ModelSpec, gelu: str = "none") -> None:
        super().__init__()
        n, d, f = spec.n_experts, spec.d_model, spec.d_expert
        self.activation = "swiglu" if spec.gated_ffn else "gelu" if gelu == "none" else "gelu_tanh"
        wide = 2 * f if spec.gated_ffn else f                      # gate rows, then up rows
        self.w_in, self.w_out = nn.Parameter(torch.empty(n, wide, d)), nn.Parameter(torch.empty(n, d, f))
        self.in_bias = nn.Parameter(torch.zeros(n, wide)) if spec.expert_bias else None
        self.out_bias = nn.Parameter(torch.zeros(n, d)) if spec.expert_bias else None
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return experts(x, chosen, self.w_in, self.w_out, self.in_bias, self.out_bias, activation=self.activation)


class MoE(nn.Module):
    """Mixture of experts: each token goes to its top_k experts, and to the shared ones if there are any.

    x [.., d_model] -> the same shape. A token all of whose slots were dropped contributes nothing here and
    passes through the residual stream only. Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024,
    arXiv:2401.04088, section 2.1; shared experts: Dai et al. 2024, arXiv:2401.06066.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics = Numerics()) -> None:
        super().__init__()
        self.router = Router(spec)
        self.experts = Experts(spec, numerics.gelu)
        self.shared = (FeedForward(spec.d_model, spec.d_shared, spec.gated_ffn, spec.ffn_bias, numerics.gelu)
                       if spec.d_shared else None)
        self.shared_gate = nn.Linear(spec.d_model, 1, bias=False) if spec.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        _, chosen, gates = self.router(tokens)
        out = combine(self.experts(tokens, chosen), gates)
        if self.shared is not None:
            gate = 1 if self.shared_gate is None else self.shared_gate(tokens).sigmoid()
            out = out + gate * self.shared(tokens)
        return out.view_as(x)


@contextlib.contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Collects what every router decides while the block runs, in order, with its graph attached::

        with routings(model) as seen:
            logits = model(tokens)
        loss = cross_entropy(...) + 0.01 * sum(map(balance_loss, seen)) / len(seen)

    One Routing a mixture layer; a layer that is recomputed in the backward pass is seen twice.
    """
    seen: list[Routing] = []
    hooks = [m.register_forward_hook(lambda _m, _x, out: seen.append(out)) for m in model.modules() if isinstance(m, Router)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(routing: Routing, mask: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """n_experts * sum_e f_e P_e / top_k of one layer: exactly 1 when balanced, n_experts / top_k when collapsed.

    f_e is the number of a token's slots that go to expert e, P_e its mean probability. One layer at a time:
    pooled over layers, two layers that each collapse on their own experts look balanced. `mask`, bool
    [tokens], leaves out padding; with a process `group` the counts f are those of all ranks, so the mean of
    the ranks' losses is the loss of the whole batch. Source: Fedus et al. 2021, arXiv:2101.03961, equations 4-6,
    divided by top_k.
    """
    logits, chosen, _ = routing
    n_tokens, n_experts = logits.shape
    weight = logits.new_ones(n_tokens) if mask is None else mask.to(logits.dtype)
    slots = F.one_hot(chosen, n_experts + 1)[..., :n_experts].sum(1)         # [tokens, n_experts], dropped ones out
    counts, tokens = weight @ slots.to(logits.dtype), weight.sum()
    share = weight @ logits.softmax(-1) / tokens.clamp(min=1)                # P
    if group is not None:
        total = torch.cat([counts, tokens[None]])
        dist.all_reduce(total, group=group)
        counts, all_tokens = total[:-1], total[-1]
        share = share * tokens * dist.get_world_size(group) / all_tokens.clamp(min=1)
        tokens = all_tokens
    return n_experts * (counts / tokens.clamp(min=1)) @ share / chosen.shape[1]


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router's logits, which keeps them small. Zoph et al. 2022, arXiv:2202.08906, eq. 5."""
    square = routing.logits.logsumexp(-1).square()
    return square.mean() if mask is None else (square * mask).sum() / mask.sum().clamp(min=1)
