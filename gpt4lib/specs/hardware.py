"""What a device and a cluster *are*: dense peaks, memory, links; SI units as plain numbers."""

import os
from dataclasses import dataclass, field, replace
from typing import Mapping

from gpt4lib.specs import registry
from gpt4lib.specs.checks import positive, require, require_counts

DTYPE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "fp4": 0.5, "int4": 0.5}


def dtype_bytes(dtype: str) -> float:
    """Bytes of one number; ValueError names the accepted types."""
    require(dtype in DTYPE_BYTES, f"dtype {dtype!r} is not known; accepted: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator. `peak` is dense FLOP/s by dtype; memory in bytes, bandwidths in bytes/s;
    `link_bandwidth` is one direction inside the node. Dense means without the 2:4-sparsity factor
    of two. `generation` is the maker's name for the architecture: "ampere", "hopper", ..."""
    name: str
    peak: Mapping[str, float] = field(hash=False)
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    power_watts: float
    generation: str = ""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bandwidth", "link_bandwidth", "power_watts"):
            positive(f"{self.name}: {name}", getattr(self, name))
        require(self.peak, f"{self.name}: peak is empty; give FLOP/s for at least one dtype")
        for dtype, rate in self.peak.items():
            dtype_bytes(dtype)
            positive(f"{self.name}: peak[{dtype}]", rate)
        object.__setattr__(self, "peak", dict(self.peak))    # a preset's table is shared

    def peak_flop_rate(self, dtype: str) -> float:
        """Dense FLOP/s for a dtype; ValueError where the device has no such units."""
        require(dtype in self.peak, f"{self.name} has no {dtype} peak; accepted: {', '.join(self.peak)}")
        return self.peak[dtype]

    @classmethod
    def preset(cls, name: str) -> "DeviceSpec":
        """A device shipped with the library, e.g. "a100-80gb"; ValueError names the known ones."""
        return cls(name=name, **registry.load("devices", name))

    @staticmethod
    def presets() -> tuple[str, ...]:
        return registry.names("devices")


@dataclass(frozen=True)
class ClusterSpec:
    """n_devices of one kind, devices_per_node to a node; `inter_node_bandwidth` is what one device
    gets of the network between nodes, bytes/s, one direction."""
    name: str
    device: DeviceSpec
    n_devices: int
    devices_per_node: int
    inter_node_bandwidth: float

    def __post_init__(self) -> None:
        require_counts(self, 1, "n_devices", "devices_per_node", prefix=f"{self.name}: ")
        positive(f"{self.name}: inter_node_bandwidth", self.inter_node_bandwidth)

    @classmethod
    def preset(cls, name: str) -> "ClusterSpec":
        """A cluster shipped with the library, e.g. "dgx-a100"; ValueError names the known ones."""
        values = registry.load("clusters", name)
        return cls(name=name, **values | {"device": DeviceSpec.preset(values["device"])})

    @classmethod
    def around(cls, device: str, devices_per_node: int | None = None) -> "ClusterSpec":
        """A cluster of a kind of device: the preset with such nodes, else one with such devices, else one of their
        generation. A name like "h100-80gb" stands for the preset that begins most alike."""
        known, like = DeviceSpec.presets(), lambda name: len(os.path.commonprefix([name, device]))    # noqa: E731
        alike = [d for d in known if d.split("-")[0] == device.split("-")[0]]
        name = device if device in known else max(alike, key=like, default=None)
        require(name, f"device {device!r} is not a preset; accepted: {', '.join(known)}")
        chosen, presets = DeviceSpec.preset(name), [cls.preset(c) for c in cls.presets()]
        same = [c for c in presets if c.device.name == name]
        alike = ([c for c in same if c.devices_per_node == devices_per_node] or same
                 or [c for c in presets if c.device.generation == chosen.generation])
        require(alike, f"no cluster of {name} is known; accepted: {', '.join(cls.presets())}")
        return replace(alike[0], name=f"around {name}", device=chosen,
                       devices_per_node=devices_per_node or alike[0].devices_per_node)

    @staticmethod
    def presets() -> tuple[str, ...]:
        return registry.names("clusters")
