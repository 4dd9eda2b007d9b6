"""Every layout of a model on a cluster, ranked, and why the others lose."""

from typing import Iterator, NamedTuple

from gpt4lib import format as fmt
from gpt4lib.analysis.estimator import Estimator
from gpt4lib.analysis.training import SECONDS_PER_DAY, Estimate
from gpt4lib.specs import RECOMPUTE, ModelSpec, ParallelPlan

NEAR = 0.02              # how far from the batch that was asked for a plan may be


def replicas(most: int, ep: int, micro: int, global_batch: int) -> int:
    """The largest dp up to `most`, in whole groups of ep, whose whole micro-batches come near the batch; 0 if none above half."""
    for dp in range(most - most % ep, max(most // 2, ep - 1), -ep):
        if abs(max(round(global_batch / (dp * micro)), 1) * dp * micro - global_batch) <= NEAR * global_batch:
            return dp
    return 0


def layouts(spec: ModelSpec, n_devices: int, devices_per_node: int, global_batch: int) -> Iterator[ParallelPlan]:
    """Plans worth pricing. tp: powers of two up to two nodes; pp: divisors of the layers, and powers of two;
    dp: as many replicas as the devices allow and the batch divides into, to two per cent; ep: powers of two that divide the
    experts and dp; any ZeRO stage and recomputation; micro-batches of 1, 2 and 4; 1, 2, 4 or 8 chunks a stage.
    """
    if global_batch < 1 or n_devices < 1:
        raise ValueError(f"n_devices={n_devices}, global_batch={global_batch} are not accepted; give integers >= 1")
    powers = [2 ** i for i in range(16)]
    stages = [p for p in range(1, spec.n_layers + 1) if spec.n_layers % p == 0 or p in powers]
    for tp in (t for t in powers if t <= 2 * devices_per_node):
        for pp in stages:
            most = min(n_devices // (tp * pp), global_batch)
            for ep in (e for e in (powers if spec.is_moe else [1]) if e <= most):
                try:
                    ParallelPlan(tp=tp, pp=pp, dp=ep, ep=ep).check(spec)
                except ValueError:
                    continue
                for micro in (1, 2, 4):
                    dp = replicas(most, ep, micro, global_batch)
                    for chunks in (c for c in (1, 2, 4, 8) if dp and (c == 1 or pp > 1 and c * pp <= spec.n_layers)):
                        for zero in (0, 1, 2, 3) if dp > 1 else (0,):
                            for recompute in RECOMPUTE:
                                yield ParallelPlan(tp=tp, pp=pp, dp=dp, ep=ep, zero_stage=zero, micro_batch=micro, n_chunks=chunks,
                                                   n_micro_batches=max(round(global_batch / (dp * micro)), 1),
                                                   recompute=recompute, sequence_parallel=tp > 1)


def name(plan: ParallelPlan) -> str:
    """A plan in one line."""
    return (f"tp {plan.tp} pp {plan.pp}" + (f"x{plan.n_chunks}" if plan.n_chunks > 1 else "") + f" dp {plan.dp}"
            + (f" cp {plan.cp}" if plan.cp > 1 else "") + (f" ep {plan.ep}" if plan.ep > 1 else "")
            + (f" shard {plan.shard}" if plan.shard else "") + f" zero {plan.zero_stage} micro {plan.micro_batch}x{plan.n_micro_batches}"
            + ("" if plan.recompute == "none" else f" recompute {plan.recompute}"))


class Search(NamedTuple):
    """All layouts priced: those that fit, fastest first by tokens a second, and the rest, least over first."""
    estimator: Estimator
    fitting: list[Estimate]
    too_large: list[Estimate]

    @property
    def best(self) -> Estimate:
        if not self.fitting:
            least = self.too_large[0] if self.too_large else None
            raise ValueError("no layout fits: " + (f"the least, {name(least.plan)}, {self.why(least)}" if least else "none was tried"))
        return self.fitting[0]

    def why(self, estimate: Estimate) -> str:
        """What a layout loses by: memory, part by part, or the term that costs it most against the best one."""
        limit = self.estimator.cluster.device.memory_bytes
        if estimate.memory.total > limit:
            parts = sorted(estimate.memory.by_part.items(), key=lambda part: -part[1])[:3]
            return (f"needs {fmt.bytes_si(estimate.memory.total)} of {fmt.bytes_si(limit)}: "
                    + ", ".join(f"{part} {fmt.bytes_si(size)}" for part, size in parts))
        best = self.best
        if estimate is best:
            return "the fastest that fits"
        per = lambda e, term: e.by_term[term] / e.plan.global_batch                            # noqa: E731
        gap = {term: per(estimate, term) - per(best, term) for term in estimate.by_term}
        worst = max(gap, key=gap.get)
        slower = rate(best, 1) / rate(estimate, 1) - 1
        idle = best.plan.n_devices - estimate.plan.n_devices
        return (f"{fmt.percent(slower)} slower" + (f", {idle} devices fewer" if idle > 0 else "")
                + f": {worst} takes {fmt.seconds(per(estimate, worst))} a sequence, {fmt.seconds(per(best, worst))} in the best")


def rate(estimate: Estimate, seq_len: int) -> float:
    """Tokens a second."""
    return estimate.plan.global_batch * seq_len / estimate.step_seconds


def search(estimator: Estimator, n_devices: int, global_batch: int) -> Search:
    """Price every layout of the estimator's model on n_devices for steps of global_batch sequences."""
    limit, fitting, large = estimator.cluster.device.memory_bytes, [], []
    for plan in layouts(estimator.spec, n_devices, estimator.cluster.devices_per_node, global_batch):
        estimate = estimator.estimate(plan)
        (fitting if estimate.memory.total <= limit else large).append((rate(estimate, 1), estimate.memory.total, estimate))
    fitting.sort(key=lambda it: -it[0])
    large.sort(key=lambda it: it[1])
    return Search(estimator, [it[2] for it in fitting], [it[2] for it in large])


def explaining(found: Search, tokens: float, days: tuple[float, float],
               utilisation: tuple[float, float] = (0, 1)) -> list[Estimate]:
    """The reverse question: of the layouts that fit, those under which a run over `tokens` takes that many days, of
    undisturbed running, at that MFU; fastest first."""
    seq_len = found.estimator.seq_len
    return [e for e in found.fitting if utilisation[0] <= e.mfu <= utilisation[1]
            and days[0] <= tokens / rate(e, seq_len) / SECONDS_PER_DAY <= days[1]]
