"""How a model is laid out over devices."""

from __future__ import annotations

from dataclasses import dataclass

from gpt4lib.specs.model import ModelSpec

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class ParallelPlan:
    """Degrees of parallelism and what goes with them.

    tp, pp, dp, ep, cp: tensor, pipeline, data, expert and context parallel degrees; experts are spread
    over data-parallel ranks, so ep divides dp and adds no devices. `zero_stage` 0-3 shards optimizer, then
    gradients, then weights over dp. micro_batch is in sequences; n_micro_batches make up one step of a replica.
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

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep", "cp", "micro_batch", "n_micro_batches"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not accepted; give an integer >= 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage!r} is not accepted; give 0, 1, 2 or 3")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} is not known; accepted: {', '.join(RECOMPUTE)}")
        if self.dp % self.ep:
            raise ValueError(f"dp={self.dp} is not divisible by ep={self.ep}; experts are spread over "
                             f"data-parallel ranks")

    @property
    def n_devices(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def check(self, spec: ModelSpec) -> None:
        """ValueError, one line, if this plan cannot hold the model."""
        if spec.n_heads % self.tp:
            raise ValueError(f"n_heads={spec.n_heads} is not divisible by tp={self.tp}; choose a tp that divides it")
        if self.pp > spec.n_layers:
            raise ValueError(f"pp={self.pp} is more than n_layers={spec.n_layers}; a stage needs a layer")
        if self.ep > 1 and (not spec.is_moe or spec.n_experts % self.ep):
            raise ValueError(f"n_experts={spec.n_experts} is not divisible by ep={self.ep}; choose an ep that divides it")

    def layers_per_stage(self, n_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage, as even as they get; the first stages take one more."""
        whole, extra = divmod(n_layers, self.pp)
        return tuple(whole + (i < extra) for i in range(self.pp))
