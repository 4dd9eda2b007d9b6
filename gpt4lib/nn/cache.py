"""The key/value cache: what a sequence keeps so that each new token costs one forward pass of one token."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer, the tensors of past tokens, [batch, heads, tokens, width], appended along tokens.

    A windowed layer keeps no more than its window. Latent attention stores one tensor a layer,
    ordinary attention two: the cache does not care which.
    """

    def __init__(self) -> None:
        self.length = 0                          # tokens seen by the whole stack
        self._layers: dict[int, tuple[Tensor, ...]] = {}

    def append(self, layer: int, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        """Add the new tokens of one layer and return all that this step may attend to."""
        old = self._layers.get(layer)
        full = new if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, new))
        kept = full if window is None else tuple(t[:, :, -window:].clone() for t in full)
        self._layers[layer] = kept
        return full

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.length += n_tokens

    @property
    def bytes(self) -> int:
        """Bytes held, all layers."""
        return sum(t.numel() * t.element_size() for layer in self._layers.values() for t in layer)
