"""Decoding over a paged key/value cache: few queries, many keys, so the time is that of reading the keys.

A sequence's keys live in pages scattered over a pool; `table` says which. The queries are its last positions:
one when decoding, a handful when a speculative guess is verified. Kwon et al. 2023, arXiv:2309.06180, section 4.
"""

from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gpt4lib.kernels import support
from gpt4lib.kernels.attention import folded, reference, visible

CHUNK = 512              # keys per split. Fixed, so a sequence is cut alike alone and in any batch
MAX_QUERIES = 16
MAX_HEAD_DIM = 256


def sequence_keys(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """One sequence's rows in order: pages [n_pages, page, heads, width], table [pages] -> [1, heads, length, width]."""
    page = pages.shape[1]
    rows = pages[table[:-(-length // page)].long()].flatten(0, 1)[:length]
    return rows.transpose(0, 1)[None]


def by_sequence(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """The definition: one sequence at a time, over its keys in order."""
    out = q.new_zeros(q.shape)
    for b, length in enumerate(lengths.tolist()):
        if length:
            k, v = (sequence_keys(pages, table[b], length) for pages in (k_pages, v_pages))
            out[b] = reference(q[b:b + 1], k, v, visible(q.shape[2], length, window, q.device))[0]
    return out


def of_like_length(lengths: list[int]) -> list[list[int]]:
    """Rows in groups whose shortest is more than half their longest, so that padding never doubles the keys read."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and 2 * lengths[row] > lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Group(NamedTuple):
    """Sequences of like length, as they are attended to together."""
    rows: Tensor             # int64, of the batch
    pages: Tensor            # int64 [rows, pages that are read]
    n_keys: int              # in those pages, of the longest
    seen: Tensor             # bool [rows, 1, n_queries, n_keys]


def plan(table: Tensor, lengths: Tensor, n_queries: int, page: int, window: int | None) -> list[Group]:
    """How `by_length` goes about a batch: the same for every layer of a pass."""
    host, groups, device = lengths.tolist(), [], table.device
    for group in of_like_length(host):
        if not (longest := host[group[0]]):
            continue                                                  # empty seats
        rows = torch.tensor(group, device=device)
        first = 0 if window is None else max(host[group[-1]] - n_queries - window + 1, 0) // page      # no earlier page is seen
        query = lengths[rows, None] - n_queries + torch.arange(n_queries, device=device)               # [rows, n_queries]
        key = torch.arange(first * page, longest, device=device)
        seen = key <= query[..., None]
        if window is not None:
            seen &= key > query[..., None] - window
        groups.append(Group(rows, table[rows, first:-(-longest // page)].long(), longest - first * page, seen[:, None]))
    return groups


def by_length(q: Tensor, k_pages: Tensor, v_pages: Tensor, groups: Sequence[Group]) -> Tensor:
    """The CPU path: the pages of sequences of like length are gathered, padded to the longest, and attended to at once."""
    out = q.new_zeros(q.shape)
    for rows, pages, n_keys, seen in groups:
        k, v = (pool[pages].flatten(1, 2)[:, :n_keys].transpose(1, 2) for pool in (k_pages, v_pages))
        out[rows] = folded(q[rows], k, v, seen)
    return out


def choose(q: Tensor, k_pages: Tensor) -> tuple[str, str]:
    """(path, reason): which implementation `paged_attention` takes for these arguments, and why."""
    missing = support.why_not_triton(q)
    if missing is None and torch.is_grad_enabled() and (q.requires_grad or k_pages.requires_grad):
        missing = "a gradient is asked for, and the kernel has none"
    if missing is None and q.shape[3] > MAX_HEAD_DIM:
        missing = f"head_dim={q.shape[3]} is above the kernel's {MAX_HEAD_DIM}"
    if missing is None and q.shape[2] > MAX_QUERIES:
        missing = f"{q.shape[2]} queries are a prefill, not a decode"
    if missing is None:
        return "triton", f"CUDA: keys are read once, in parallel chunks of {CHUNK}"
    return "folded", f"{missing}; sequences of like length together, query heads folded into rows"


@torch.library.custom_op("gpt4lib::paged_attention", mutates_args=())
def _paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor,
                     window: int, path: str, chunk: int) -> Tensor:
    if path == "triton":
        from gpt4lib.kernels import decode_triton
        return decode_triton.forward(q, k_pages, v_pages, table, lengths, window, chunk)
    return by_length(q, k_pages, v_pages, plan(table, lengths, q.shape[2], k_pages.shape[1], window or None))


@_paged_attention.register_fake
def _(q, k_pages, v_pages, table, lengths, window, path, chunk):
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.gpt4lib.paged_attention)
def _flop(q_shape, k_shape, v_shape, table_shape, *_, **__) -> int:
    """Scores and values over every page a sequence owns, as torch counts attention: masked keys too."""
    batch, heads, queries, width = q_shape
    return 4 * batch * heads * queries * width * table_shape[1] * k_shape[1]


def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, *,
                    window: int | None = None, path: str | None = None, chunk: int = CHUNK) -> Tensor:
    """Causal attention of each sequence's last positions over its pages; forward only.

    q [batch, n_heads, n_queries, head_dim]; k_pages, v_pages [n_pages, page, n_kv_heads, head_dim];
    table int32 [batch, pages]; lengths int32 [batch], the keys of each sequence, its queries among them: at least
    n_queries and at most pages * page, or 0 for an empty seat in a fixed batch, which gives zeros. All of one dtype; the
    last dimension of the pages contiguous. -> like q. `path` forces "triton" or "folded", which reads the lengths on
    the host; None asks `choose`. The Triton result of a sequence is bitwise the same whatever else is in the batch.
    Raises ValueError, one line, for shapes or dtypes that do not fit; values of table and lengths are not looked at.
    """
    batch, heads, _, width = q.shape
    n_kv = k_pages.shape[2]
    if heads % n_kv:
        raise ValueError(f"n_heads={heads} is not divisible by n_kv_heads={n_kv}; query heads share key/value heads evenly")
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != width or len(table) != batch or lengths.shape != (batch,):
        raise ValueError(f"q {tuple(q.shape)}, k_pages {tuple(k_pages.shape)}, v_pages {tuple(v_pages.shape)}, table "
                         f"{tuple(table.shape)} and lengths {tuple(lengths.shape)} do not fit; see the docstring")
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"q is {q.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}; give all three the same dtype")
    if path == "triton":
        support.require_triton(q, path)
    path = path or choose(q, k_pages)[0]
    return _paged_attention(q, k_pages, v_pages, table.int().contiguous(), lengths.int().contiguous(), window or 0, path, chunk)
