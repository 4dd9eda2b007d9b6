"""Predicts one step of a serving engine: some sequences decode a token each while a piece of a prompt is read.

A step is the sum, part by part, of the time of its bytes and of its arithmetic, of collectives, of kernels to start and of the
host's turn; `efficiency.Serving` says how far real machines stay below their datasheets. Nothing else is fitted.
"""

from collections import Counter, namedtuple
from functools import lru_cache
from typing import NamedTuple

from gpt4lib import format as fmt
from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis import flops, memory, operators
from gpt4lib.specs import ClusterSpec, ModelSpec, ParallelPlan, dtype_bytes, registry

# Kernels of a layer beside its matrix products: norms, rotation, cache and attention; of routing; of the delta rule's convolution,
# gates and state; of an indexer. Engines fuse more than the sixteen pointwise operators of a training step.
KERNELS, MOE_KERNELS, LINEAR_KERNELS, INDEXER_KERNELS = 6, 4, 4, 12


class Work(NamedTuple):
    """What a device of one pipeline stage holds and does, before any efficiency: bytes and FLOP."""
    weights: float                   # bytes of all matrices but the routed experts and the head; a look-up costs nothing
    flop: float                      # a token
    traffic: float                   # bytes a token of activations, that products and pointwise operators read and write
    experts: float                   # bytes of the routed experts it holds
    expert_flop: float               # a token
    head: float
    head_flop: float                 # a sequence: logits are computed for the last token alone
    cache: tuple[float, float]       # bytes of a cached token: layers with full attention, windowed ones
    state: float                     # bytes a sequence of linear layers, read and written
    scores: tuple[float, float]      # FLOP of a query-key pair when decoding: full, windowed
    fresh_scores: tuple[float, float]  # when a prompt is read, where latent attention is not absorbed
    linear_flop: float               # a token in the recurrences of linear layers
    kernels: int
    sums: int                        # all-reduces over tp
    swaps: int                       # all-to-alls over ep


@lru_cache(maxsize=None)
def work(spec: ModelSpec, plan: ParallelPlan, stage: int, dtype: str, kv_dtype: str) -> Work:
    """One stage's share. int4 holds the routed experts of a mixture and nothing else of it; heads have 16 bits."""
    local, count = memory.stage_spec(spec, plan, stage), memory.stage_parameters(spec, plan, stage)
    whole = memory.stage_spec(spec, ParallelPlan(tp=plan.tp, pp=plan.pp), stage)           # a token may go to any expert
    one, kinds, last = flops.forward(whole, 1, 1, causal=True).by_part, local.layer_kinds, stage == plan.pp - 1
    decoded, fresh = ({kind: kinds.count(kind) * flops.mixing(local, kind, 1, 0, True, absorbed)[1] for kind in set(kinds)}
                      for absorbed in (True, False))
    a_layer = memory.kv_cache_bytes(local.with_(n_layers=1, layer_kinds=("full",), moe_layers=None), 1, 1, kv_dtype)
    held = sum(count.values()) - sum(count[part] for part in ("experts", "embedding", "positions", "head"))
    layers = [operators.layer(spec, spec.layer_kinds[i], spec.is_moe_layer(i), ParallelPlan(tp=plan.tp), 1, True)
              for i in plan.layers_of(spec.n_layers, stage)]
    indexed = len(layers) * (spec.latent is not None and spec.latent.indexer is not None)
    return Work(
        weights=held * (2 if spec.is_moe and dtype == "int4" else dtype_bytes(dtype)),
        flop=sum(one[part] for part in ("attention", "ffn", "shared_experts", "router")),
        traffic=sum(2 * (layer.activations + layer.pointwise) for layer in layers),
        experts=count["experts"] * dtype_bytes(dtype), expert_flop=one["experts"],
        head=2 * (count["head"] or count["embedding"]) * last, head_flop=one["head"] * last,
        cache=(kinds.count("full") * a_layer, kinds.count("window") * a_layer), state=2 * memory.linear_state_bytes(local, 1),
        scores=(decoded.get("full", 0), decoded.get("window", 0)), fresh_scores=(fresh.get("full", 0), fresh.get("window", 0)),
        linear_flop=decoded.get("linear", 0),
        kernels=sum(layer.kernels - 16 + KERNELS for layer in layers) + (MOE_KERNELS - 6) * local.n_moe_layers
        + LINEAR_KERNELS * kinds.count("linear") + INDEXER_KERNELS * indexed,
        sums=(2 * len(layers) + last) * (plan.tp > 1), swaps=2 * local.n_moe_layers * (plan.ep > 1))


