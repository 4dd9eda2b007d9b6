"""How far real machines stay below their datasheets: the constants behind every estimate of a training step.

They are fitted, once, by `tools/fit_efficiency.py` to the half of the published measurements that
`validation.is_fitted` picks; `efficiency.toml` holds them with the errors on the other half.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Mapping, NamedTuple

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


class Engine(NamedTuple):
    """What differs from one serving engine to another: where its host is in the way."""
    sequence_seconds: float          # of the host, for each sequence of a step
    admission_steps: float           # steps a request waits before its prompt is begun
    prompt_wait: float               # share of each other client's prompt that is read before one's own; the rest interrupts decoding
    launch: float = 1.0              # of the time to start a kernel, next to recorded graphs


@dataclass(frozen=True)
class Serving:
    """The constants behind every estimate of serving, fitted by `tools/fit_serving.py`; `serving.toml` holds them."""
    matmul: Mapping[str, float] = field(hash=False)      # of the dense peak, by GPU generation
    engines: Mapping[str, Engine] = field(hash=False)
    narrow: float                    # of the 16-bit fraction, in 8 and 4 bits
    grouped: float                   # of the fraction of a plain product, in the experts of a mixture
    attention: float                 # of the dense 16-bit peak, in attention
    memory: float                    # of the memory bandwidth
    link: float                      # of the links, in the sums of tensor parallelism and in exchanges
    sum_seconds: float               # each collective's latency
    kernel_seconds: float            # each operator's start and ragged end
    step_seconds: float              # of the host, once a step
    room: float                      # of the memory beside the weights, for the cache
    request_seconds: float           # to let a request in and its first token out
    prompt_turns: float              # of reading its own prompt, until the first token

    def of(self, table: str, device: DeviceSpec) -> float:
        """A generation's fraction; one never fitted gets the lowest of those that were."""
        values = getattr(self, table)
        return values.get(device.generation, min(values.values()))

    def engine(self, name: str) -> Engine:
        """The engine whose name this is, whatever its version; one never fitted gets the mean of those that were, and graphs."""
        known = self.engines.get((re.match(r"[a-z]*", name) or [""])[0])
        return known or Engine(*(sum(column) / len(self.engines) for column in list(zip(*self.engines.values()))[:3]))


@lru_cache(maxsize=None)
def serving() -> Serving:
    """The constants of `serving.toml`."""
    table = registry.read("gpt4lib.analysis", "serving.toml")
    return Serving(matmul=table["matmul"], engines={name: Engine(**e) for name, e in table["engines"].items()}, **table["constants"])


def error(quantity: str, file: str = "efficiency.toml") -> tuple[float, float]:
    """What half, and nine tenths, of the errors of a quantity stay within, on rows that were not fitted. Of "step" and "memory"
    every document weighs the same, and runs below 5 % MFU, which are far off, are left out."""
    errors = registry.read("gpt4lib.analysis", file)["error"]
    return errors[f"{quantity}_median"], errors[f"{quantity}_p90"]
