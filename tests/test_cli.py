"""The command line as a user meets it: a subprocess, its exit status, its two streams."""

import json
import os
import signal
import subprocess
import sys

import pytest

from gpt4lib.cli import main


def run(*args, env=None, **kwargs):
    return subprocess.run([sys.executable, "-m", "gpt4lib", *args], capture_output=True, text=True, encoding="utf-8",
                          timeout=60, env={**os.environ, **(env or {})}, **kwargs)


def test_params_json_has_the_stable_keys():
    data = json.loads(run("params", "gpt-4", "--json").stdout)
    assert set(data) == {"model", "total", "active", "by_part"}
    assert data["total"] == sum(data["by_part"].values()) == 1_832_625_489_408 and data["active"] < data["total"]


@pytest.mark.parametrize("flags, parts", [
    (("--tp", "8", "--pp", "15", "--dp", "208", "--zero", "1"), {"weights", "gradients", "optimizer", "activations"}),
    (("--kv", "--tp", "8", "--pp", "16", "--batch", "64"), {"weights", "kv_cache"})])
def test_memory_json_has_the_stable_keys(flags, parts):
    data = json.loads(run("memory", "gpt-4", *flags, "--json").stdout)
    assert set(data) == {"bytes_per_device", "fits"} and parts | {"total"} <= set(data["bytes_per_device"])
    use = data["bytes_per_device"]
    assert use.pop("total") == pytest.approx(sum(use.values()))


LLAMA = ("llama-3.1-8b", "--device", "h100-sxm", "--gpus", "64", "--context", "8192")


@pytest.mark.parametrize("flags", [(), ("--tp", "2", "--zero", "1", "--recompute", "full", "--mtbf", "50000")])
def test_train_json_has_the_stable_keys(flags):
    data = json.loads(run("train", *LLAMA, "--tokens", "1e12", "--price", "2", *flags, "--json").stdout)
    assert {"flop", "mfu", "hfu", "step_seconds", "days", "gpu_hours", "dollars", "plan", "memory"} <= set(data)
    assert data["gpu_hours"] == pytest.approx(data["days"] * 24 * 64) and data["dollars"] == pytest.approx(2 * data["gpu_hours"])
    assert data["mfu"] * data["goodput"] == pytest.approx(data["flop"] / (data["days"] * 86400 * 64 * 989.4e12))
    assert data["memory"]["fits"] and 0.2 < data["mfu"] <= data["hfu"] < 0.8 and (data["goodput"] < 1) == ("--mtbf" in flags)
    assert data["plan"]["tp"] == 2 or not flags


@pytest.mark.parametrize("flag", [("--zero", "0"), ("--chunks", "2", "--pp", "2"), ("--sequence-parallel",)])
def test_any_layout_flag_gives_the_layout(flag):
    """Also one that says what would be the default: then nothing is searched."""
    plan = json.loads(run("train", *LLAMA, "--tokens", "1e9", *flag, "--json").stdout)["plan"]
    assert plan["zero_stage"] == 0 and plan["tp"] == 1 and plan["dp"] * plan["pp"] == 64


def test_serving_memory_needs_no_training_units():
    data = json.loads(run("memory", "llama-3.1-8b", "--kv", "--dtype", "int4", "--device", "tpu-v4", "--json").stdout)
    assert data["fits"] and data["bytes_per_device"]["weights"] < 5e9


def test_plan_json_ranks_and_says_why():
    data = json.loads(run("plan", *LLAMA, "--batch", "512", "--top", "3", "--json").stdout)
    rates = [e["tokens_per_second"] for e in data["best"]]
    assert len(rates) == 3 and rates == sorted(rates, reverse=True) and data["fitting"] < data["layouts"]
    assert all(e["why"].startswith("needs ") or "slower" in e["why"] or "fastest" in e["why"] for e in data["losers"])
    assert "the fastest that fits" in run("plan", *LLAMA, "--batch", "512").stdout


