"""What a model, a device, a cluster and a workload *are*. Standard library only."""

from gpt4lib.specs.model import Indexer, LatentAttention, LinearAttention, ModelSpec

__all__ = ["Indexer", "LatentAttention", "LinearAttention", "ModelSpec"]
