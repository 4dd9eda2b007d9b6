"""Pipeline schedules in closed form. Narayanan et al. 2021, arXiv:2104.04473, section 2.2.

n_chunks > 1 is the interleaved schedule: each stage owns that many slices of the layers. Layers
that do not divide are spread by `ParallelPlan.layers_per_stage`; the slowest stage sets the pace.
"""

from __future__ import annotations


def bubble_overhead(n_stages, n_micro_batches, n_chunks=1):
    """Idle time over useful time of a step: (p - 1) / (v m). May exceed one."""
    return (n_stages - 1) / (n_chunks * n_micro_batches)


def bubble_fraction(n_stages, n_micro_batches, n_chunks=1):
    """Share of a step in which a stage idles: (p - 1) / (v m + p - 1), always below one."""
    idle = n_stages - 1
    return idle / (n_chunks * n_micro_batches + idle)


def in_flight(n_stages: int, n_micro_batches: int, stage: int) -> int:
    """Micro-batches whose activations a stage holds at most under 1F1B, stages counted from 0."""
    return min(n_stages - stage, n_micro_batches)
