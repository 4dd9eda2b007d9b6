"""Feed-forward blocks, and a mixture of them with a learned router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt4lib.specs.model import ModelSpec


class FeedForward(nn.Module):
    """Up, activation, down; gated (SwiGLU, Shazeer 2020, arXiv:2002.05202) or plain GELU."""

    def __init__(self, d_model: int, width: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=bias) if gated else None
        self.up = nn.Linear(d_model, width, bias=bias)
        self.down = nn.Linear(width, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Mixture of experts: each token goes to its top_k experts, and to the shared ones if there are any.

    x [tokens, d_model] -> the same shape. Router in fp32 or better; gates are a softmax over the chosen
    logits, which equals softmax, top-k, renormalise. The loop is the oracle that faster paths are tested
    against. Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088, section 2.1.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.router = nn.Linear(spec.d_model, spec.n_experts, bias=spec.router_bias)
        self.experts = nn.ModuleList(FeedForward(spec.d_model, spec.d_expert, spec.gated_ffn, spec.expert_bias)
                                     for _ in range(spec.n_experts))
        self.shared = (FeedForward(spec.d_model, spec.d_shared, spec.gated_ffn, spec.ffn_bias)
                       if spec.d_shared else None)
        self.shared_gate = nn.Linear(spec.d_model, 1, bias=False) if spec.shared_gate else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts and their gates, both [tokens, top_k]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.router.bias is None else self.router.bias.to(wide)
        logits = F.linear(x.to(wide), self.router.weight.to(wide), bias)
        top, chosen = logits.topk(self.top_k)
        return chosen, top.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        chosen, gates = self.route(x)                    # [tokens, top_k]
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if len(token):
                gate = gates[token, slot, None].to(x.dtype)
                out = out.index_add(0, token, gate * expert(x[token]))
        if self.shared is not None:
            gate = 1 if self.shared_gate is None else self.shared_gate(x).sigmoid()
            out = out + gate * self.shared(x)
        return out
