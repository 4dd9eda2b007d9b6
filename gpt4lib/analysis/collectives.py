"""Bytes on the wire: what one rank sends in each collective, by the ring algorithm, exactly.

Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in
MPICH". `size` is the bytes of the whole tensor, `n` the number of ranks; both may be arrays. One
rank receives as much as it sends. A size that n does not divide is padded in practice; the figure
here is then not whole.
"""

from __future__ import annotations


def all_gather(size, n):
    """Every rank ends with the whole tensor of `size` bytes, having owned 1/n of it."""
    return size * (n - 1) / n


def reduce_scatter(size, n):
    """Every rank ends with the sum of 1/n of a tensor of `size` bytes."""
    return size * (n - 1) / n


def all_reduce(size, n):
    """Reduce-scatter, then all-gather."""
    return reduce_scatter(size, n) + all_gather(size, n)


def all_to_all(size, n):
    """Every rank keeps 1/n of its `size` bytes and sends the rest away, evenly."""
    return size * (n - 1) / n


def tensor_parallel_layer(tokens, d_model, tp, bytes_each=2):
    """Bytes one rank sends for the forward pass of one layer.

    An all-reduce of the hidden states after attention and one after the feed-forward block (Shoeybi
    et al. 2019, arXiv:1909.08053, section 3). Sequence parallelism replaces each by a
    reduce-scatter and an all-gather, which is the same.
    """
    return 2 * all_reduce(tokens * d_model * bytes_each, tp)
