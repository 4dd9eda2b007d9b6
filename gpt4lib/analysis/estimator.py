"""Predicts training steps: seconds by term and bytes by part, for any plan of a model on a cluster.

A step is the sum, layer by layer (`operators`), of the time of its arithmetic and of its bytes, of collectives, of a
pipeline's idle time and of what happens once a step; `efficiency` says how far real machines stay below their datasheets.
Nothing else is fitted. It follows the frameworks whose runs were published where the running half of this library does
otherwise: FSDP scatters gradients after every micro-batch, and a stage sends each hidden state once, in tp parts.
"""

import math
from collections import Counter
from typing import NamedTuple

from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis import flops, memory, operators, pipeline
from gpt4lib.analysis.training import Estimate
from gpt4lib.specs import ClusterSpec, ModelSpec, ParallelPlan, dtype_bytes
from gpt4lib.specs.checks import require

TRAINED_IN = ("bf16", "fp16", "fp8")
LOSS_BYTES = 54          # a logit is written, cast, compared, shifted, exponentiated, summed, divided, and back again


class Terms(NamedTuple):
    """Seconds of layers for one micro-batch."""
    products: float
    attention: float
    pointwise: float
    kernels: float
    recomputation: float
    tensor: float
    context: float
    experts: float

    @classmethod
    def total(cls, parts: list[tuple[int, "Terms"]]) -> "Terms":
        return cls(*(sum(n * one[i] for n, one in parts) for i in range(len(cls._fields))))