def rows(path, *changes):
    """A small file of measured rows: some shipped ones, and changes to the first as (column, value)."""
    import csv
    from importlib import resources
    lines = resources.files("gpt4lib.analysis").joinpath("measured", "training.csv").read_text("utf8").splitlines()[:25]
    table = list(csv.DictReader(lines))
    table[0] |= dict(changes)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def test_validate_json_has_the_stable_keys(tmp_path):
    out = run("validate", rows(tmp_path / "rows.csv"), "--json")
    data = json.loads(out.stdout)
    assert out.returncode == 0 and {"overall", "by_source", "by_quantity", "rows"} <= set(data)
    assert {"n", "priced", "median_abs_error", "mean_abs_error", "p90_abs_error", "bias"} == set(data["overall"])
    for row in data["rows"]:
        assert {"id", "quantity", "measured", "predicted", "error", "bound_by"} <= set(row)
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert "average of sources" in run("validate", str(tmp_path / "rows.csv")).stdout


def test_validate_prices_the_others_and_names_the_bad_value(tmp_path):
    path = rows(tmp_path / "rows.csv", ("tp", "many"))
    out = run("validate", path, "--json")
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and f"{path} line 2, column tp: 'many'" in out.stderr
    data = json.loads(out.stdout)
    assert data["overall"]["priced"] == data["overall"]["n"] - 1 and "column tp" in data["rows"][0]["unpriced"]


def test_claims_json_has_the_stable_keys():
    data = json.loads(run("claims", "--json").stdout)
    keys = ["id", "section", "zh", "en", "stated", "unit", "recomputed", "relative_error", "verdict", "diagnosis",
            "status", "chapter"]
    assert len(data) == 123 and all(list(c) == keys for c in data)
    assert json.loads(run("claims", "K4", "--json").stdout) == [c for c in data if c["id"] == "K4"]


def test_a_config_file_is_a_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008,
        vocab_size=32000, max_position_embeddings=4096)))
    assert json.loads(run("params", str(tmp_path / "config.json"), "--json").stdout)["total"] == 6_738_415_616


def test_tables_say_where_numbers_come_from():
    out = run("params", "gpt-4").stdout
    assert "reported: n_layers" in out and "inferred: d_model" in out


@pytest.mark.parametrize("args, words", [
    (["params", "gpt-5"], "'gpt-5' is neither a preset nor a file; presets: gpt-4"),
    (["params", "/nowhere/config.json"], "neither a preset nor a file"),
    (["memory", "gpt-4", "--device", "a1000"], "device 'a1000' is not a preset; accepted: v100-32gb"),
    (["memory", "gpt-4", "--tp", "5"], "n_heads=168 is not divisible by tp=5"),
    (["memory", "gpt-4", "--tp", "two"], "invalid int value: 'two'"),
    (["memory", "gpt-4", "--dtype", "fp13"], "dtype 'fp13' is not accepted for training; give bf16"),
    (["memory", "gpt-4", "--kv", "--batch", "0"], "--batch 0 is not accepted"),
    (["memory", "gpt-4", "--context", "-1"], "--context -1 is not accepted"),
    (["train", "gpt-4", "--tokens", "1e9"], "the following arguments are required: --gpus"),
    (["train", "gpt-4", "--gpus", "8", "--tokens", "0"], "--tokens 0"),
    (["train", "gpt-4", "--gpus", "64", "--tokens", "1e9"], "no layout fits: the least, tp"),
    (["train", "gpt-4", "--gpus", "4", "--tokens", "1e9", "--tp", "8"], "needs 8 devices, --gpus is 4"),
    (["memory", "gpt-4", "--tp", "0"], "tp=0 is not accepted"), (["memory", "gpt-4", "--micro-batch", "0"], "micro_batch=0"),
    (["train", *LLAMA, "--tokens", "1e9", "--mtbf", "0"], "--mtbf 0.0 is not accepted"),
    (["train", *LLAMA, "--tokens", "1e9", "--mtbf", "0.001"], "leaves no time to restart"),
    (["train", *LLAMA, "--tokens", "1e9", "--price", "-3"], "--price -3.0"), (["train", *LLAMA, "--tokens", "inf"], "--tokens inf"),
    (["plan", "gpt-4", "--gpus", "0", "--batch", "8"], "--gpus 0 is not accepted"),
    (["plan", "llama-3.1-8b", "--device", "tpu-v4", "--gpus", "8", "--batch", "8"], "no cluster of tpu-v4 is known"),
    (["validate", "/nowhere.csv"], "/nowhere.csv cannot be read"),
    (["claims", "Z99"], "no claim 'Z99'"), (["nonsense"], "invalid choice: 'nonsense'"), ([], "required: COMMAND")])
