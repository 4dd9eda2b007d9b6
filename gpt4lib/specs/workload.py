"""How a model is laid out over devices."""

from dataclasses import dataclass

from gpt4lib.specs.checks import require, require_counts, require_known
from gpt4lib.specs.model import ModelSpec

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True)
class ParallelPlan:
    """Degrees of parallelism and what goes with them. Raises ValueError, one line, on nonsense.

    tp, pp, dp, ep, cp: tensor, pipeline, data, expert and context parallel degrees; experts are
    spread over data-parallel ranks, so ep divides dp and adds no devices. `zero_stage` 0-3 shards
    optimizer, then gradients, then weights over dp; `shard` of those ranks only with hybrid sharding,
    None for all. micro_batch is in sequences; n_micro_batches make up one step of a replica. With
    n_chunks > 1 each stage owns that many slices of the layers (interleaved schedule).
    """
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    zero_stage: int = 0
    micro_batch: int = 1
    n_micro_batches: int = 1
    recompute: str = "none"
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    n_chunks: int = 1
    shard: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, 1, "tp", "pp", "dp", "ep", "cp", "micro_batch", "n_micro_batches", "n_chunks")
        if type(self.zero_stage) is not int or self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage!r} is not accepted; give 0, 1, 2 or 3")
        require_known("recompute", self.recompute, RECOMPUTE)
        require_known("schedule", self.schedule, SCHEDULES)
        if self.n_chunks > 1 and (self.schedule == "gpipe" or self.pp == 1):
            raise ValueError(f"n_chunks={self.n_chunks} needs schedule='1f1b' and pp > 1; got {self.schedule!r} and pp={self.pp}")
        if type(self.sequence_parallel) is not bool:
            raise ValueError(f"sequence_parallel={self.sequence_parallel!r} is not accepted; give True or False")
        if self.dp % self.ep:
            raise ValueError(f"dp={self.dp} is not divisible by ep={self.ep}; experts are spread over data-parallel ranks")
        divides = type(self.shard) is int and self.shard >= 1 and self.dp % self.shard == 0
        if self.shard is not None and not (divides and self.zero_stage == 3 and self.ep == 1):
            raise ValueError(f"shard={self.shard!r} is not accepted; give a divisor of dp={self.dp} with zero_stage 3 and ep 1")

    @property
    def n_devices(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def global_batch(self) -> int:
        """Sequences in one optimizer step, over all replicas."""
        return self.micro_batch * self.n_micro_batches * self.dp

    def check(self, spec: ModelSpec) -> None:
        """ValueError, one line, if this plan cannot hold the model."""
        split = {"n_heads": spec.n_heads, "d_ff": spec.d_ff if spec.n_dense_layers else 0,
                 "d_expert": spec.d_expert or 0, "d_shared": spec.d_shared}
        if "linear" in spec.layer_kinds:
            split |= {"linear.n_key_heads": spec.linear.n_key_heads, "linear.n_value_heads": spec.linear.n_value_heads}
        for name, value in split.items():
            require(value % self.tp == 0, f"{name}={value} is not divisible by tp={self.tp}; choose a tp that divides it")
        if spec.latent is None and spec.n_kv_heads % self.tp and self.tp % spec.n_kv_heads:
            raise ValueError(f"n_kv_heads={spec.n_kv_heads} neither divides nor is divided by tp={self.tp}; "
                             f"key/value heads are split or copied evenly")
        if self.pp * self.n_chunks > spec.n_layers:
            chunks = f" x n_chunks={self.n_chunks}" if self.n_chunks > 1 else ""
            raise ValueError(f"pp={self.pp}{chunks} is more than n_layers={spec.n_layers}; a stage needs a layer")
        if self.ep > 1 and (not spec.is_moe or spec.n_experts % self.ep):
            raise ValueError(f"n_experts={spec.n_experts} is not divisible by ep={self.ep}; choose an ep that divides it")

    def layers_per_chunk(self, n_layers: int) -> tuple[int, ...]:
        """Layers of each of the pp * n_chunks slices of the model, in its order, as even as they get; the
        first take one more. Slice i is chunk i // pp of stage i % pp."""
        whole, extra = divmod(n_layers, self.pp * self.n_chunks)
        return tuple(whole + (i < extra) for i in range(self.pp * self.n_chunks))

    def chunks_of(self, n_layers: int, stage: int) -> list[range]:
        """The layers of each chunk of a pipeline stage, in the order of the model."""
        sizes = self.layers_per_chunk(n_layers)
        return [range(sum(sizes[:i]), sum(sizes[:i + 1])) for i in range(stage, len(sizes), self.pp)]

    def layers_of(self, n_layers: int, stage: int) -> tuple[int, ...]:
        """The layers a pipeline stage holds, all its chunks together, in the order of the model."""
        return tuple(layer for chunk in self.chunks_of(n_layers, stage) for layer in chunk)

    def layers_per_stage(self, n_layers: int) -> tuple[int, ...]:
        """How many layers each pipeline stage holds."""
        return tuple(len(self.layers_of(n_layers, stage)) for stage in range(self.pp))
