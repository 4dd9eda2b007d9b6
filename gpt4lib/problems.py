"""The problems at the end of each chapter: a hint, a check with a tolerance, an expected value.

Expected values are computed from the library when asked, never stored, so a problem cannot drift
away from the chapter it belongs to. Hints and tolerances stand in problems.toml.
"""

import math
from typing import Callable, NamedTuple

from gpt4lib import recorded
from gpt4lib.analysis import collectives, cost, flops, inference, memory, pipeline, roofline, scaling_laws, training
from gpt4lib.analysis.parameters import parameters
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan, registry


class Problem(NamedTuple):
    """`expected` gives the right value; an answer within `tolerance` (relative) of it is accepted."""
    hint: str
    expected: Callable[[], float]
    tolerance: float = 0.0


def _gpt4(**changes) -> ModelSpec:
    return ModelSpec.preset("gpt-4").with_(**changes)


def _attention(**changes) -> int:
    """Parameters of GPT-4's attention in all layers, with some fields changed."""
    return parameters(_gpt4(**changes)).by_part["attention"]


def _int8_cache_fits() -> int:
    """Sequences of 32,768 tokens on the fullest 40 GB GPU of 8 x 16, one-byte keys and values, 2 GB kept back."""
    plan, spec = ParallelPlan(tp=8, pp=16), ModelSpec.preset("gpt-4")
    part = memory.serving(spec, plan, 1, 32768, kv_dtype="int8").by_part
    free = DeviceSpec.preset("a100-40gb").memory_bytes - 2e9 - part["weights"]
    return int(free // part["kv_cache"])


def _cache_equals_weights(batch: int) -> float:
    """The context at which multi-head GPT-4 reads as many bytes of cache as of weights in a step."""
    spec = ModelSpec.preset("gpt-4-mha")
    return 2 * inference.weights_read(spec, batch) / memory.kv_cache_bytes(spec, batch, 1)


def _absorbed_intensity() -> float:
    """FLOP per cached byte of DeepSeek-V3's latent attention while decoding, up-projections absorbed."""
    spec = ModelSpec.preset("deepseek-v3")
    m = spec.latent
    return 2 * spec.n_heads * (2 * m.kv_rank + m.rope_dim) / (2 * (m.kv_rank + m.rope_dim))


def _tensor_wait(device: str, tp: int) -> float:
    """Time of a GPT-4 layer's forward all-reduces inside a node over that of its arithmetic at peak, 8,192 tokens."""
    spec, card = ModelSpec.preset("gpt-4"), DeviceSpec.preset(device)
    sent = collectives.tensor_parallel_layer(8192, spec.d_model, tp)
    work = flops.forward(spec, 1, 8192, causal=True).total / spec.n_layers / tp
    return sent / card.link_bandwidth / (work / card.peak_flop_rate("bf16"))


def _served(n_parameters: float, tokens: float) -> float:
    """The tokens served for which this size and data are the refit law's cheapest way to their loss."""
    law = scaling_laws.REFIT
    return 3 * tokens * (law.alpha * law.a / n_parameters ** law.alpha / (law.beta * law.b / tokens ** law.beta) - 1)


def _predicted_without_the_smallest() -> float:
    """The larger run's loss, from a fit to the recorded runs of every size but the smallest."""
    run = recorded.load("scaling_cpu")
    rows = [(r["parameters"], r["tokens"], r["loss"]) for r in run["fitted"]]
    law = scaling_laws.fit([r for r in rows if r[0] > min(rows)[0]])
    return scaling_laws.loss(run["beyond"]["parameters"], run["beyond"]["tokens"], law)


def _prompt_that_fills() -> int:
    """The shortest prompt that GPT-4 in FP8 on H100s reads no faster than its arithmetic allows."""
    ridge = roofline.ridge(DeviceSpec.preset("h100-sxm"), "fp8")
    return next(n for n in range(1, 9999) if flops.forward(_gpt4(), 1, n, causal=True).total > ridge * inference.weights_read(_gpt4(), n))


def _writes_for_twice() -> int:
    """The batch of GPT-4 in FP8 on H100s whose output, at 1,200 tokens of context, costs under twice what prompts of 8,192 do."""
    card, plan = DeviceSpec.preset("h100-sxm"), ParallelPlan(tp=8, pp=16)
    twice = 2 * flops.forward(_gpt4(), 1, 8192, causal=True).total / card.peak_flop_rate("fp8") / 8192 / 8
    return next(n for n in range(1, 9999) if inference.decode_step(_gpt4(), card, plan, n, 1200, "fp8").seconds / n < twice)


def _somebody_gives_way(n_blocks: int) -> bool:
    """Whether a pool of that many blocks of 4 is too small for chapter 9's six requests on four seats."""
    scheduler = Scheduler(BlockPool(n_blocks, 4), max_running=4, max_batched_tokens=16)
    for i in range(6):
        scheduler.add(Sequence(range(100 * i, 101 * i + 6), 10 + 2 * i))
    while (step := scheduler.schedule()).work and not step.preempted:
        for sequences in scheduler.advance(step):
            for sequence in sequences:
                scheduler.append(sequence, 0)
    return bool(step.preempted)


def _llama_seats() -> float:
    """Sequences of 1,207.5 tokens that Llama-3.1-70B leaves room for on eight cards of 80 GB."""
    part = memory.serving(ModelSpec.preset("llama-3.1-70b"), ParallelPlan(tp=8), 1, 8192).by_part
    return (80e9 - 2e9 - part["weights"]) / (part["kv_cache"] / 8192 * 1207.5) // 1


EXPECTED: dict[str, Callable[[], float]] = {
    "1.1": lambda: parameters(ModelSpec.preset("palm-540b")).total,
    "1.2": lambda: parameters(ModelSpec.preset("mixtral-8x7b")).active,
    "1.3": lambda: (1.8e12 / (12 * 120)) ** 0.5,
    "1.4": lambda: (2 * 220e9 + 55e9) / (2 * 111e9 + 55e9),
    "1.5": lambda: _attention(n_kv_heads=8) - _attention(),
    "1.6": lambda: min(range(8, 512, 8), key=lambda h: abs(_attention(n_heads=h, head_dim=256) - 55e9)),
    "2.1": lambda: 3e12 + (13e12 - 2 * 3e12) / 4,
    "2.2": lambda: scaling_laws.effective_tokens(1, 8),
    "2.3": lambda: _served(parameters(ModelSpec.preset("llama-2-70b")).total, 2e12),
    "2.4": lambda: 15360 * 4096 * 8 / 256,
    "2.5": lambda: 469e9 / (0.8 * 15360 * 4096) * math.log(5),
    "2.6": _predicted_without_the_smallest,
    "3.1": lambda: pipeline.bubble_fraction(16, 64),
    "3.2": lambda: next(m for m in range(1, 999) if pipeline.bubble_fraction(15, m) <= 0.1),
    "3.3": lambda: sum(memory.training_state(ModelSpec.preset("llama-3.1-70b"), ParallelPlan(tp=8, dp=8, zero_stage=1)).values()),
    "3.4": lambda: collectives.tensor_parallel_layer(8192, 8192, 8),
    "3.5": lambda: _tensor_wait("h100-sxm", 8),
    "3.6": lambda: 2 * collectives.all_to_all(8192 * 2 * ModelSpec.preset("gpt-4").d_model * 2, 16),
    "4.1": lambda: training.mfu(2.15e25, 20_000, 95 * 86_400, 312e12),
    "4.2": lambda: 6 * 175e9 * 300e9 / (1024 * 312e12 * 0.45) / 86_400,
    "4.3": lambda: 63e6 / (8192 * 55 * 24),
    "4.4": lambda: flops.forward(_gpt4(), 1, 32768, causal=True).total / flops.forward(_gpt4(), 4, 8192, causal=True).total,
    "4.5": lambda: cost.goodput(25_000, 50_677, 60, 10_800).fraction,
    "5.1": lambda: roofline.distinct_experts(8, 2, 16),
    "5.2": lambda: roofline.distinct_experts(256, 8, 32) / 256,
    "5.3": lambda: roofline.ridge(DeviceSpec.preset("h100-sxm"), "bf16") * 8 / 2,
    "5.4": lambda: next(b for b in range(1, 100) if roofline.distinct_experts(16, 2, b) >= 0.9 * 16),
    "5.5": lambda: 16 * 4 * (2 / 4) * (1 / 4) / 2,
    "5.6": lambda: inference.weights_read(_gpt4(n_experts=128, top_k=16, d_expert=_gpt4().d_ff // 8), 8),
    "6.1": lambda: 4 * 2.039e12 / (2 * inference.weights_read(ModelSpec.preset("llama-3.1-70b"), 1)),
    "6.2": lambda: 2 * 128 / 0.5,
    "6.3": lambda: max(80, 8 * math.ceil(80 / 6)),
    "6.4": _prompt_that_fills,
    "6.5": lambda: inference.decode_step(_gpt4(), DeviceSpec.preset("a100-40gb"), ParallelPlan(tp=8, pp=8), 32, 2048, "int8").seconds,
    "6.6": lambda: 1 / inference.decode_step(ModelSpec.preset("mixtral-8x7b"), DeviceSpec.preset("h200"), ParallelPlan(), 1, 4096).seconds,
    "7.1": lambda: cost.dollars_per_1k_tokens(1, 2, 989.5e12 / (2 * 70e9)) / 0.0002,
    "7.2": lambda: 0.0021 * 3.6 * 0.148 * 312e12 / (2 * 277e9),
    "7.3": lambda: 10 * 128 * 24 * (1 - 1 / 1.4),
    "7.4": _writes_for_twice,
    "7.5": lambda: cost.dollars_per_1k_tokens(4, 2.5, 64 / inference.decode_step(
        ModelSpec.preset("llama-3.1-70b"), DeviceSpec.preset("h200"), ParallelPlan(tp=4), 64, 4096).seconds),
    "8.1": lambda: memory.kv_cache_bytes(ModelSpec.preset("llama-3.1-70b"), 1, 1),
    "8.2": lambda: memory.kv_cache_bytes(ModelSpec.preset("palm-540b").with_(n_kv_heads=48, head_dim=128), 512, 2048),
    "8.3": lambda: _cache_equals_weights(64),
    "8.4": _int8_cache_fits,
    "8.5": _absorbed_intensity,
    "9.1": lambda: 1 / sum(1 / k for k in range(1, 65)),
    "9.2": lambda: 0.5 / (32 / 33),
    "9.3": _llama_seats,
    "9.4": lambda: math.ceil(8192 / (512 - 48)),
    "9.5": lambda: 1100 + 999 * (1100 - 62 * 16),
    "9.6": lambda: 1 + max(n for n in range(9, 40) if _somebody_gives_way(n)),
}
PROBLEMS = {name: Problem(expected=EXPECTED[name], **row) for name, row in registry.read("gpt4lib", "problems.toml").items()}


def check(problem: str, answer: float | None = None) -> str:
    """Say whether `answer` is right; without one, give the hint.

    Returns one line. Raises ValueError for a problem that does not exist.
    """
    if problem not in PROBLEMS:
        raise ValueError(f"problem {problem!r} does not exist; accepted: {', '.join(PROBLEMS)}")
    p = PROBLEMS[problem]
    if answer is None:
        return f"{problem}  hint: {p.hint}"
    expected = p.expected()
    error = answer / expected - 1
    if abs(error) <= p.tolerance:
        return f"{problem}  ✓ right: {answer:,.6g}"
    if error and answer > 0 and abs(error) > 0.5:
        return f"{problem}  ✗ {answer:,.6g} is {answer / expected:.3g} times what it should be"
    return f"{problem}  ✗ {answer:,.6g} is off by {error:+.2%}; accepted within {p.tolerance:.1%}"
