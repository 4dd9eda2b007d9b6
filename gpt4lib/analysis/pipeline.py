"""Pipeline schedules in closed form. Narayanan et al. 2021, arXiv:2104.04473, section 2.2."""

from __future__ import annotations


def bubble_fraction(n_stages: int, n_micro_batches: int, n_chunks: int = 1) -> float:
    """Share of a step in which a stage idles: (p-1) / (v m + p-1); v chunks a stage when interleaved."""
    idle = n_stages - 1
    return idle / (n_chunks * n_micro_batches + idle)


def in_flight(n_stages: int, n_micro_batches: int, stage: int) -> int:
    """Micro-batches whose activations a stage holds at most under 1F1B, stages counted from 0."""
    return min(n_stages - stage, n_micro_batches)
