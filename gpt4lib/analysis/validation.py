"""Predictions beside published measurements, row by row: how wrong the estimates are, and where.

A row is one measured figure of one run, in the columns below; what a paper leaves out stays empty, and `case` says what
is assumed in its place. No row, source or system is treated by name. Measured values enter twice, and never a prediction: to
set apart runs below 5 % MFU, and as what predictions are compared with.
"""

import csv
import hashlib
import io
import math
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any, Callable, Iterable, Mapping, NamedTuple

from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis.estimator import Estimator
from gpt4lib.analysis.training import Estimate
from gpt4lib.specs import DTYPE_BYTES, RECOMPUTE, ClusterSpec, LatentAttention, ModelSpec, ParallelPlan, registry
from gpt4lib.specs.checks import require

FORMATS = registry.read("gpt4lib.analysis", "measured/columns.toml")
WORDS = FORMATS["training"]["words"]
QUANTITIES = WORDS["quantity"]
FIGURES = ("median_abs_error", "mean_abs_error", "p90_abs_error", "bias")
BADLY_SCALED = 0.05                  # a measured MFU below which a run is set apart
APART = " (below 5 % MFU)"
DEEPSEEK = LatentAttention(kv_rank=512, rope_dim=64, nope_dim=128, v_dim=128, q_rank=1536)   # arXiv:2405.04434, section 3.1.2


class Case(NamedTuple):
    """A row as an estimator understands it; where the layout is not fully published, the plans that may be meant."""
    spec: ModelSpec
    cluster: ClusterSpec
    seq_len: int
    dtype: str
    gradient_dtype: str
    fused: bool
    two_gradients: bool
    plans: tuple[ParallelPlan, ...]


