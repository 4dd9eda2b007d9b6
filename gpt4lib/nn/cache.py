"""The key/value cache: what a sequence keeps so that each new token costs one forward pass of one token."""

import copy
from array import array
from typing import Callable, Sequence

import torch
from torch import Tensor

from gpt4lib.kernels import decode
from gpt4lib.kernels.attention import attention
from gpt4lib.specs.model import ModelSpec

Attend = Callable[..., Tensor]          # (queries, rows held) -> output


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

    def apply(self, layer: int, attend: Attend, q: Tensor, new: Tensor) -> Tensor:
        """Add the new rows of a layer that keeps one tensor, and attend to all: `attend(q, rows)`."""
        return attend(q, *self.append(layer, new))

    def end(self, n_tokens: int) -> int:
        """The length after n_tokens more."""
        return self.length + n_tokens

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


class Pages:
    """The memory of a paged cache: page_size tokens a page, one pool of [n_layers, n_pages, page_size, heads, width] for keys
    and one for values, or a single one for latent attention. Kwon et al. 2023, arXiv:2309.06180, section 4.
    """

    def __init__(self, spec: ModelSpec, n_pages: int, page_size: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        self.page_size = page_size
        self.pools = tuple(torch.zeros(spec.n_layers, n_pages, page_size, *shape, dtype=dtype, device=device)
                           for shape in self.kept(spec))

    @staticmethod
    def kept(spec: ModelSpec) -> list[tuple[int, int]]:
        """(heads, width) of what each pool keeps of a token in a layer."""
        m = spec.latent
        return [(spec.n_kv_heads, spec.head_dim)] * 2 if m is None else [(1, m.kv_rank + m.rope_dim)]

    @classmethod
    def page_bytes(cls, spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers and pools."""
        return spec.n_layers * page_size * dtype.itemsize * sum(heads * width for heads, width in cls.kept(spec))

    @property
    def device(self) -> torch.device:
        return self.pools[0].device

    def write(self, layer: int, page: Tensor, row: Tensor, *new: Tensor) -> None:
        """Put new [batch, heads, tokens, width], one for each pool, where page and row say, [batch, tokens]."""
        for pool, t in zip(self.pools, new):
            pool[layer][page, row] = t.detach().transpose(1, 2).to(pool.dtype)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Pages to copy, from and to."""
        if pairs:
            old, new = torch.tensor(pairs, device=self.device).T
            for pool in self.pools:
                pool[:, new] = pool[:, old]

    def clear(self, pages: list[int]) -> None:
        """Zero these pages. Done when a page changes hands: rows not written yet are read where sequences are padded to
        equal length, and a masked NaN is still NaN, for it is multiplied by zero."""
        if pages:
            for pool in self.pools:
                pool[:, pages] = 0


def page_table(owned: Sequence[Sequence[int]], width: int, spare: int) -> Tensor:
    """int32 [len(owned), width] on the host: each sequence's pages, cut or padded with a page that nobody's tokens stand in."""
    flat = array("i")
    for pages in owned:
        flat.extend(pages[:width])
        flat.extend([spare] * (width - len(pages)))
    return torch.frombuffer(flat, dtype=torch.int32).view(len(owned), width).clone()


class PagedKVCache:
    """A rectangular batch over pages: each sequence has its own length and its own list of pages.

    table, int32 [batch, pages], says which page holds a sequence's tokens 0.., page_size.., and is the caller's to
    fill; several rows may name the same page, and an empty seat of a fixed batch should own one that nobody reads: it is
    written to like any other. For inference only: nothing is differentiated through it. `pages` gives the memory of
    another cache.
    """

    def __init__(self, spec: ModelSpec, n_pages: int, page_size: int, table: Tensor, dtype: torch.dtype = torch.float32,
                 pages: Pages | None = None) -> None:
        if spec.latent is not None or spec.sinks:
            raise ValueError(f"{spec.name}: pages hold keys and values per head; latent attention and sinks need a KVCache")
        self.pages = pages or Pages(spec, n_pages, page_size, dtype, table.device)
        self.table = table
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

    def end(self, n_tokens: int) -> int:
        """The greatest length after n_tokens more, where the host can have it without waiting, otherwise 0: a step in a
        CUDA graph must not ask."""
        return 0 if self.lengths.is_cuda else self.length + n_tokens

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Where each sequence's next tokens stand, int64 [batch, n_tokens]."""
        return self.lengths[:, None].long() + torch.arange(n_tokens, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """Write the new keys and values into their pages, and attend to each sequence's own; shapes as in
        `kernels.attention.attention`, in the dtype of q. Sinks are refused when the cache is made."""
        where, size = self.positions(q.shape[2], q.device), self.pages.page_size             # [batch, n_tokens]
        self.pages.write(layer, self.table.gather(1, where // size).long(), where % size, k, v)
        keys, values = (pool[layer] for pool in self.pages.pools)
        return decode.paged_attention(q.to(keys.dtype), keys, values, self.table, self.lengths + q.shape[2],
                                      window=window).to(q.dtype)

    def advance(self, n_tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.lengths += n_tokens


class RaggedKVCache:
    """One pass over pieces of different sequences laid side by side: tokens [1, total], each attending to its own sequence.

    pieces: (pages of the sequence, start, stop), the tokens of this pass being start .. stop and those before them
    computed. So a prompt's chunk and another sequence's single token share every matrix product of the model; attention
    alone is done apart, pieces of like size together. One pass each; nothing is differentiated through it. `spare` is a page
    that nobody's tokens stand in, which tables are padded with.
    """

    def __init__(self, pages: Pages, pieces: Sequence[tuple[Sequence[int], int, int]], spare: int) -> None:
        self.pages, device, size = pages, pages.device, pages.page_size
        widest = max(-(-stop // size) for _, _, stop in pieces)
        table = page_table([owned for owned, _, _ in pieces], widest, spare)
        starts, stops = (torch.tensor(ends) for ends in zip(*((a, b) for _, a, b in pieces)))
        n = stops - starts
        row = torch.arange(len(pieces)).repeat_interleave(n)
        where = torch.arange(len(row)) - (n.cumsum(0) - n - starts)[row]                    # on the host: no wait for a GPU
        self.table, self.lengths = table.to(device), stops.int().to(device)
        self._where, self._page = where.to(device), table[row, where // size].long().to(device)         # [total]
        self._end = max(stop for _, _, stop in pieces)
        self._plans: dict[tuple[int, int | None], list[decode.Group]] = {}
        self._pieces, self._groups, offset = [], {}, 0                  # (first token, n, length) of each; see _group
        for i, (_, start, stop) in enumerate(pieces):
            self._pieces.append((offset, stop - start, stop))
            self._groups.setdefault((stop - start, start == 0), []).append(i)
            offset += stop - start
        self._groups = {key: self._group(rows, key[0]) for key, rows in self._groups.items()}

    def _group(self, rows: list[int], n: int) -> tuple[Tensor, Tensor]:
        """(rows of the table, their tokens [rows, n]) of pieces with equally many tokens."""
        device = self.table.device
        first = torch.tensor([self._pieces[i][0] for i in rows], device=device)
        return torch.tensor(rows, device=device), first[:, None] + torch.arange(n, device=device)

    def end(self, n_tokens: int) -> int:
        """The greatest length after this pass."""
        return self._end

    def positions(self, n_tokens: int, device: torch.device) -> Tensor:
        """Where each token stands in its sequence, int64 [1, total]."""
        return self._where[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """As `PagedKVCache.attend`, for q [1, n_heads, total, head_dim]; a prompt from its start needs no pages."""
        if sinks is not None:
            return self.apply(layer, lambda q, *kv: attention(q, *kv, window=window, sinks=sinks), q, k, v)
        self._write(layer, k, v)
        keys, values = (pool[layer] for pool in self.pages.pools)
        out = torch.empty_like(q)
        for (n, fresh), (rows, tokens) in self._groups.items():
            of = [t[0, :, tokens].transpose(0, 1) for t in ((q, k, v) if fresh else (q,))]       # [rows, heads, n, width]
            y = attention(*of, window=window) if fresh else self._over_pages(of[0].to(keys.dtype), keys, values, rows, window)
            out[0, :, tokens] = y.transpose(0, 1).to(q.dtype)
        return out

    def _over_pages(self, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, window: int | None) -> Tensor:
        """`decode.paged_attention`, with what is the same for all layers worked out once."""
        if decode.choose(q, keys)[0] == "triton":
            return decode.paged_attention(q, keys, values, self.table[rows], self.lengths[rows], window=window)
        if (q.shape[2], window) not in self._plans:
            self._plans[q.shape[2], window] = decode.plan(self.table[rows], self.lengths[rows], q.shape[2], self.pages.page_size, window)
        return decode.by_length(q, keys, values, self._plans[q.shape[2], window])

    def apply(self, layer: int, attend: Attend, q: Tensor, *new: Tensor) -> Tensor:
        """Any attention at all, one sequence at a time: attend(q of the piece, the sequence's rows from each pool)."""
        self._write(layer, *new)
        out = []
        for row, (first, n, length) in enumerate(self._pieces):
            held = (decode.sequence_keys(pool[layer], self.table[row], length).to(q.dtype) for pool in self.pages.pools)
            out.append(attend(q[:, :, first:first + n], *held))
        return torch.cat(out, 2)

    def _write(self, layer: int, *new: Tensor) -> None:
        self.pages.write(layer, self._page[None], self._where[None] % self.pages.page_size, *new)

    def advance(self, n_tokens: int) -> None:
        """The pass is over; who scheduled it counts."""


Cache = KVCache | PagedKVCache | RaggedKVCache