class Estimator:
    """Predicts training steps of one model on one kind of cluster, under any plan.

    `dtype` is what matrices are multiplied in; weights and activations take 16 bits, attention and head run in 16 bits too.
    `gradient_dtype` is what gradients are summed in: fp32, Megatron-LM's choice beside bf16 weights, or a 16-bit type.
    `two_gradients`: each micro-batch's 16-bit gradient stands beside the fp32 sum it is added to. `fused` False describes
    software before 2023, where attention writes out its scores. `causal` says how `flop`,
    and so MFU, counts attention; the time does not depend on it. The cluster's number of devices does not matter here: a plan
    brings its own.
    """

    def __init__(self, spec: ModelSpec, cluster: ClusterSpec, seq_len: int, dtype: str = "bf16", gradient_dtype: str = "fp32",
                 *, fused: bool = True, two_gradients: bool = False, causal: bool = True,
                 efficiency: eff.Efficiency | None = None) -> None:
        require(type(seq_len) is int and seq_len >= 1, f"seq_len={seq_len!r} is not accepted; give a number of tokens >= 1")
        for what, given, accepted in (("dtype", dtype, TRAINED_IN), ("gradient_dtype", gradient_dtype, ("fp32", "bf16", "fp16"))):
            require(given in accepted, f"{what} {given!r} is not accepted for training; give {', '.join(accepted)}")
        if spec.positions == "learned" and seq_len > spec.context + spec.position_offset:
            raise ValueError(f"seq_len={seq_len} is more than the {spec.context} positions of {spec.name}")
        k, device = efficiency or eff.fitted(), cluster.device
        self.efficiency = k
        self.spec, self.cluster, self.seq_len, self.fused = spec, cluster, seq_len, fused
        self.gradient_dtype, self.gradient_bytes, self.two_gradients = gradient_dtype, dtype_bytes(gradient_dtype), two_gradients
        self.peak, half = device.peak_flop_rate(dtype), device.peak_flop_rate("bf16" if dtype == "fp8" else dtype)
        self.matmul, self.head = self.peak * k.of("matmul", device), half * k.of("matmul", device)
        self.matmul *= k.fp8 if dtype == "fp8" else 1
        self.attention, self.casts = half * k.of("attention", device), 4 * (dtype == "fp8")
        self.bandwidth = device.memory_bandwidth * k.memory
        self.link, self.network = device.link_bandwidth * k.link, cluster.inter_node_bandwidth * k.network
        one = flops.forward(spec, 1, seq_len, causal=causal)
        self.flop, self.layer_flop, self.score_flop = 3 * one.total, one.total - one.by_part["head"], one.by_part["scores"]
        self._cache: dict[tuple, object] = {}

    def _once(self, key: tuple, make, *args):
        if key not in self._cache:
            self._cache[key] = make(*args)
        return self._cache[key]

    def collective(self, passes: int, size: float, n: int, stride: int) -> float:
        """Seconds of a ring that moves `size` bytes `passes` times: 1 to gather or scatter, 2 to sum.

        The n ranks stand `stride` devices apart. Inside a node each sends (g - 1) / g of it over its link; between
        nodes (N - 1) / N of it crosses, spread over the ports of the g ranks that share a node.
        """
        if n <= 1 or not size:
            return 0.0
        k = self.efficiency
        g = max(1, min(n, self.cluster.devices_per_node // stride))
        nodes = -(-n // g)
        inside = size * (g - 1) / g / self.link
        if nodes == 1:
            return passes * ((n - 1) * k.link_hop_seconds + inside)
        across = size * (nodes - 1) / nodes / (g * self.network)
        return passes * (nodes * k.network_hop_seconds + (n - nodes) * k.link_hop_seconds + max(inside, across))

    def exchange(self, size: float, n: int, stride: int) -> float:
        """Seconds of an all-to-all in which each of n ranks sends away its share of `size` bytes."""
        if n <= 1:
            return 0.0
        g = max(1, min(n, self.cluster.devices_per_node // stride))
        hop = self.efficiency.link_hop_seconds if g == n else self.efficiency.network_hop_seconds * -(-n // g)
        return hop + max(size * (n - 1) / n / self.link, size * (n - g) / n / self.network)

    def _layer(self, kind: str, moe: bool, plan: ParallelPlan) -> Terms:
        """Seconds of one layer for one micro-batch, forward, backward and again."""
        k, w = self.efficiency, operators.layer(self.spec, kind, moe, plan, self.seq_len, self.fused)
        product = w.flop / self.matmul + 2 * (w.activations + w.weights) / self.bandwidth
        gradients = 2 * w.flop / self.matmul + (4 * w.activations + 2 * (1 + self.gradient_bytes) * w.weights) / self.bandwidth
        if self.fused or kind == "linear":
            scores, scores_back = w.score_flop / self.attention, 2.5 * w.score_flop / self.attention
        else:                                    # scale, mask, softmax: six passes over the scores, eight back
            scores = w.score_flop / self.matmul + 12 * w.scores / self.bandwidth
            scores_back = 2 * w.score_flop / self.matmul + 16 * w.scores / self.bandwidth
        casts = self.casts * (w.activations + w.weights) / self.bandwidth     # 2 bytes read, one written twice: for both layouts
        pointwise, launch = 2 * w.pointwise / self.bandwidth + casts / 2.5, w.kernels * k.kernel_seconds
        sums = 2 * self.collective(2, 2 * w.hidden, plan.tp, 1)
        m = self.spec.latent
        kv = m.kv_rank + m.rope_dim if m else 2 * max(self.spec.n_kv_heads / plan.tp, 1) * self.spec.head_dim
        kv *= kind != "linear"
        gathers = self.collective(1, 2 * w.hidden / self.spec.d_model * plan.cp * kv, plan.cp, plan.tp)
        swaps = 2 * self.exchange(2 * w.hidden * self.spec.top_k, plan.ep, plan.tp * plan.cp) if moe else 0.0
        again = 0.0
        if plan.recompute == "full":             # a block's last sum is not needed again
            again = product + scores + pointwise + launch + (0.75 if plan.sequence_parallel else 0.5) * sums + swaps
        elif plan.recompute == "selective":
            again = pointwise if self.fused else scores
        return Terms(product + gradients, scores + scores_back, 2.5 * pointwise, 2.5 * launch, again,
                     sums * (2 - k.tensor_overlap), 3 * gathers, 2 * swaps)

    def _head(self, plan: ParallelPlan) -> Terms:
        """The same terms for the output head and the loss."""
        d, vocab, tokens = self.spec.d_model, self.spec.vocab_size / plan.tp, plan.micro_batch * self.seq_len / plan.cp
        moved = 6 * (tokens * d + d * vocab + tokens * vocab)
        return Terms(6 * tokens * d * vocab / self.head + moved / self.bandwidth, 0.0, LOSS_BYTES * tokens * vocab / self.bandwidth,
                     0.0, 0.0, 2 * self.collective(2, 2 * tokens * d, plan.tp, 1), 0.0, 0.0)

    def _held(self, plan: ParallelPlan, stage: int) -> tuple[tuple[str, bool, int], ...]:
        """The layers of a stage as (kind, is it routed, how many)s."""
        spec = self.spec
        kinds = Counter((spec.layer_kinds[i], spec.is_moe_layer(i)) for i in plan.layers_of(spec.n_layers, stage))
        return tuple(sorted((*kind, n) for kind, n in kinds.items()))

    def _send(self, plan: ParallelPlan) -> float:
        """A micro-batch's hidden states to the next stage and gradients back, each rank its share."""
        if plan.pp == 1:
            return 0.0
        size = 2 * plan.micro_batch * self.seq_len / plan.cp * self.spec.d_model / plan.tp
        far = plan.tp * plan.cp * plan.dp >= self.cluster.devices_per_node
        k = self.efficiency
        one = k.network_hop_seconds + size / self.network if far else k.link_hop_seconds + size / self.link
        return 2 * plan.n_chunks * one

    def _micro_batch(self, plan: ParallelPlan) -> tuple[Terms, float, float]:
        """(terms of the slowest stage, its seconds, seconds of all stages together) for one micro-batch."""
        stages = self._once(("stages", plan.pp, plan.n_chunks), lambda: [self._held(plan, stage) for stage in range(plan.pp)])
        key = (plan.tp, plan.cp, plan.ep, plan.micro_batch, plan.recompute, plan.sequence_parallel)
        head, found, total = self._once(("head", *key), self._head, plan), [], 0.0
        for held, times in Counter(stages).items():
            layers = [(n, self._once(("layer", kind, moe, *key), self._layer, kind, moe, plan)) for kind, moe, n in held]
            terms = Terms.total(layers)
            total += times * sum(terms)
            found.append((sum(terms), terms))
            if held == stages[-1]:
                with_head = Terms.total([(1, terms), (1, head)])
                found.append((sum(with_head), with_head))
        total += sum(head)
        seconds, slowest = max(found)
        if slowest is with_head and self.spec.n_layers > plan.pp > 1:
            # Layers move away from a head that would set the pace: no slower than the head alone or than an even share.
            layer = (total - sum(head)) / self.spec.n_layers
            even = max(sum(head), total / plan.pp, layer * -(-self.spec.n_layers // (plan.pp - 1)))
            if even < seconds:
                seconds, slowest = even, Terms(*(t * even / seconds for t in slowest))
        return slowest, seconds, total

    def _ends(self, plan: ParallelPlan) -> list[tuple[int, tuple, dict[str, int], float]]:
        """Stages worth looking at, with layers, parameters and largest gathered piece: those that differ, the first, the last."""
        plan.check(self.spec)
        if self.seq_len % plan.cp:
            raise ValueError(f"seq_len={self.seq_len} is not divisible by cp={plan.cp}; choose a cp that divides it")
        ends = []
        for stage in memory.distinct_stages(self.spec, plan):
            held, count = self._held(plan, stage), memory.stage_parameters(self.spec, plan, stage)
            total, apart = sum(count.values()), count["experts"] if plan.ep > 1 else 0
            layer = (total - count["embedding"] - count["head"]) / sum(n for *_, n in held)
            ends.append((stage, held, {"rest": total - apart, "experts": apart}, max(count["embedding"], count["head"], layer)))
        return ends

    def _replicas(self, plan: ParallelPlan, count: dict[str, int], work: float) -> float:
        """What the gradients' way over the replicas adds to a step: all of it at stages 0 and 1, when it comes after the last
        micro-batch; at stages 2 and 3, which send after each, what does not hide."""
        n, m, g, traffic, after = plan.dp * plan.cp, plan.n_micro_batches, self.gradient_bytes, 0.0, 0.0
        for held, ranks, apart in ((count["rest"], n, plan.tp), (count["experts"], n // plan.ep, plan.tp * plan.ep)):
            if plan.zero_stage == 3:
                ranks, copies = plan.shard or ranks, ranks // (plan.shard or ranks)
                pieces = self.spec.n_layers // plan.pp + 1
                passes = m if plan.pp == 1 else 1          # a pipeline gathers once a step
                traffic += passes * pieces * (2 * self.collective(1, 2 * held / pieces, ranks, apart)
                                         + self.collective(1, g * held / pieces, ranks, apart))
                after += self.collective(2, g * held / ranks, copies, apart * ranks)
            elif plan.zero_stage == 2:
                traffic += m * self.collective(1, g * held, ranks, apart)
                after += self.collective(1, 2 * held, ranks, apart)
            elif plan.zero_stage:
                after += self.collective(1, g * held, ranks, apart) + self.collective(1, 2 * held, ranks, apart)
            else:
                after += self.collective(2, g * held, ranks, apart)
        return traffic - self.efficiency.shard_overlap * min(traffic, work) + after

    def _peak(self, plan: ParallelPlan, stage: int, held: tuple, count: dict[str, int], piece: float) -> memory.MemoryUse:
        """Bytes on a device of one stage at the fullest moment of a step."""
        spec, k = self.spec, self.efficiency
        key = (plan.tp, plan.cp, plan.ep, plan.micro_batch, plan.recompute, plan.sequence_parallel)
        part = memory.state(count, plan, "bf16", self.gradient_dtype)
        sharded = count["rest"] / (plan.dp * plan.cp) + count["experts"] * plan.ep / (plan.dp * plan.cp)
        if plan.zero_stage in (1, 2) and self.gradient_bytes < 4:
            part["optimizer"] += 4 * sharded         # the step itself needs its shard of the gradients in fp32
        elif self.two_gradients and self.gradient_bytes == 4 and plan.zero_stage < 3:
            part["gradients"] *= 1.5
        one = [(n, *self._once(("kept", kind, moe, *key), self._kept, kind, moe, plan)) for kind, moe, n in held]
        kept, largest = sum(n * bytes_kept for n, bytes_kept, _ in one), max(whole for *_, whole in one)
        flights = pipeline.in_flight(plan.pp, plan.n_micro_batches, stage, plan.n_chunks, plan.schedule)
        part["activations"] = flights * kept / plan.n_chunks
        working = k.working_layers * largest + (largest if plan.recompute == "full" else 0)
        logits = k.logit_bytes * plan.micro_batch * self.seq_len / plan.cp * spec.vocab_size / plan.tp * (stage == plan.pp - 1)
        part["working"] = max(working, logits)             # the loss is over when the last layer's backward pass begins
        if plan.zero_stage == 3:         # two layers' weights; a pipeline keeps all of its own, and their gradients, to the last
            part["gathered"] = 4 * (piece if plan.pp == 1 else count["rest"] + count["experts"])
        moving = part["activations"] + part["working"] + part.get("gathered", 0)
        part["overhead"] = k.framework_bytes + k.fragmentation * moving
        return memory.MemoryUse(part)

    def _kept(self, kind: str, moe: bool, plan: ParallelPlan) -> tuple[float, float]:
        """(bytes kept, bytes of all activations) of one layer and micro-batch."""
        spec = self.spec
        layer = next(i for i in range(spec.n_layers) if (spec.layer_kinds[i], spec.is_moe_layer(i)) == (kind, moe))
        bare = ParallelPlan(tp=plan.tp, cp=plan.cp, micro_batch=plan.micro_batch, sequence_parallel=plan.sequence_parallel)
        return tuple(memory.layer_activation_bytes(spec, p, self.seq_len, layer, dropout=not self.fused, fused=self.fused)
                     for p in (plan, bare))

    def memory_by_stage(self, plan: ParallelPlan) -> dict[int, memory.MemoryUse]:
        """What a device of each pipeline stage holds at its fullest moment; of stages alike, the first."""
        ends = self._once(("ends", plan.tp, plan.pp, plan.ep, plan.cp, plan.n_chunks), self._ends, plan)
        return {end[0]: self._peak(plan, *end) for end in ends}

    def estimate(self, plan: ParallelPlan) -> Estimate:
        """Time and memory of one step; ValueError, one line, if the plan cannot hold the model."""
        k, m, p, v = self.efficiency, plan.n_micro_batches, plan.pp, plan.n_chunks
        ends = self._once(("ends", plan.tp, p, plan.ep, plan.cp, v), self._ends, plan)
        terms, slowest, total = self._once(("time", plan.tp, p, plan.ep, plan.cp, v, plan.micro_batch, plan.recompute,
                                            plan.sequence_parallel), self._micro_batch, plan)
        send = self._send(plan)
        bubble = 0.0
        if p > 1:        # the other stages' turns to fill and drain; with fewer micro-batches than stages, chunks wait
            bubble = (total + p * send - slowest - send) / v
            bubble += (pipeline.lost(p, m, v) - (p - 1)) / v * (slowest + send)
        work = m * (slowest + send) + bubble
        count = max((end[2] for end in ends), key=lambda c: c["rest"] + c["experts"])
        shards = plan.shard or plan.dp * plan.cp if plan.zero_stage else 1
        stepped = count["rest"] / shards + count["experts"] / max(shards // plan.ep, 1)
        nodes = -(-plan.n_devices // self.cluster.devices_per_node)
        late = k.straggling * math.log2(nodes)
        by_term = {**{name: m * t for name, t in zip(Terms._fields, terms)}, "sends": m * send, "bubble": bubble, "replicas":
                   self._replicas(plan, count, work * (1 + late)), "optimizer": stepped * (self.gradient_bytes + 26) / self.bandwidth,
                   "straggling": late * work, "fixed": k.step_seconds}
        again = {"none": 0, "selective": 0 if self.fused else self.score_flop, "full": self.layer_flop}[plan.recompute]
        fullest = max((self._peak(plan, *end) for end in ends), key=lambda use: use.total)
        return Estimate(plan, by_term, fullest, plan.global_batch * self.flop, plan.global_batch * (self.flop + again),
                        plan.n_devices * self.peak)