def test_bad_input_is_one_line_and_exit_2(args, words):
    result = run(*args)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("gpt4lib: ") and result.stderr.count("\n") == 1 and words in result.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "nothing"}'])
def test_a_bad_config_file_is_one_line_and_exit_2(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    result = run("params", str(tmp_path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m gpt4lib claims --json | head -n 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[\n", "")


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr("gpt4lib.cli.ModelSpec.load", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["params", "gpt-4"]) == 130 and capsys.readouterr().err == ""


def test_chinese_survives_an_ascii_terminal_and_no_colour_reaches_a_file():
    out = run("claims", "K4", env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "xterm-256color"}).stdout
    assert "280 亿" in out and "\x1b" not in out


def test_help_and_version():
    assert run("--help").returncode == 0 and "claims" in run("--help").stdout
    assert run("--version").stdout.startswith("gpt4lib 0.")


SERVE = ("serve", "llama-3.1-70b", "--device", "h100-sxm", "--gpus", "8", "--batch", "64", "--input", "1024", "--output", "512")


def test_serve_json_has_the_stable_keys():
    data = json.loads(run(*SERVE, "--dtype", "fp8", "--kv-dtype", "fp8", "--price", "2", "--utilisation", "0.5", "--json").stdout)
    assert {"ttft_seconds", "tpot_seconds", "tokens_per_second", "tokens_per_second_per_device", "dollars_per_1k_input_tokens",
            "dollars_per_1k_output_tokens", "bound_by", "memory"} <= set(data)
    assert data["tokens_per_second"] == pytest.approx(8 * data["tokens_per_second_per_device"])
    request = data["ttft_seconds"] + 511 * data["tpot_seconds"]
    assert data["tokens_per_second"] == pytest.approx(64 * 512 / request) and data["bound_by"] in data["by_term"]
    assert data["memory"]["fits"] and data["plan"]["tp"] == 8 and data["largest_batch"] > 64
    cheap = json.loads(run(*SERVE, "--dtype", "fp8", "--kv-dtype", "fp8", "--json").stdout)
    for key in ("dollars_per_1k_input_tokens", "dollars_per_1k_output_tokens"):
        assert data[key] == pytest.approx(4 * cheap[key])


@pytest.mark.parametrize("flags, plan", [((), (8, 1, 1)), (("--tp", "2"), (2, 4, 1)), (("--tp", "1", "--ep", "8"), (1, 8, 8)),
                                         (("--tp", "8", "--ep", "8"), (8, 1, 1)), (("--tp", "2", "--ep", "8"), (2, 4, 4))])
def test_experts_lie_on_the_devices_there_are(flags, plan):
    command = ["serve", "mixtral-8x7b", "--gpus", "8", "--batch", "32", "--input", "500", "--output", "100", *flags]
    found = json.loads(run(*command, "--json").stdout)["plan"]
    assert (found["tp"], found["dp"], found["ep"]) == plan
    text = run(*command).stdout
    assert "first token after" in text and "half are within" in text and "one decode step" in text


@pytest.mark.parametrize("flags, words", [
    (("--gpus", "7"), "n_heads=64 is not divisible by tp=7"), (("--tp", "3"), "--tp 3 --pp 1 --ep 1 do not fit --gpus 8"),
    (("--ep", "8"), "do not fit --gpus 8"), (("--gpus", "1"), "no request of 1536 tokens fits: weights 141 GB of 80.0 GB"),
    (("--batch", "0"), "--batch 0 is not accepted"), (("--utilisation", "2"), "utilisation=2.0 is not accepted"),
    (("--dtype", "int3"), "dtype 'int3' is not known"), (("--device", "abacus"), "device 'abacus' is not a preset"),
    (("--price", "-1"), "--price -1.0 is not accepted"), (("--kv-dtype", "x"), "dtype 'x' is not known"), (("--tp", "0"), "--tp 0")])
def test_bad_serving_is_one_line_and_exit_2(flags, words):
    result = run(*SERVE, *flags)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1 and words in result.stderr
