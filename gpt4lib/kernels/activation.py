"""What stands between the two matrices of a feed-forward block, and its gradient written out."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh")


def activate(z: Tensor, activation: str) -> Tensor:
    """[.., 2 f] -> [.., f] for "swiglu" (gate, then up), the same width for the others."""
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z from that of activate(z)."""
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], -1)
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh" if activation == "gelu_tanh" else "none")
