"""Bytes on the wire: what one rank sends in each collective, by the ring algorithm, exactly.

Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH".
`size` is the bytes of the whole tensor, `n` the number of ranks.
"""

from __future__ import annotations


def all_gather(size, n: int):
    """Every rank ends with the whole tensor of `size` bytes, having owned 1/n of it."""
    return size * (n - 1) / n


def reduce_scatter(size, n: int):
    """Every rank ends with the sum of 1/n of a tensor of `size` bytes."""
    return size * (n - 1) / n


def all_reduce(size, n: int):
    """Reduce-scatter, then all-gather."""
    return reduce_scatter(size, n) + all_gather(size, n)


def all_to_all(size, n: int):
    """Every rank keeps 1/n of its `size` bytes and sends the rest away, evenly."""
    return size * (n - 1) / n
