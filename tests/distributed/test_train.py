"""The entry point as a user starts it: any layout trains the same, logs the same, and goes on where it stopped."""

import json
import math
import shutil

import numpy as np
import pytest
import torch.distributed as dist

from gpt4lib.distributed import checkpoint, train
from gpt4lib.distributed.launch import Place, launch

SIZES = ["--steps", "4", "--seq-len", "16", "--global-batch", "8", "--micro-batch", "2", "--warmup", "2", "--device", "cpu"]
KEYS = ["step", "loss", "balance", "gradient_norm", "lr", "seconds", "tokens_per_second", "flop_per_second", "mfu"]


def text(folder):
    """Bytes that repeat, a little: something to learn."""
    (folder / "text").write_bytes(b"".join(b"%d bottles of beer on the wall\n" % n for n in range(99)))
    return folder / "text"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def here(folder, *args):
    """The log of a run in this process."""
    folder.mkdir(exist_ok=True)
    assert train.main([*SIZES, "--metrics", str(folder / "metrics"), *map(str, args)]) == 0 and not dist.is_initialized()
    return lines(folder / "metrics")


def in_a_world(args):
    """What `main` does after it has joined the world."""
    args = train.parser().parse_args(args)
    n = dist.get_world_size()
    train.run(args, *train.settle(args, Place(dist.get_rank(), n, dist.get_rank(), n)), train.tokens_of(args))


def losses(log):
    return [[line[key] for key in ("loss", "balance", "gradient_norm")] for line in log]


def same(got, expected):
    """fp32, where layouts sum in another order: 1e-7 a sum, and some hundred sums deep."""
    assert losses(got) == [pytest.approx(line, abs=1e-4) for line in losses(expected)]


def test_eight_processes_train_as_one_and_any_number_goes_on(torchrun, tmp_path):
    """tp 2 x pp 2 x dp 2 under torchrun; stopped after two steps and continued by two processes, the log goes on too."""
    data, folder, log = text(tmp_path), tmp_path / "checkpoints", tmp_path / "metrics"
    common = ["--data", data, "--checkpoint", folder, "--save-every", 2, "--metrics", log]
    status, out = torchrun("--nproc-per-node", 8, "-m", "gpt4lib.distributed.train", "--tp", 2, "--pp", 2, "--dp", 2, *SIZES,
                           "--micro-batch", 1, *common).wait()
    assert status == 0, out
    ours, whole = [line for line in out.splitlines() if "torch/distributed/run.py" not in line], lines(log)
    assert [line.split("]")[1].split("  ")[0] for line in ours] == [f" step {n}/4" for n in (1, 2, 3, 4)]       # rank 0 only
    same(whole, here(tmp_path / "one", "--data", data))
    assert [line["step"] for line in whole] == [1, 2, 3, 4] and [list(line) for line in whole[1:]] == [KEYS] * 3
    assert list(whole[0]) == KEYS + ["sent_bytes_by_rank"] and len(whole[0]["sent_bytes_by_rank"]) == 8
    assert all(math.isfinite(line[key]) for line in whole for key in KEYS[:-1]) and {line["mfu"] for line in whole} == {None}

    shutil.rmtree(folder / "step-00000004")
    launch(2, in_a_world, [*SIZES, "--tp", "2", *map(str, common)])
    assert [line["step"] for line in lines(log)] == [1, 2, 3, 4, 3, 4] and checkpoint.latest(folder).name == "step-00000004"
    same(lines(log)[4:], whole[2:])
    assert [line["lr"] for line in lines(log)[4:]] == [line["lr"] for line in whole[2:]]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    done = here(tmp_path, "--data", text(tmp_path), "--checkpoint", tmp_path / "c")
    assert here(tmp_path, "--data", tmp_path / "text", "--checkpoint", tmp_path / "c") == done


@pytest.mark.parametrize("layout", ["--zero 1 --micro-batch 1", "--zero 3 --recompute full --micro-batch 1",
                                    "--ep 2 --micro-batch 1", "--pp 2 --schedule gpipe",
                                    "--tp 2 --sequence-parallel"])
def test_data_is_the_same_for_every_layout(tmp_path, layout, reference):
    """Every replica reads its own rows of the batch that one process reads; experts are balanced over micro-batch x dp rows."""
    data, expected = reference
    launch(2, in_a_world, [*SIZES, "--data", str(data), "--metrics", str(tmp_path / "m"), *layout.split()])
    same(lines(tmp_path / "m"), expected)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return text(folder), here(folder, "--data", folder / "text")


def test_tokens_come_as_bytes_or_as_uint16(tmp_path, reference):
    """The same numbers, the same run; another seed draws others, and without a file there is Python's own text."""
    data, expected = reference
    np.frombuffer(data.read_bytes(), np.uint8).astype(np.uint16).tofile(tmp_path / "text.bin")
    assert losses(here(tmp_path / "a", "--data", tmp_path / "text.bin")) == losses(expected)
    assert losses(here(tmp_path / "b", "--data", data, "--seed", 1)) != losses(expected) != losses(here(tmp_path / "c"))


def test_every_text_of_a_step_can_be_drawn(tmp_path):
    """One token more than a sequence is enough: it is both input and what follows."""
    (tmp_path / "data").write_bytes(bytes(range(17)))
    assert len(here(tmp_path, "--data", tmp_path / "data")) == 4


def test_bf16_and_the_share_of_the_peak(tmp_path, capsys, reference):
    """bfloat16 keeps 8 bits: the first loss is that of fp32 to a percent."""
    data, expected = reference
    log = here(tmp_path, "--data", data, "--dtype", "bf16", "--hardware", "h100-sxm")
    assert log[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.01) and log[0]["loss"] != expected[0]["loss"]
    assert all(line["mfu"] == line["flop_per_second"] / 989.4e12 and 0 < line["mfu"] < 1 for line in log)
    assert capsys.readouterr().err.count("mfu") == 4


def test_it_learns(tmp_path, reference):
    log = here(tmp_path, "--data", reference[0], "--steps", 30, "--lr", 0.01)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"] and log[0]["loss"] == pytest.approx(math.log(256), rel=0.05)


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    args = train.parser().parse_args(["--steps", "110", "--warmup", "10", "--lr", "1"])
    rates = [train.learning_rate(step, args) for step in range(111)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)]) and rates[10] == pytest.approx(1)
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1) == train.learning_rate(500, args)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert train.learning_rate(0, train.parser().parse_args(["--warmup", "0", "--lr", "1"])) == 1
