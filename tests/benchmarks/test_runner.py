"""The benchmark runner's arithmetic, on a clock that only moves when told to."""

import importlib.util
import json
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "runner.py"
SPEC = importlib.util.spec_from_file_location("runner", PATH)
runner = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(runner)


def test_calls_alternate_and_the_warm_up_is_not_counted():
    now, order = [0.0], []

    def call(name, takes):
        def run():
            order.append(name)
            now[0] += next(takes)
        return run
    a, b = iter([9, 1, 2, 3, 4, 5]), iter([9, 2, 4, 6, 8, 20])
    seconds = runner.interleaved({"us": call("us", a), "peer": call("peer", b)}, clock=lambda: now[0])
    assert order == ["us", "peer"] * 6
    assert seconds == {"us": [1, 2, 3, 4, 5], "peer": [2, 4, 6, 8, 20]}
    got = runner.summary(seconds, "us", "peer", limit={"us": 1.5})
    assert got["times_faster"] == {"median": 2, "min": 2, "max": 4}
    assert got["seconds"]["us"] == {"median": 3, "min": 1, "max": 5, "percent_of_limit": 50}


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="runs=3"):
        runner.interleaved({}, runs=3)


def test_results_are_replaced_whole_and_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    runner.write("x", {"a": 1})
    path = runner.write("x", {"a": 2})
    data = json.loads(path.read_text())
    assert data["a"] == 2 and {"cpu", "cores", "python", "packages", "date"} <= set(data["machine"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_recorded_results_name_their_machine():
    for path in (PATH.parent / "results").glob("*.json"):
        assert json.loads(path.read_text())["machine"]["cpu"]
