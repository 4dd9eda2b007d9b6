"""The problems at the end of each chapter: a hint, a check with a tolerance, an expected value.

Expected values are computed from the library when asked, never stored, so a problem cannot drift
away from the chapter it belongs to.
"""

import math
from dataclasses import dataclass
from typing import Callable

from gpt4lib import recorded
from gpt4lib.analysis import collectives, cost, flops, inference, memory, pipeline, roofline, scaling_laws, training
from gpt4lib.analysis.parameters import parameters
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.sequence import Sequence
from gpt4lib.specs import DeviceSpec, ModelSpec, ParallelPlan


@dataclass(frozen=True)
class Problem:
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


def _somebody_gives_way(n_blocks: int) -> bool:
    """Whether a pool of that many blocks of 4 is too small for chapter 9's six requests on four seats."""
    scheduler = Scheduler(BlockPool(n_blocks, 4), max_running=4, max_tokens=16)
    for i in range(6):
        scheduler.add(Sequence(range(100 * i, 101 * i + 6), 10 + 2 * i))
    while (step := scheduler.schedule()).work and not step.preempted:
        for sequences in scheduler.advance(step):
            for sequence in sequences:
                scheduler.append(sequence, 0)
    return bool(step.preempted)


PROBLEMS: dict[str, Problem] = {
    "1.1": Problem("Q and O are d x (h*k) each, K and V d x k each; a gated block has three matrices; the head is tied.",
                   lambda: parameters(ModelSpec.preset("palm-540b")).total, 0.001),
    "1.2": Problem("Take the total and leave out the 6 of 8 experts a token does not visit, in every layer.",
                   lambda: parameters(ModelSpec.preset("mixtral-8x7b")).active, 0.001),
    "1.3": Problem("12 L d^2 = 1.8e12 with L = 120.", lambda: (1.8e12 / (12 * 120)) ** 0.5, 0.01),
    "1.4": Problem("Two experts of 220e9 and the 55e9 of attention, against two of 111e9 and the same attention.",
                   lambda: (2 * 220e9 + 55e9) / (2 * 111e9 + 55e9), 0.01),
    "1.5": Problem("Only K and V grow: 7 more heads of d x 128, for K and for V, in 120 layers.",
                   lambda: _attention(n_kv_heads=8) - _attention()),
    "1.6": Problem("Loop over multiples of 8 and keep the one whose attention count is nearest to 55e9.",
                   lambda: min(range(8, 512, 8), key=lambda h: abs(_attention(n_heads=h, head_dim=256) - 55e9))),
    "2.1": Problem("2 t + 4 c = 13 with t = 3, then t + c; in tokens, not in trillions.",
                   lambda: 3e12 + (13e12 - 2 * 3e12) / 4, 0.001),
    "2.2": Problem("U (1 + R (1 - exp(-(n - 1) / R))) with U = 1, n = 8 and R = 15.39.",
                   lambda: scaling_laws.effective_tokens(1, 8), 0.005),
    "2.3": Problem("The equation of the served optimum, solved for S: 3 D (left side - 1), with the refit's constants.",
                   lambda: _served(parameters(ModelSpec.preset("llama-2-70b")).total, 2e12), 0.02),
    "2.4": Problem("15,360 x 4,096 tokens, of which each visits 8 of 256 routed experts.",
                   lambda: 15360 * 4096 * 8 / 256, 0.001),
    "2.5": Problem("X / (b1 - b0) ln(b1 / b0), with b0 a fifth of b1 = 15,360 x 4,096 and X = 469e9.",
                   lambda: 469e9 / (0.8 * 15360 * 4096) * math.log(5), 0.005),
    "2.6": Problem("laws.fit([r for r in runs if r[0] > min(runs)[0]]), then laws.loss of the larger run.",
                   _predicted_without_the_smallest, 0.002),
    "3.1": Problem("(p - 1) / (m + p - 1) with p = 16 and m = 64.", lambda: pipeline.bubble_fraction(16, 64), 0.005),
    "3.2": Problem("14 / (m + 14) has to be 0.1 or less.",
                   lambda: next(m for m in range(1, 999) if pipeline.bubble_fraction(15, m) <= 0.1)),
    "3.3": Problem("An eighth of 70.6e9 parameters, times 2 + 2 + 12/8 bytes.",
                   lambda: sum(memory.training_state(ModelSpec.preset("llama-3.1-70b"),
                                                     ParallelPlan(tp=8, dp=8, zero_stage=1)).values()), 0.005),
    "3.4": Problem("Two all-reduces of 8,192 x 8,192 numbers of 2 bytes, each sent 2 (t - 1) / t times.",
                   lambda: collectives.tensor_parallel_layer(8192, 8192, 8)),
    "3.5": Problem("In `wait`, take DeviceSpec.preset('h100-sxm') for its peak and its link_bandwidth.",
                   lambda: _tensor_wait("h100-sxm", 8), 0.01),
    "3.6": Problem("8,192 x 2 rows of 10,752 numbers of 2 bytes leave, but for the sixteenth that stays; the answers come back.",
                   lambda: 2 * collectives.all_to_all(8192 * 2 * ModelSpec.preset("gpt-4").d_model * 2, 16)),
    "4.1": Problem("2.15e25 over cards, seconds and 312e12.", lambda: training.mfu(2.15e25, 20_000, 95 * 86_400, 312e12), 0.005),
    "4.2": Problem("6 N D over 1,024 x 312e12 x 0.45.", lambda: 6 * 175e9 * 300e9 / (1024 * 312e12 * 0.45) / 86_400, 0.01),
    "4.3": Problem("63e6 over 8,192 x 55 x 24 hours.", lambda: 63e6 / (8192 * 55 * 24), 0.005),
    "4.4": Problem("flops.forward(gpt4, 1, n, causal=True).total / n, with 32,768 and with 8,192.",
                   lambda: flops.forward(_gpt4(), 1, 32768, causal=True).total / flops.forward(_gpt4(), 4, 8192, causal=True).total, 0.005),
    "4.5": Problem("cost.goodput with llama, 60 and 10_800.", lambda: cost.goodput(25_000, 50_677, 60, 10_800).fraction, 0.01),
    "5.1": Problem("E (1 - (1 - k/E)^B) with E = 8, k = 2 and B = 16.", lambda: roofline.distinct_experts(8, 2, 16), 0.005),
    "5.2": Problem("The same formula divided by E: a fraction, not a count.",
                   lambda: roofline.distinct_experts(256, 8, 32) / 256, 0.005),
    "5.3": Problem("The ridge is peak over bandwidth, 989e12 / 3.35e12 FLOP per byte; then times E / k.",
                   lambda: roofline.ridge(DeviceSpec.preset("h100-sxm"), "bf16") * 8 / 2, 0.01),
    "5.4": Problem("The share still unread is (7/8)^B; find the first B at which it is 0.1 or less.",
                   lambda: next(b for b in range(1, 100) if roofline.distinct_experts(16, 2, b) >= 0.9 * 16)),
    "5.5": Problem("Each of the four gets f = 2/4 slots a token and probability P = 1/4: 16 * 4 * f * P / 2.",
                   lambda: 16 * 4 * (2 / 4) * (1 / 4) / 2, 0.001),
    "5.6": Problem("Only k/E decides the share that is read; then weights_read(spec.with_(...), 8).",
                   lambda: inference.weights_read(_gpt4(n_experts=128, top_k=16, d_expert=_gpt4().d_ff // 8), 8), 0.001),
    "8.1": Problem("2 L g k numbers a token (keys and values), 2 bytes each: 80 layers, 8 key/value heads of 128.",
                   lambda: memory.kv_cache_bytes(ModelSpec.preset("llama-3.1-70b"), 1, 1)),
    "8.2": Problem("4 L g k bytes a token with L = 118, g = 48, k = 128; times 512 sequences of 2,048 tokens.",
                   lambda: memory.kv_cache_bytes(ModelSpec.preset("palm-540b").with_(n_kv_heads=48, head_dim=128),
                                                 512, 2048), 0.02),
    "8.3": Problem("The step reads 2 bytes of each parameter in inference.weights_read(spec, 64); each token of context adds "
                   "64 times kv_cache_bytes(spec, 1, 1).", lambda: _cache_equals_weights(64), 0.01),
    "8.4": Problem("memory.serving takes kv_dtype; what is left of 40 GB after the weights and 2 GB, over one sequence's cache, "
                   "rounded down.", _int8_cache_fits),
    "8.5": Problem("A head scores against 512 + 64 numbers and sums 512; all 128 heads do so with the same 576 numbers of "
                   "2 bytes.", _absorbed_intensity, 0.001),
    "9.1": Problem("1 / H(64), where H(n) = 1 + 1/2 + ... + 1/n.", lambda: 1 / sum(1 / k for k in range(1, 65)), 0.005),
    "9.2": Problem("Of n numbers spread evenly over 0 to 1 the largest is n / (n + 1) on average, and the mean is 1/2.",
                   lambda: 0.5 / (32 / 33), 0.005),
    "9.3": Problem("The last block holds 1 to 16 tokens, each as likely: 7.5 places are empty on average.",
                   lambda: memory.kv_cache_bytes(ModelSpec.preset("gpt-4"), 1, (16 - 1) / 2), 0.001),
    "9.4": Problem("Decodes come first: 512 - 48 tokens of the prompt in a step, rounded up to whole steps.",
                   lambda: math.ceil(8192 / (512 - 48))),
    "9.5": Problem("The first computes 1,100; each other finds the full blocks of the common 1,000, 62 of them.",
                   lambda: 1100 + 999 * (1100 - 62 * 16)),
    "9.6": Problem("Give tight n_blocks=..., and look for the largest n at which some step has `preempted`; then one more.",
                   lambda: 1 + max(n for n in range(9, 40) if _somebody_gives_way(n))),
}


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
