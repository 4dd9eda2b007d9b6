"""Fits the step constants once more for each publisher of measurements, without any of its rows, and predicts all of them:
the error to expect of software the constants have not seen.

    python benchmarks/left_out.py          writes results/left_out.json; some minutes on two cores
"""

import multiprocessing
import sys
from pathlib import Path

import runner

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import fit_efficiency as fit                                             # noqa: E402

from gpt4lib.analysis import validation as v                             # noqa: E402


def publisher(row: dict) -> str:
    """The repository, or the first author of a paper."""
    return row["source"].split()[0].removeprefix("github.com/")


def without(name: str) -> dict:
    """The summary of one publisher's step times under constants that know nothing of it."""
    rows = v.read(fit.DATA)
    values = {constant: start for constant, (start, *_) in {**fit.STEP, **fit.MEMORY}.items()}
    time, _ = fit.halves([row for row in rows if publisher(row) != name])
    fit.search(values, time, fit.STEP)
    pricer = v.Pricer(fit.build(values))
    told = [r for r in (pricer.price(row) for row in rows if publisher(row) == name)
            if r.group == "step_time" and not r.unpriced and not v.apart(r)]
    return {**v.summary(told), "straggling": values["straggling"]}


def main() -> int:
    found = sorted(set(map(publisher, v.read(fit.DATA))))
    with multiprocessing.Pool(2) as pool:
        told = dict(zip(found, pool.map(without, found, chunksize=1)))
    for name, s in told.items():
        print(f"{name:40} {s['n']:4} rows, median {s['median_abs_error']:.1%}, p90 {s['p90_abs_error']:.1%}, "
              f"straggling {s['straggling']:.4f}")
    print(f"wrote {runner.write('left_out', {'publishers': told})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
