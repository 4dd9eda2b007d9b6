"""What a model, a device, a cluster and a workload *are*. Standard library only."""

from gpt4lib.specs.hardware import DTYPE_BYTES, ClusterSpec, DeviceSpec, dtype_bytes
from gpt4lib.specs.model import Indexer, LatentAttention, LinearAttention, ModelSpec
from gpt4lib.specs.workload import RECOMPUTE, ParallelPlan

__all__ = ["DTYPE_BYTES", "RECOMPUTE", "ClusterSpec", "DeviceSpec", "Indexer", "LatentAttention", "LinearAttention", "ModelSpec",
           "ParallelPlan", "dtype_bytes"]
