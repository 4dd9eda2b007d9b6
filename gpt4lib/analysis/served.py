"""Rows of measured serving: read as a model, a machine, a layout and a load, and priced.

A row is one measured figure of one run, in the columns of `measured/columns.toml`. No row, source or system is treated by name; of an
engine, the name before its version; of a note, whether it says that the run was under load.
"""

import hashlib
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Mapping, NamedTuple

from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis import inference, validation
from gpt4lib.analysis.serving_estimator import ServingEstimator
from gpt4lib.specs import ClusterSpec, ModelSpec, ParallelPlan, dtype_bytes
from gpt4lib.specs.checks import require

GPT2_VOCABULARY = 50_257
DRAWN = 0.9                          # mean length of prompts and answers drawn from 0.8 to 1 times the nominal one


class Served(NamedTuple):
    """A row as an estimator understands it."""
    spec: ModelSpec
    cluster: ClusterSpec
    plan: ParallelPlan
    dtype: str
    kv_dtype: str
    engine: str
    batch: int                       # of one replica
    loaded: bool                     # whether `batch` clients keep sending, or one batch starts and ends together


_config = lru_cache(maxsize=None)(ModelSpec.from_hf)


def layout(n: int, tp: int, pp: int, ep: int, ranks: int, routed: bool) -> tuple[ParallelPlan, int]:
    """A plan, and by how much the batch of one of `ranks` attention ranks is to be multiplied.

    Experts lie on the devices there are. Where the devices are the square of a degree and ep is that degree, or all of them,
    the degree was counted twice: 64 devices of tp=64, ep=8 are eight.
    """
    tp, pp, ep, ranks = (max(x or 1, 1) for x in (tp, pp, ep, ranks))
    times, k = ranks, math.isqrt(n)
    if ep > 1 and k * k == n == tp * ranks and (ep == k or (ep == n and tp == k)):
        tp, ranks, n = (k, 1, k) if tp >= k else (1, k, k)
    require(tp * pp * ranks == n, f"tp={tp} x pp={pp} x attention_dp={ranks} is not n_devices={n}")
    return ParallelPlan(tp=tp, pp=pp, dp=ranks, ep=ranks if routed else 1), times


def case(row: Mapping[str, Any]) -> Served:
    """A row as a model, a machine and a load; ValueError, one line, says why it cannot be priced.

    What rows leave out, and what stands in: no dtype, 16 bits; no dtype of the cache, 8 bits beside weights of 8 or 4 (int4 and
    int8, which hold weights alone, apart); no vocabulary, GPT-2's.
    """
    require(row["device"], "device is not published")
    if row.get("config"):
        spec = _config(row["config"])
    else:
        for name in ("n_layers", "d_model", "n_heads"):
            require(row[name], f"neither config nor {name} is published")
        spec = validation._spec(row["n_layers"], row["d_model"], row["n_heads"], row["n_kv_heads"] or row["n_heads"],
                                row.get("d_ff", ""), row.get("gated_ffn") == "yes", row["vocab_size"] or GPT2_VOCABULARY,
                                row["input_len"] + row["output_len"], 0, None, False)
    for name in ("n_devices", "batch", "input_len", "output_len"):
        require(row[name], f"{name} is not published")
    plan, times = layout(row["n_devices"], row["tp"], row["pp"], row["ep"], row["attention_dp"], spec.is_moe)
    dtype = (row["weight_dtype"].split() or ["bf16"])[0]
    loaded = "load" in row.get("note", "")
    kv_dtype = row.get("kv_dtype") or ("fp8" if dtype in ("fp8", "fp4") else "bf16")
    dtype_bytes(dtype)
    return Served(spec, validation._cluster(row["device"], None), plan, dtype, kv_dtype, row["engine"],
                  row["batch"] * (times if loaded else 1), loaded)


def is_fitted(spec: ModelSpec) -> bool:
    """Whether a model is one of those that constants are fitted to: a hash of its shape, so that whole models are left out."""
    return hashlib.sha256(repr((spec.n_layers, spec.d_model, spec.n_heads)).encode()).digest()[0] % 2 == 0


@lru_cache(maxsize=1024)
def _estimator(spec, cluster, plan, dtype, kv_dtype, engine, constants) -> ServingEstimator:
    return ServingEstimator(spec, cluster, plan, dtype, kv_dtype, engine=engine, efficiency=constants)


def price(row: Mapping[str, Any], constants: eff.Serving) -> dict[str, Any]:
    """What a row's result says beside what was measured."""
    it = case(row)
    estimator = _estimator(*it[:6], constants)
    share = DRAWN if it.loaded else 1
    lengths = row["input_len"] * share, row["output_len"] * share
    seconds, step = _seconds(estimator, it, *lengths)
    name = row["quantity"]
    if name == "decode_tokens_per_second":
        predicted = it.batch / seconds["tpot_seconds"]
    elif name == "output_tokens_per_second_per_device":
        predicted = it.batch * lengths[1] / seconds["total_seconds"] / it.plan.n_devices
    else:
        predicted = seconds[name]
    return {"predicted": predicted, "bound_by": step.bound_by, "fitted": is_fitted(it.spec), "model": Path(row["config"]).stem if row.get("config") else "x".join(map(str, (it.spec.n_layers, it.spec.d_model))),
            "engine": re.match(r"[a-z]*", it.engine)[0], "device": row["device"],
            "fits": estimator.largest_batch(sum(lengths)) >= (1 if it.loaded else it.batch)}


def _seconds(estimator: ServingEstimator, it: Served, input_len: float, output_len: float) -> tuple[dict[str, float], Any]:
    if it.loaded:
        found = inference.under_load(estimator, it.batch, input_len, output_len)
        first, each, step = found.ttft_seconds, found.tpot_seconds, found.decode
        total = first + (output_len - 1) * each
    else:
        first, total = inference.static(estimator, it.batch, input_len, output_len)
        each, step = (total - first) / max(output_len - 1, 1), estimator.step(it.batch, input_len + output_len / 2)
    return {"ttft_seconds": first, "prefill_seconds": first, "tpot_seconds": each, "decode_total_seconds": total - first,
            "total_seconds": total}, step
