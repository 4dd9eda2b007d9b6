"""Fits the constants of `gpt4lib/analysis/efficiency.toml` to half of the published measurements, and writes the error on
the other half beside them.

    python tools/fit_efficiency.py            a few minutes on one core

The half is `validation.is_fitted`: a hash of model, machine and layout, so that a configuration's time and memory fall on
the same side. Loss: the mean over documents of the mean |log(predicted / measured)|, each error capped at a half and documents of one
or two rows weighing less, plus a weak pull (0.004 for a third off) towards where the value is known from elsewhere. Runs below 5 % MFU
are left out. Search: one constant after the other, up or down by a step that grows on success and halves on failure, until a round gains nothing.
"""

import datetime
import math
from pathlib import Path
from typing import Callable

from gpt4lib.analysis import efficiency as eff
from gpt4lib.analysis import validation as v

ROOT = Path(__file__).parents[1]
DATA = ROOT / "gpt4lib" / "analysis" / "measured" / "training.csv"
HERE = ROOT / "gpt4lib" / "analysis" / "efficiency.toml"

# Where each constant starts, how far it may go, and what is known of it elsewhere.
STEP = {
    "matmul.volta": (0.80, 0.4, 1), "matmul.ampere": (0.82, 0.5, 1),      # best measured products: 0.87 of the peak on an
    "matmul.hopper": (0.65, 0.4, 1), "matmul.blackwell": (0.60, 0.4, 1),  # A100, 0.80 on an H100, 0.78 on a B200 (ml-engineering)
    "attention.ampere": (0.35, 0.1, 0.8),                                 # FlashAttention-2 (arXiv:2307.08691) and -3 report
    "attention.hopper": (0.40, 0.1, 0.8), "attention.blackwell": (0.40, 0.1, 0.8),  # 0.35 to 0.75 in the best shapes
    "memory": (0.80, 0.3, 1), "link": (0.75, 0.2, 0.95),
    "kernel_seconds": (1.2e-5, 1e-8, 5e-5), "tensor_overlap": (0.5, 0.01, 1), "shard_overlap": (0.6, 0.01, 1),
    "step_seconds": (0.03, 1e-3, 0.05), "straggling": (0.01, 1e-6, 0.05)}
MEMORY = {"framework_bytes": (1e9, 2e8, 4e9), "fragmentation": (0.2, 0.01, 0.5), "working_layers": (1.0, 0.5, 3.0),
          "logit_bytes": (8.0, 2.0, 14.0)}                                       # bf16, fp32, and the gradient of each
# Not fitted: a network carries nine tenths of its line rate; a ring's hop takes 13 us between nodes (the bus bandwidth that
# the Ultra-Scale Playbook measured from 4 to 64 nodes is that of such a ring) and about 2 inside one.
# The best products measured on an H100 reach 0.709 of its fp8 peak and 0.803 of its bf16 peak (ml-engineering): 0.88 of that.
FIXED = {"fp8": 0.88, "network": 0.9, "link_hop_seconds": 2e-6, "network_hop_seconds": 1.3e-5}
PULL, CAP = 0.004, 0.5
GROUPS = {"step": "step_time", "memory": "peak_memory_bytes"}


def build(values: dict[str, float]) -> eff.Efficiency:
    tables = {name: {key.split(".")[1]: value for key, value in values.items() if key.startswith(name + ".")}
              for name in ("matmul", "attention")}
    tables["attention"]["volta"] = tables["attention"]["ampere"]          # no Volta run in the file used fused attention
    return eff.Efficiency(**tables, **FIXED, **{k: x for k, x in values.items() if "." not in k})


def loss(values: dict[str, float], rows: list[dict], known: dict[str, tuple]) -> float:
    pricer, by_source = v.Pricer(build(values)), {}
    for row in rows:
        found = pricer.price(row)
        by_source.setdefault(found.document, []).append(min(abs(math.log(found.predicted / found.measured)), CAP))
    weights = {s: min(1, len(e) / 3) for s, e in by_source.items()}
    fit = sum(weights[s] * sum(e) / len(e) for s, e in by_source.items()) / sum(weights.values())
    return fit + PULL * sum((math.log(values[k] / start) / 0.3) ** 2 for k, (start, *_) in known.items()) / len(known)


def search(values: dict[str, float], rows: list[dict], known: dict[str, tuple], loss: Callable = loss) -> float:
    best, steps = loss(values, rows, known), dict.fromkeys(known, 0.25)
    while max(steps.values()) > 0.01:
        for name, (_, low, high) in known.items():
            before = best
            for sign in (1, -1):
                while True:
                    tried = {**values, name: min(max(values[name] * math.exp(sign * steps[name]), low), high)}
                    new = loss(tried, rows, known)
                    if new >= best - 1e-6:
                        break
                    best = new
                    values.update(tried)
                if best < before:
                    break
            steps[name] *= 1.3 if best < before else 0.5
        print(f"  loss {best:.4f}", flush=True)
    return best


def halves(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The step times and the peaks of memory to fit to."""
    pricer = v.Pricer()
    priced = [(row, pricer.price(row)) for row in rows]
    half = [(row, r) for row, r in priced if r.fitted and not r.unpriced and not v.apart(r)]
    return tuple([row for row, r in half if r.group == group] for group in GROUPS.values())


def main() -> None:
    rows = v.read(DATA)
    time, memory = halves(rows)
    values = {name: s[0] for name, s in {**STEP, **MEMORY}.items()}
    print(f"{len(time)} step times")
    search(values, time, STEP)
    print(f"{len(memory)} peaks of memory")
    search(values, memory, MEMORY)
    values = {name: float(f"{x:.3g}") for name, x in values.items()}
    pricer = v.Pricer(build(values))
    held = [r for r in map(pricer.price, rows) if not r.fitted and not r.unpriced]
    told = {name: v.quantiles(r for r in held if r.group == group) for name, group in GROUPS.items()}
    made = build(values)
    lines = [f"# Written by tools/fit_efficiency.py on {datetime.date.today()}; what each constant means stands in efficiency.py."]
    for table in ("matmul", "attention"):
        lines += ["", f"[{table}]"] + [f"{k} = {x:g}" for k, x in sorted(getattr(made, table).items())]
    lines += ["", "[constants]"] + [f"{k} = {x:g}" for k, x in {**values, **FIXED}.items() if "." not in k]
    lines += ["", "# half and nine tenths of the rows left out, every document weighing the same, are within", "[error]"]
    lines += [f"{name}_{which} = {x:.4f}" for name, pair in told.items() for which, x in zip(("median", "p90"), pair)]
    lines += ["", "[fit]", f"step_rows = {len(time)}", f"memory_rows = {len(memory)}",
              f"step_loss = {loss(values, time, STEP):.4f}", f"memory_loss = {loss(values, memory, MEMORY):.4f}"]
    replace(HERE, lines)


def replace(path: Path, lines: list[str]) -> None:
    """Write the constants in one step, so that a crash leaves the old ones, and show them."""
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n", "utf8")
    new.replace(path)
    print(path.read_text("utf8"))


if __name__ == "__main__":
    main()
