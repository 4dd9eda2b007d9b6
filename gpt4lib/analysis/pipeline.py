"""Pipeline schedules in closed form. Narayanan et al. 2021, arXiv:2104.04473, section 2.2.

n_chunks > 1 is the interleaved schedule: each stage owns that many slices of the layers. Layers
that do not divide are spread by `ParallelPlan.layers_per_chunk`; the slowest stage sets the pace.
"""

from gpt4lib.analysis.elementwise import least


def lost(n_stages, n_micro_batches, n_chunks):
    """Turns of one chunk, forward and backward, that a stage stands still in a step.

    p - 1 to fill and drain; with fewer micro-batches than stages each further chunk waits p - m
    more for the first to come round, which the paper, asking for multiples of p, does not need.
    """
    return n_stages - 1 + (n_chunks - 1) * (n_stages - least(n_stages, n_micro_batches))


def idle_slots(n_stages, n_micro_batches, n_chunks=1, forward=1, backward=2):
    """Slots each stage stands still in a step, where a chunk takes `forward` and `backward` slots."""
    return lost(n_stages, n_micro_batches, n_chunks) * (forward + backward)


def bubble_overhead(n_stages, n_micro_batches, n_chunks=1):
    """Idle time over useful time of a step: (p - 1) / (v m) when m >= p. May exceed one."""
    return lost(n_stages, n_micro_batches, n_chunks) / (n_chunks * n_micro_batches)


def bubble_fraction(n_stages, n_micro_batches, n_chunks=1):
    """Share of a step in which a stage idles: (p - 1) / (v m + p - 1) when m >= p, below one."""
    idle = lost(n_stages, n_micro_batches, n_chunks)
    return idle / (n_chunks * n_micro_batches + idle)


def in_flight(n_stages: int, n_micro_batches: int, stage: int, n_chunks: int = 1, schedule: str = "1f1b") -> int:
    """Forwards whose activations a stage holds at most, each of one micro-batch and one chunk.

    Stages count from 0. GPipe holds all; 1F1B as many as there are stages from here to the end;
    interleaved, twice the stages behind and a round of micro-batches for every further chunk.
    """
    total = n_chunks * n_micro_batches
    if schedule == "gpipe":
        return total
    if n_chunks == 1:
        return min(n_stages - stage, total)
    a_round = -(-n_micro_batches // max(n_micro_batches // n_stages, 1))
    return min(2 * (n_stages - 1 - stage) + (n_chunks - 1) * a_round + 1, total)
