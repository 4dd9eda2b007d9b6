"""Fits the constants of `gpt4lib/analysis/serving.toml` to the published measurements of half of the models, and writes the error on
the others beside them.

    python tools/fit_serving.py            some minutes on one core

Which half, `served.is_fitted` says: a hash of a model's shape, so that whole models are left out. Loss: the mean over models and
quantities of the mean |predicted / measured - 1|, each error capped at a half; times to the first token, which spread by factors,
count as |log(predicted / measured)| and weigh `FIRST` next to the others, and a model with fewer rows than `FEW` less; plus
`fit_efficiency`'s weak pull towards where each constant starts, and its search. A run published twice counts once.
"""

import datetime
import math
from pathlib import Path

import fit_efficiency as fit

from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis import validation as v

DATA = fit.DATA.with_name("inference.csv")
HERE = fit.HERE.with_name("serving.toml")
GROUPS = ("tpot_seconds", "ttft_seconds", "total_seconds")
FIRST, FEW = 0.4, 30

# Where each constant starts, and how far it may go.
START = {
    "matmul.ampere": (0.77, 0.3, 1), "matmul.hopper": (0.63, 0.3, 1), "matmul.blackwell": (0.5, 0.2, 1), "narrow": (0.9, 0.3, 1),
    "grouped": (0.3, 0.05, 1), "attention": (0.5, 0.1, 0.8), "memory": (0.85, 0.6, 1), "link": (0.6, 0.3, 0.9),
    "sum_seconds": (9e-6, 2e-6, 3e-5), "kernel_seconds": (2.2e-6, 5e-7, 1e-5), "step_seconds": (4e-4, 1e-6, 3e-3), "room": (0.85, 0.6, 1),
    "request_seconds": (0.05, 1e-3, 0.2), "prompt_turns": (1.0, 0.5, 4),
    "fastertransformer.launch": (2.0, 1, 5), "sglang.sequence_seconds": (1e-5, 1e-7, 1e-4), "sglang.prompt_wait": (0.06, 1e-3, 1), "sglang.admission_steps": (10, 0.1, 30),
    "trtllm.sequence_seconds": (1e-6, 1e-7, 1e-4), "trtllm.prompt_wait": (0.06, 1e-3, 1), "trtllm.admission_steps": (5, 0.1, 30),
    "vllm.sequence_seconds": (1e-5, 1e-7, 1e-4), "vllm.prompt_wait": (0.06, 1e-3, 1), "vllm.admission_steps": (1, 0.1, 30)}


def build(values: dict[str, float]) -> eff.Serving:
    tables: dict[str, dict] = {"fastertransformer": {"sequence_seconds": 0.0, "admission_steps": 0.0, "prompt_wait": 0.0}, "matmul": {}}
    for key, value in values.items():
        if "." in key:
            table, name = key.split(".")
            tables.setdefault(table, {})[name] = value
    matmul, engines = tables.pop("matmul"), {name: eff.Engine(**table) for name, table in tables.items()}
    return eff.Serving(matmul=matmul, engines=engines, **{key: value for key, value in values.items() if "." not in key})


def loss(values: dict[str, float], rows: list[dict], known: dict[str, tuple]) -> float:
    pricer, told = v.Pricer(serving=build(values)), {}
    for row in rows:
        found = pricer.price(row)
        off = math.log(found.predicted / found.measured) if found.group == "ttft_seconds" else found.error
        told.setdefault((found.model, found.group), []).append(min(abs(off), fit.CAP))
    weights = {key: (FIRST if key[1] == "ttft_seconds" else 1.0) * min(1, len(e) / FEW) for key, e in told.items()}
    fitted = sum(weights[key] * sum(e) / len(e) for key, e in told.items()) / sum(weights.values())
    return fitted + fit.PULL * sum((math.log(values[k] / start) / 0.3) ** 2 for k, (start, *_) in known.items()) / len(known)


def values() -> dict[str, float]:
    """The constants as they stand, under the names they are searched by."""
    made = eff.serving()
    tables = {"matmul": made.matmul, **{name: engine._asdict() for name, engine in made.engines.items()}}
    return {key: tables[key.split(".")[0]][key.split(".")[1]] if "." in key else getattr(made, key) for key in START}


def half(rows: list[dict]) -> list[dict]:
    """The rows to fit to."""
    pricer, seen, kept = v.Pricer(), set(), []
    for row in rows:
        found, key = pricer.price(row), (row["value"], row["quantity"], row["input_len"], row["output_len"])
        if found.fitted and not found.unpriced and key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def main() -> None:
    rows = v.read(DATA)
    fitted, values = half(rows), {name: start for name, (start, *_) in START.items()}
    print(f"{len(fitted)} rows")
    fit.search(values, fitted, START, loss)
    values = {name: float(f"{x:.3g}") for name, x in values.items()}
    made, pricer = build(values), v.Pricer(serving=build(values))
    held = [r for r in map(pricer.price, rows) if not r.fitted and not r.unpriced]
    lines = [f"# Written by tools/fit_serving.py on {datetime.date.today()}; what each constant means stands in efficiency.py."]
    lines += ["", "[matmul]"] + [f"{k} = {x:g}" for k, x in sorted(made.matmul.items())]
    for name, engine in sorted(made.engines.items()):
        lines += ["", f"[engines.{name}]"] + [f"{k} = {x:g}" for k, x in engine._asdict().items()]
    lines += ["", "[constants]"] + [f"{k} = {x:g}" for k, x in values.items() if "." not in k]
    lines += ["", "# half and nine tenths of the rows of models left out are within", "[error]"]
    for group in GROUPS:
        errors = sorted(abs(r.error) for r in held if r.group == group)
        lines += [f"{group.split('_')[0]}_{name} = {errors[int(share * len(errors))]:.4f}" for name, share in (("median", .5), ("p90", .9))]
    lines += ["", "[fit]", f"rows = {len(fitted)}", f"loss = {loss(values, fitted, START):.4f}"]
    fit.replace(HERE, lines)


if __name__ == "__main__":
    main()
