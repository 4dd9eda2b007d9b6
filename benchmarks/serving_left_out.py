"""Fits the constants of serving once more without one generation of GPUs, and predicts its rows: the error to expect on a GPU that the
constants have not seen. Its products run at the lowest fraction of those that were.

    python benchmarks/serving_left_out.py          writes results/serving_left_out.json; some minutes on one core
"""

import sys
from pathlib import Path

import runner

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fit_efficiency as fit                                             # noqa: E402
import fit_serving                                                       # noqa: E402

from gpt4lib.analysis import validation as v                             # noqa: E402
from gpt4lib.specs import ClusterSpec                                    # noqa: E402


def generation(row: dict) -> str:
    return ClusterSpec.around(row["device"]).device.generation


def without(name: str, rows: list[dict]) -> dict:
    """Summaries, by quantity, of one generation's rows of models left out, and of all its rows."""
    known = {key: start for key, start in fit_serving.START.items() if key != f"matmul.{name}"}
    values = {key: start for key, (start, *_) in known.items()}
    fit.search(values, fit_serving.half([row for row in rows if generation(row) != name]), known, fit_serving.loss)
    pricer = v.Pricer(serving=fit_serving.build(values))
    found = [r for r in map(pricer.price, (row for row in rows if generation(row) == name)) if not r.unpriced]
    return {"every_row": v.by(found, lambda r: r.group), "models_left_out": v.by((r for r in found if not r.fitted), lambda r: r.group)}


def main() -> int:
    rows = v.read(fit_serving.DATA)
    told = {name: without(name, rows) for name in ("blackwell", "hopper")}
    for name, parts in told.items():
        for part, groups in parts.items():
            for group, s in groups.items():
                print(f"{name:10} {part:16} {group:14} {s['n']:5} rows, median {s['median_abs_error']:.1%}, p90 {s['p90_abs_error']:.1%}")
    print(f"wrote {runner.write('serving_left_out', {'generations': told})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