@dataclass(frozen=True)
class Result:
    """One row priced, or the reason why not."""
    id: str
    source: str
    quantity: str
    measured: float | None
    fitted: bool = False             # of the half that the constants were fitted to
    predicted: float | None = None
    bound_by: str = ""
    fits: bool | None = None         # whether the run, which took place, is predicted to fit its device
    mfu: float | None = None         # as measured, causal attention; None for memory
    unpriced: str = ""
    model: str = ""                  # of serving: what a group may be told apart by
    engine: str = ""
    device: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus one."""
        return None if self.predicted is None else self.predicted / self.measured - 1

    @property
    def document(self) -> str:
        """The document of the source; tables of one document, told apart in brackets, are not independent."""
        return self.source.split(" (")[0]

    @property
    def group(self) -> str:
        apart = ("peak_memory_bytes", "ttft_seconds", "tpot_seconds")
        return self.quantity if self.quantity in apart else "step_time" if self.quantity in QUANTITIES else "total_seconds"


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file as numbers and words, each with its `line`; a value that cannot be read becomes `problem`.

    A file with a column `input_len` is one of serving, another of training; `format` says which. A `config` is the path of a
    config.json, seen from the file. ValueError, one line, naming the file if it cannot be read and the column if one is missing.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path} cannot be read ({why}); give a CSV file") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        kind = "serving" if "input_len" in (reader.fieldnames or ()) else "training"
        numbers, words = FORMATS[kind].values()
        needed = [name for name in (*numbers, *words, "value") if not numbers.get(name, {}).get("optional")]
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        require(not missing, f"{path} line 1: no column {', '.join(missing)}; needed are {', '.join(needed)}")
        return [_row(path, reader.line_num, raw, kind) for raw in reader]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}; give a CSV file") from None


def _row(path: str | Path, line: int, raw: Mapping[str, str], kind: str) -> dict[str, Any]:
    numbers, words = FORMATS[kind].values()
    row = {"line": line, "problem": "", **{k: (v or "").strip() for k, v in raw.items() if isinstance(k, str)}, "format": kind}
    try:
        if kind == "serving" and row.get("config"):
            row["config"] = str(Path(path).parent / row["config"])
            require(Path(row["config"]).exists(), f"column config: {row['config']} does not exist; give the path of a config.json")
        row |= {name: _number(name, row.get(name, ""), numbers) for name in (*numbers, "value")}
        for name, accepted in words.items():
            if accepted and row[name] not in accepted:
                raise ValueError(f"column {name}: {row[name]!r} is not accepted; give {', '.join(filter(None, accepted))}")
        require(row["value"] is not None, "column value: empty; give the measured number")
    except ValueError as problem:
        row["problem"] = f"{path} line {line}, {problem}"
    return row


def _number(name: str, text: str, numbers: Mapping[str, Mapping]) -> float | int | None:
    if not text:
        return None
    limits = numbers.get(name, {})
    least, most = limits.get("least", 1), limits.get("most", 10 ** 9)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if name == "value" and 0 < number < math.inf:
        return number
    if name != "value" and least <= number <= most and number.is_integer():
        return int(number)
    wanted = "a positive number" if name == "value" else f"an integer from {least} to {most}"
    raise ValueError(f"column {name}: {text!r} is not accepted; give {wanted}")


_cluster = lru_cache(maxsize=None)(ClusterSpec.around)


@lru_cache(maxsize=None)
def _spec(n_layers, d_model, n_heads, n_kv_heads, d_ff, gated, vocab_size, seq_len, n_experts, top_k, latent) -> ModelSpec:
    """A model from its columns. d_ff of a mixture may read "1536 expert x160 + shared 3072 / dense 12288"."""
    width = int(found[0]) if (found := re.match(r"\d+", d_ff)) else 4 * d_model
    extra: dict[str, Any] = {}
    if n_experts:
        named = {word: int(size) for word, size in re.findall(r"(shared|dense) (\d+)", d_ff)}
        extra = {"n_experts": n_experts, "top_k": top_k or 1, "d_expert": width, "d_shared": named.get("shared", 0),
                 "moe_layers": tuple(range("dense" in named, n_layers))}
        width = named.get("dense", width)
    if latent:
        extra |= {"latent": DEEPSEEK, "head_dim": DEEPSEEK.nope_dim + DEEPSEEK.rope_dim}
    return ModelSpec(name="row", n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=width,
                     vocab_size=vocab_size, context=seq_len, gated_ffn=gated, tied=not gated,
                     positions="rotary" if gated else "learned", norm="rmsnorm" if gated else "layernorm", **extra)


def case(row: Mapping[str, Any]) -> Case:
    """A row as a model, a machine and a layout; ValueError, one line, says why it cannot be priced.

    What rows leave out, and what stands in: no micro-batch, any power of two up to 8 that divides the batch;
    no recomputation, the least that fits, or
    the full one where attention is not fused; no ZeRO stage, none. Gradients are summed in fp32 beside bf16 weights and in
    fp16 beside fp16. Ungated models on Volta or Ampere GPUs in fp16 or under model parallelism ran on software without
    fused attention, and with full recomputation without sequence parallelism; tensor parallelism has it
    otherwise. A note that says "interleaved" gives the chunks of a stage (m=3; two where it gives none). A mixture whose
    heads, as many for keys as for queries, would be narrower than 64 has DeepSeek-V2's latent attention, the only kind of
    that shape published. Hybrid sharding stays inside a node.
    """
    for name in ("n_layers", "d_model", "n_heads", "vocab_size", "seq_len", "device", "n_devices"):
        require(row[name], f"{name} is not published")
    tp, pp, cp, ep = (row[name] or 1 for name in ("tp", "pp", "cp", "ep"))
    cluster = _cluster(row["device"], row["devices_per_node"])
    dp = row["dp"] or row["n_devices"] // (tp * pp * cp)
    require(tp * pp * dp * cp == row["n_devices"], f"tp={tp} x pp={pp} x dp={dp} x cp={cp} is not n_devices={row['n_devices']}")
    gated, kv_heads = row["gated_ffn"] == "yes", row["n_kv_heads"] or row["n_heads"]
    spec = _spec(row["n_layers"], row["d_model"], row["n_heads"], kv_heads, row["d_ff"], gated,
                 row["vocab_size"], row["seq_len"], row["n_experts"] or 0, row["top_k"],
                 bool(row["n_experts"]) and kv_heads == row["n_heads"] and row["d_model"] < 64 * row["n_heads"])
    words = re.findall(r"[a-z]+\d+", row["dtype"].lower())
    dtype = next((w for w in words if w in DTYPE_BYTES), "bf16")
    if dtype == "fp32" and words[1:]:
        dtype = words[1]
    if not row["dtype"] and dtype not in cluster.device.peak:
        dtype = "fp16"
    cluster.device.peak_flop_rate(dtype)
    fused = gated or cluster.device.generation not in ("volta", "ampere") or (tp * pp == 1 and dtype != "fp16")
    batch, micro = row["global_batch"], row["micro_batch"]
    require(batch or micro, "neither global_batch nor micro_batch is published")
    each = (batch or micro * dp) // dp
    micros = [b for b in ([micro] if micro else (1, 2, 4, 8)) if each and each % b == 0]
    if batch and (not micros or each * dp != batch):
        raise ValueError(f"global_batch={batch} is not whole micro-batches of {micro or 'any size'} on dp={dp} replicas")
    chunks = 1
    if "interleav" in row.get("note", "").lower() and pp > 1:
        given = re.search(r"interleav\w*(?: \w+)? [mv]=(\d+)", row["note"].lower())
        chunks = int(given.group(1)) if given else 2
        chunks = chunks if chunks * pp <= spec.n_layers else 1
    zero = 3 if row["zero_stage"] == "hybrid" else int(row["zero_stage"] or 0)
    shard = max(cluster.devices_per_node // (tp * cp), 1) if row["zero_stage"] == "hybrid" else None
    plans = tuple(
        ParallelPlan(tp=tp, pp=pp, dp=dp, ep=ep, cp=cp, zero_stage=zero, micro_batch=b, n_micro_batches=each // b,
                     recompute=recompute, sequence_parallel=tp > 1 and (fused or recompute != "full"), n_chunks=chunks, shard=shard)
        for recompute in ([row["recompute"]] if row["recompute"] else RECOMPUTE if fused else ["full"]) for b in micros)
    plans[0].check(spec)
    return Case(spec, cluster, row["seq_len"], dtype, "fp16" if dtype == "fp16" else "fp32", fused,
                not fused or "grad" in row["dtype"], plans)


def choose(estimator: Estimator, plans: Iterable[ParallelPlan]) -> Estimate:
    """Of the plans a row may mean: the fastest of those that fit with the least recomputation; the smallest if none does."""
    estimates = [estimator.estimate(plan) for plan in plans]
    fits = [e for e in estimates if e.memory.fits(estimator.cluster.device)]
    if not fits:
        return min(estimates, key=lambda e: e.memory.total)
    least = min(RECOMPUTE.index(e.plan.recompute) for e in fits)
    return min((e for e in fits if RECOMPUTE.index(e.plan.recompute) == least), key=lambda e: e.step_seconds)


def quantity(name: str, estimate: Estimate, estimator: Estimator) -> float:
    """What a row measures. Published TFLOP/s count the full square of scores (Narayanan et al. 2021, equation 3)."""
    plan, step = estimate.plan, estimate.step_seconds
    return {"iteration_seconds": step,
            "tokens_per_second_per_device": plan.global_batch * estimator.seq_len / step / plan.n_devices,
            "model_tflops_per_device": estimate.flop / step / plan.n_devices / 1e12,
            "hardware_tflops_per_device": estimate.hardware_flop / step / plan.n_devices / 1e12,
            "peak_memory_bytes": estimate.memory.total}[name]


def is_fitted(it: Case) -> bool:
    """Whether a configuration belongs to the half that constants are fitted to: a hash of model, machine and layout.

    Mixtures of experts never do, so that they test what was learned from dense models.
    """
    plan = it.plans[0]
    key = (it.spec.n_layers, it.spec.d_model, it.spec.n_heads, it.seq_len, plan.tp, plan.pp, plan.dp, plan.cp, plan.ep,
           plan.micro_batch, it.cluster.device.name)
    return not it.spec.is_moe and hashlib.sha256(repr(key).encode()).digest()[0] % 2 == 0


class Pricer:
    """Prices rows, with one estimator for each model and machine."""

    def __init__(self, efficiency: eff.Efficiency | None = None, serving: eff.Serving | None = None) -> None:
        self.efficiency, self.serving_constants, self.estimators = efficiency, serving or eff.serving(), {}

    def estimator(self, it: Case) -> Estimator:
        key = (it.spec, it.cluster, it.seq_len, it.dtype, it.gradient_dtype, it.fused, it.two_gradients)
        if key not in self.estimators:
            self.estimators[key] = Estimator(*key[:5], fused=it.fused, two_gradients=it.two_gradients, causal=False,
                                             efficiency=self.efficiency)
        return self.estimators[key]

    def price(self, row: Mapping[str, Any]) -> Result:
        bare = Result(row.get("id") or f"line {row['line']}", row.get("source") or "", row["quantity"],
                      row["value"] if isinstance(row["value"], float) else None)
        if row["problem"]:
            return replace(bare, unpriced=row["problem"])
        try:
            return replace(bare, **(self.serving if row["format"] == "serving" else self.training)(row, bare))
        except ValueError as reason:
            return replace(bare, unpriced=str(reason))

    def serving(self, row: Mapping[str, Any], bare: Result) -> dict[str, Any]:
        from gpt4lib.analysis import served
        return served.price(row, self.serving_constants)

    def training(self, row: Mapping[str, Any], bare: Result) -> dict[str, Any]:
        it = case(row)
        estimator = self.estimator(it)
        found = choose(estimator, it.plans)
        predicted, used = quantity(row["quantity"], found, estimator), None
        if bare.group == "step_time":                     # its error is that of the step, whatever it measures
            ratio = bare.measured / predicted if row["quantity"] == "iteration_seconds" else predicted / bare.measured
            scores = 3 * (estimator.score_flop - estimator.score_flop * (it.seq_len + 1) / 2 / it.seq_len)
            useful = found.flop - found.plan.global_batch * scores
            used = useful / (found.step_seconds * ratio * found.peak)
        return {"predicted": predicted, "bound_by": found.bound_by, "mfu": used, "fitted": is_fitted(it),
                "fits": found.memory.fits(it.cluster.device)}


def summary(results: Iterable[Result]) -> dict[str, float | int | None]:
    """n, priced, and median, mean, 90th percentile and bias (median with its sign) of the error."""
    results = list(results)
    signed = [r.error for r in results if r.error is not None]
    sizes = sorted(map(abs, signed))
    ninth = sizes[min(int(0.9 * len(sizes)), len(sizes) - 1)] if sizes else None
    figures = (median(sizes), mean(sizes), ninth, median(signed)) if sizes else (None,) * len(FIGURES)
    return {"n": len(results), "priced": len(sizes), **dict(zip(FIGURES, figures))}


def apart(result: Result) -> bool:
    """Whether a run is so badly scaled that it is counted by itself: below `BADLY_SCALED`."""
    return result.mfu is not None and result.mfu < BADLY_SCALED


def by(results: Iterable[Result], name: Callable[[Result], str]) -> dict[str, dict]:
    """A summary for each name."""
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(name(r), []).append(r)
    return {key: summary(found) for key, found in groups.items()}


def by_source(results: Iterable[Result]) -> dict[str, dict]:
    """A summary for each source; rows that are `apart` stand under a name of their own."""
    return by(results, lambda r: r.source + APART if apart(r) else r.source)


def average(summaries: Mapping[str, Mapping]) -> dict[str, float]:
    """The mean over sources of each source's figure, so that a large sweep weighs like one table."""
    told = [s for name, s in summaries.items() if s["priced"] and not name.endswith(APART)]
    return {key: mean(s[key] for s in told) if told else None for key in FIGURES[:3]}


def quantiles(results: Iterable[Result]) -> list[float]:
    """Errors that half and nine tenths of the rows stay within, every document weighing the same; badly scaled runs apart."""
    told = [r for r in results if r.error is not None and not apart(r)]
    rows = Counter(r.document for r in told)
    errors = sorted((abs(r.error), 1 / rows[r.document] / len(rows)) for r in told)
    below = list(accumulate(weight for _, weight in errors))
    return [errors[bisect_left(below, share - 1e-9)][0] for share in (0.5, 0.9)] if errors else []
