"""How far real machines stay below their datasheets: the constants behind every estimate of a training step.

They are fitted, once, by `tools/fit_efficiency.py` to the half of the published measurements that
`validation.is_fitted` picks; `efficiency.toml` holds them with the errors on the other half.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Mapping

from gpt4lib.specs import DeviceSpec, registry


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the datasheet and fixed costs in seconds and bytes."""
    matmul: Mapping[str, float] = field(hash=False)      # of the dense peak, in large products, by GPU generation
    attention: Mapping[str, float] = field(hash=False)   # of the dense peak, in fused attention kernels
    fp8: float                       # of the 16-bit fraction, in fp8
    memory: float                    # of the memory bandwidth, for pointwise operators and the optimizer
    kernel_seconds: float            # each operator's start, gaps and ragged last wave
    link: float                      # of the links inside a node, in collectives
    network: float                   # of the network between nodes
    link_hop_seconds: float          # one step of a ring inside a node
    network_hop_seconds: float       # one step of a ring between nodes
    tensor_overlap: float            # share of the backward tensor-parallel sums hidden behind weight gradients
    shard_overlap: float             # share of FSDP's traffic that hides behind arithmetic
    step_seconds: float              # once a step: data, host, logging
    straggling: float                # slow-down for each doubling of the nodes
    framework_bytes: float           # CUDA context and communication buffers
    fragmentation: float             # of what is not state: blocks the allocator cannot reuse
    working_layers: float            # gradients in flight in the backward pass, in layers' activations
    logit_bytes: float               # of a logit and its copies while the loss is computed

    def of(self, table: str, device: DeviceSpec) -> float:
        """A generation's fraction; one never fitted gets the lowest of those that were."""
        values = getattr(self, table)
        return values.get(device.generation, min(values.values()))


@lru_cache(maxsize=None)
def fitted() -> Efficiency:
    """The constants of `efficiency.toml`."""
    table = registry.read("gpt4lib.analysis", "efficiency.toml")
    return Efficiency(matmul=table["matmul"], attention=table["attention"], **table["constants"])


def error(quantity: str) -> tuple[float, float]:
    """What half, and nine tenths, of the errors of "step" or "memory" stay within, on rows that were not fitted: every
    document weighs the same, and runs below 5 % MFU, which are far off, are left out."""
    errors = registry.read("gpt4lib.analysis", "efficiency.toml")["error"]
    return errors[f"{quantity}_median"], errors[f"{quantity}_p90"]