FORMULAS = registry.read("gpt4lib.analysis", "terms.toml")["serving"]
Terms = namedtuple("Terms", FORMULAS)             # seconds of one step, by what takes them


class Step(NamedTuple):
    """One step: a token's latency is the sum over the stages, and a batch can follow another after the slowest one's turn."""
    terms: Terms
    turn: float

    @property
    def seconds(self) -> float:
        return sum(self.terms)

    @property
    def by_term(self) -> dict[str, float]:
        return self.terms._asdict()

    @property
    def bound_by(self) -> str:
        """The term that takes most of the step."""
        return max(self.by_term, key=self.by_term.get)

    def explain(self) -> str:
        """Every term with its share and formula, and how far off such estimates have been."""
        median, p90 = eff.error("tpot", "serving.toml")
        rows = [(term, fmt.seconds(t), fmt.percent(t / self.seconds), FORMULAS[term]) for term, t in self.by_term.items() if t]
        return (f"{fmt.seconds(self.seconds)} a step; of measured times per token not used for fitting, half are within "
                f"{fmt.percent(median, 0)}, nine in ten within {fmt.percent(p90, 0)}\n"
                + fmt.table(rows, ("term", "time", "share", "formula"), right=(1, 2)))


class ServingEstimator:
    """Predicts steps of one model served on one kind of cluster under one plan, in some dtype of weights and of KV cache.

    With ep > 1, ep of a plan's dp ranks share the experts and split the sequences (attention data parallelism): together, tp x
    pp x ep devices, they are one replica. Further copies do not change a step. Where the device has no units for
    the dtype of the weights they are multiplied in 16 bits. `engine` gives the host's time a sequence
    and how long requests wait to be let in; an unknown one gets the mean of those known.
    """

    def __init__(self, spec: ModelSpec, cluster: ClusterSpec, plan: ParallelPlan = ParallelPlan(), dtype: str = "bf16",
                 kv_dtype: str = "bf16", *, engine: str = "", efficiency: eff.Serving | None = None) -> None:
        plan.check(spec)
        dtype_bytes(kv_dtype)
        self.spec, self.cluster, self.plan, self.dtype, self.kv_dtype = spec, cluster, plan, dtype, kv_dtype
        self.works = [work(spec, plan, stage, dtype, kv_dtype) for stage in range(plan.pp)]
        self.efficiency = k = efficiency or eff.serving()
        self.engine, device = k.engine(engine), cluster.device
        half = device.peak.get("bf16") or device.peak_flop_rate("fp16")
        full = half * k.of("matmul", device)
        self.matmul = full if dtype in ("int8", "int4") else max(device.peak.get(dtype, 0) * k.of("matmul", device) * k.narrow, full)
        self.head, self.attention, self.grouped = full, half * k.attention, self.matmul * k.grouped
        self.bandwidth, self.link = device.memory_bandwidth * k.memory, device.link_bandwidth * k.link
        self.network = cluster.inter_node_bandwidth * k.link
        self.ranks = plan.ep
        self.missed = 1 - spec.top_k / spec.n_experts if spec.is_moe else 1.0
        self.window = spec.window or 0
        self.stages = list(Counter(map(self._seconds, self.works)).items())         # alike ones once
        held = memory.device_parameters(spec, plan) * dtype_bytes(dtype)
        self.room = max(device.memory_bytes - held, 0.0) * k.room

    def _seconds(self, w: Work) -> tuple[float, ...]:
        """A stage's work as seconds: once a step, a token, a sequence, a cached token, a query-key pair."""
        k, tp, memory_, attention = self.efficiency, self.plan.tp, self.bandwidth, self.attention
        wire = lambda n: self.link if n <= self.cluster.devices_per_node else self.network      # noqa: E731
        hidden = 2 * self.spec.d_model
        a_sum, launch = k.sum_seconds * self.engine.launch, k.kernel_seconds * self.engine.launch
        exchanged = hidden * self.spec.top_k * (self.ranks - 1) / self.ranks
        return (w.weights / memory_, w.flop / self.matmul + w.traffic / memory_, w.experts / memory_, w.expert_flop / self.grouped,
                w.head / memory_, w.head_flop / self.head,
                w.cache[0] / memory_ + w.scores[0] / attention, w.cache[1] / memory_ + w.scores[1] / attention,
                w.state / memory_ + w.linear_flop / attention,
                w.fresh_scores[0] / attention, w.fresh_scores[1] / attention, w.linear_flop / attention, w.cache[0] / memory_,
                w.kernels * launch, w.sums * a_sum, w.sums * hidden * 2 * (tp - 1) / tp / wire(tp),
                w.swaps * a_sum, w.swaps * exchanged / wire(tp * self.ranks),
                a_sum * (self.plan.pp > 1), hidden / wire(tp * self.plan.pp) * (self.plan.pp > 1))

    def step(self, batch, context, chunk=0, cached=0, pieces=1, pairs=None) -> Step:
        """`batch` sequences of the replica decode a token each after `context` cached ones, and `chunk` tokens of a prompt are
        read after `cached` of its own; plain numbers. Where the chunk is of several prompts, `pieces` of them, `cached` is
        their mean, and `pairs` the queries with their keys, of all."""
        ranks, k, window = self.ranks, self.efficiency, self.window
        mine, tokens = max(batch / ranks, min(batch, 1)), (batch + chunk) / ranks
        touched = 1 - self.missed ** (batch + chunk)
        near = context if context < window else window
        pairs = chunk * cached + chunk * (chunk + 1) / 2 if pairs is None else pairs
        near_pairs = flops.pairs(chunk, cached, True, window) if window and chunk else 0
        rows, found, slowest = mine + (chunk > 0) * pieces / ranks, [], 0.0
        for (w0, w1, e0, e1, h0, h1, c0, c1, s0, p0, p1, p2, p3, kernels, t0, t1, x0, x1, d0, d1), times in self.stages:
            here = (w0 + tokens * w1, e0 * touched + tokens * e1, h0 + rows * h1, mine * (context * c0 + near * c1 + s0),
                    (pairs * p0 + near_pairs * p1 + chunk * p2 + pieces * cached * p3) / ranks, kernels, t0 + tokens * t1, x0 + tokens * x1,
                    d0 + tokens * d1)
            found.append(here if times == 1 else [times * seconds for seconds in here])
            slowest = max(slowest, sum(here))
        total = found[0] if len(found) == 1 else map(sum, zip(*found))
        return Step(Terms(*total, k.step_seconds + batch * self.engine.sequence_seconds), slowest)

    def decode_step(self, batch, context) -> Step:
        """One new token for each of `batch` sequences after `context` cached ones."""
        return self.step(batch, context)

    def prefill(self, tokens, cached=0) -> Step:
        """A prompt's `tokens`, read at once after `cached` ones, and its first token."""
        return self.step(0, 0, tokens, cached)

    def memory(self, batch: int, context: int) -> memory.MemoryUse:
        """What the fullest device holds while a replica serves `batch` sequences."""
        copies = self.plan.dp // self.plan.ep
        return memory.serving(self.spec, self.plan, batch * copies, context, self.dtype, self.kv_dtype)

    def largest_batch(self, context) -> float:
        """Sequences of `context` tokens a replica has room for; below 1, not one fits. What is left beside the weights is filled to
        `room`."""
        a_sequence = max(w.cache[0] * context + w.cache[1] * min(context, self.window) + w.state / 2 for w in self.works)
        return self.room * self.ranks / a_sequence

    def largest_context(self, batch) -> float:
        """Tokens that each of `batch` sequences may have, to a thousandth, and at most the model's context."""
        low, high = 0.0, float(self.spec.context)
        if self.largest_batch(high) >= batch:
            return high
        while high - low > max(1e-3 * low, 0.5):
            middle = (low + high) / 2
            low, high = (middle, high) if self.largest_batch(middle) >= batch else (low, middle)
        return low
