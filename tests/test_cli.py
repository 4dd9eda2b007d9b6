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
    (["memory", "gpt-4", "--dtype", "fp13"], "dtype 'fp13' is not known; accepted: fp32"),
    (["memory", "gpt-4", "--kv", "--batch", "0"], "--batch 0 is not accepted"),
    (["memory", "gpt-4", "--context", "-1"], "--context -1 is not accepted"),
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
