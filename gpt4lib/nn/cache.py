"""The key/value cache: what a sequence keeps so that each new token costs one forward pass of one token."""

import copy

import torch
from torch import Tensor

from gpt4lib.kernels import decode
from gpt4lib.kernels.attention import attention
from gpt4lib.specs.model import ModelSpec


class KVCache:
    """Contiguous: per layer, the tensors of past tokens, [batch, heads, tokens, width], growing along tokens.

    All sequences have the same length. A windowed layer keeps no more than its window. Latent attention stores
    one tensor a layer, ordinary attention two: the cache does not care which.
    """

    def __init__(self) -> None:
        self.length = 0                          # tokens seen by the whole stack
        self._layers: dict[int, tuple[Tensor, ...]] = {}       # what is held, views into ...
        self._buffers: dict[int, tuple[Tensor, ...]] = {}      # ... room that doubles when it is full

    def append(self, layer: int, *new: Tensor, window: int | None = None) -> tuple[Tensor, ...]:
        """Add the new tokens of one layer and return all that this step may attend to."""
        old = self._layers.get(layer)
        if old is None or window is not None or new[0].requires_grad:
            full = new if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, new))
            self._buffers.pop(layer, None)                     # what is held no longer lives there
            self._layers[layer] = full if window is None else tuple(t[:, :, -window:].clone() for t in full)
            return full
        start, end = old[0].shape[2], old[0].shape[2] + new[0].shape[2]
        buffers = self._buffers.get(layer)
        if buffers is None or end > buffers[0].shape[2]:
            buffers = tuple(t.new_empty(*t.shape[:2], 2 * end, t.shape[3]) for t in old)
            for buffer, t in zip(buffers, old):
                buffer[:, :, :start] = t
            self._buffers[layer] = buffers
        for buffer, t in zip(buffers, new):
            buffer[:, :, start:end] = t
        self._layers[layer] = tuple(buffer[:, :, :end] for buffer in buffers)
        return self._layers[layer]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """Add the new keys and values, and attend to all: shapes as in `kernels.attention.attention`."""
        k, v = self.append(layer, k, v, window=window)
        pages = k.transpose(1, 2), v.transpose(1, 2)           # a contiguous cache is one page a sequence
        if sinks is not None or decode.choose(q, pages[0])[0] != "triton":      # which it is not if a gradient is asked for
            return attention(q, k, v, window=window, sinks=sinks)
        table = torch.arange(len(q), device=q.device, dtype=torch.int32)[:, None]
        return decode.paged_attention(q, *pages, table, torch.full_like(table[:, 0], k.shape[2]), window=window)

    @property
    def known_length(self) -> int:
        """`length`: the host always knows it."""
        return self.length

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Where the next tokens stand, int64 [n_tokens]."""
        return torch.arange(self.length, self.length + n_tokens, device=device)

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.length += n_tokens

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held, all layers; spare room is not counted."""
        return sum(t.numel() * t.element_size() for layer in self._layers.values() for t in layer)


class PagedKVCache:
    """Pages of page_size tokens in one pool; each sequence has its own length and its own list of pages.

    table, int32 [batch, pages], says which page holds a sequence's tokens 0.., page_size.., and is the caller's to
    fill; several rows may name the same page, and an empty seat of a fixed batch should own one that nobody reads: it is
    written to like any other. For inference only: nothing is differentiated through it. Kwon et al. 2023,
    arXiv:2309.06180, section 4.
    """

    def __init__(self, spec: ModelSpec, n_pages: int, page_size: int, table: Tensor, dtype: torch.dtype = torch.float32) -> None:
        if spec.latent is not None or spec.sinks:
            raise ValueError(f"{spec.name}: pages hold keys and values per head; latent attention and sinks need a KVCache")
        shape = spec.n_layers, n_pages, page_size, spec.n_kv_heads, spec.head_dim
        self.page_size, self.table = page_size, table
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=table.device) for _ in range(2))
        self.lengths = torch.zeros(len(table), dtype=torch.int32, device=table.device)

    def rows(self, start: int, stop: int) -> "PagedKVCache":
        """The same pages, seen by some of the sequences: to prefill one while others wait."""
        part = copy.copy(self)
        part.table, part.lengths = self.table[start:stop], self.lengths[start:stop]
        return part

    @property
    def length(self) -> int:
        """Tokens of the longest sequence; on a GPU the host waits for it."""
        return int(self.lengths.max())

    @property
    def known_length(self) -> int:
        """`length` where the host can have it without waiting, otherwise 0: a step in a CUDA graph must not ask."""
        return 0 if self.lengths.is_cuda else self.length

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Where each sequence's next tokens stand, int64 [batch, n_tokens]."""
        return self.lengths[:, None].long() + torch.arange(n_tokens, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """Write the new keys and values into their pages, and attend to each sequence's own; shapes as in
        `kernels.attention.attention`, in the dtype of q. Sinks are refused when the cache is made."""
        where = self.positions(q.shape[2], q.device)                             # [batch, n_tokens]
        page = self.table.long().gather(1, where // self.page_size)
        for pool, new in ((self.keys, k), (self.values, v)):
            pool[layer][page, where % self.page_size] = new.detach().transpose(1, 2).to(pool.dtype)
        return decode.paged_attention(q.to(self.keys.dtype), self.keys[layer], self.values[layer], self.table,
                                      self.lengths + q.shape[2], window=window).to(q.dtype)

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.lengths += n_tokens
