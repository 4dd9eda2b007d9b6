"""What fails, fails soon, says who, leaves nothing running, and loses no checkpoint."""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import time
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from gpt4lib.distributed import checkpoint, launch as launcher, train
from gpt4lib.distributed.launch import launch
from gpt4lib.distributed.trainer import Trainer
from gpt4lib.specs import ModelSpec
from gpt4lib.specs.workload import ParallelPlan

SPEC = ModelSpec("small", n_layers=2, d_model=16, n_heads=4, d_ff=24, vocab_size=37, context=16)

CONFIG = dict(model_type="llama", hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40,
              max_position_embeddings=16)


# --- launch -----------------------------------------------------------------------------------------------------------

def one_fails(how, folder):
    """Both ranks train; in the second step rank 1 fails, while rank 0 waits for its gradients."""
    folder.joinpath(str(dist.get_rank())).write_text(str(os.getpid()))
    plan = ParallelPlan(tp=2, micro_batch=2)
    trainer = Trainer(SPEC, plan, 8)
    for i in range(1000):
        if i == 1 and dist.get_rank() == 1:
            if how == "raises":
                raise KeyError("out of luck")
            if how == "hangs":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, how))
        trainer.step(torch.zeros(2, 9, dtype=torch.int64))


@pytest.mark.parametrize("how, words, timeout", [
    ("raises", "^rank 1 of 2 raised:\n(?s:.*)KeyError: 'out of luck'", 120),
    ("SIGKILL", "^rank 1 of 2 died with exit code -9", 120),
    ("SIGSTOP", "^rank 0, 1 of 2 are not done after 8 s", 8), ("hangs", "^rank 0, 1 of 2 are not done after 8 s", 8)])
def test_launch_names_the_rank_and_leaves_no_process(tmp_path, how, words, timeout):
    """A rank that hangs and the one that waits for it look alike from outside: both are named."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=words):
        launch(2, one_fails, how, tmp_path, timeout_seconds=timeout)
    assert time.monotonic() - start < timeout + 10 and multiprocessing.active_children() == []
    assert not any(pathlib.Path("/proc", p.read_text()).exists() for p in tmp_path.iterdir())


def only_one_hangs():
    time.sleep(600 * dist.get_rank())


def test_launch_names_the_one_rank_that_is_not_done():
    with pytest.raises(RuntimeError, match="^rank 1 of 2 is not done after 4 s"):
        launch(2, only_one_hangs, timeout_seconds=4)


# --- torchrun ---------------------------------------------------------------------------------------------------------

def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_killed_worker_ends_the_job(torchrun, tmp_path):
    """Long before the timeout of 300 s: its neighbour notices at once and says what happened to it, torchrun says who died."""
    log = tmp_path / "metrics"
    job = torchrun("--nproc-per-node", 2, "--monitor-interval", 3, "-m", "gpt4lib.distributed.train", "--tp", 2,
                   "--steps", 100_000, "--seq-len", 16, "--timeout", 300, "--metrics", log)
    wait_for(log.exists)
    members, start = job.members(), time.monotonic()
    os.kill(members[1], signal.SIGKILL)
    status, out = job.wait()
    assert status != 0 and time.monotonic() - start < 120 and job.members() == {}
    assert "rank 0 of 2 failed: RuntimeError: " in out and "onnection" in out
    assert "rank      : 1 (local_rank: 1)" in out and f"Signal 9 (SIGKILL) received by PID {members[1]}" in out


def test_a_worker_that_raises_ends_the_job(torchrun, tmp_path):
    """One replica reads a token the model does not have: it says so, and the others do not wait for it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "data").write_bytes(bytes(9) + b"\x64" + bytes(9))
    job = torchrun("--nproc-per-node", 2, "--monitor-interval", 3, "-m", "gpt4lib.distributed.train", tmp_path / "config.json",
                   "--seq-len", 8, "--micro-batch", 1, "--global-batch", 2, "--data", tmp_path / "data", "--timeout", 300)
    start = time.monotonic()
    status, out = job.wait()
    assert status != 0 and time.monotonic() - start < 240 and job.members() == {}
    assert re.search("rank [01]: sequences of 9 tokens from 0 to 100 are not accepted; .* vocab_size - 1 = 39", out) and "Root Cause" in out


# --- in one process ---------------------------------------------------------------------------------------------------

def test_a_diverging_run_stops(capsys, tmp_path):
    """At the step whose gradient is not a number, before it is applied, or written to the log or a checkpoint."""
    try:
        with pytest.raises(FloatingPointError, match="norm is (nan|inf) at step"):
            train.main(["--lr", "1e30", "--warmup", "0", "--seq-len", "8", "--global-batch", "4", "--device", "cpu",
                        "--metrics", str(tmp_path / "m")])
    finally:
        dist.destroy_process_group()
    assert "rank 0 of 1 failed: FloatingPointError: the gradient's norm is" in capsys.readouterr().err
    assert all(json.loads(line)["loss"] < 1e30 for line in (tmp_path / "m").read_text().splitlines())


TRAIN = "gpt4lib.distributed.train: "
BAD = {
    "--tp 2 --dp 1": "tp=2 x dp=1 x pp=1 needs 2 processes, there are 4", "--tp 3": "needs 3 processes, there are 4",
    "--pp 8 --dp 1": "needs 8 processes", "--pp 4 --chunks 2": "pp=4 x n_chunks=2 is more than n_layers=4",
    "HEADS --tp 4 --seq-len 8": "n_heads=6 is not divisible by tp=4",
    "--global-batch 30": "global_batch=30 is not divisible by micro_batch=4 x dp=4",
    "--clip 0": "--clip=0.0 is not accepted", "--warmup -1": "--warmup -1 is not accepted",
    "--metrics no/where": "--metrics no/where: its folder does not exist",
    "--ep 3": "dp=4 is not divisible by ep=3", "--dtype fp13": "dtype='fp13' is not known; accepted: fp32, bf16, fp64",
    "--schedule 2f2b": "schedule='2f2b' is not known; accepted: 1f1b, gpipe", "--recompute some": "recompute='some' is not known",
    "--hardware a1000": "device 'a1000' is not a preset", "--hardware h100-sxm --dtype fp64": "h100-sxm has no fp64 peak",
    "gpt-5": "'gpt-5' is neither a preset nor a file", "--seq-len 257": "seq_len=257 does not fit in context=256",
    "--tp 2 --sequence-parallel --seq-len 9": "seq_len=9 is not divisible by tp=2", "--zero 2": "zero_stage=2 is not built here",
    "--zero 4": "zero_stage=4", "--shard 2": "shard=2 is not accepted", "--data /nowhere": "No such file",
    "--steps 0": "--steps 0",
    "--data SHORT": "the data holds 5 tokens; give at least seq_len + 1 = 65", "--data EMPTY": "EMPTY holds no tokens",
    "--tp 0": "tp=0", "--dp 0": "--dp 0 is not accepted", "--micro-batch -1": "--micro-batch -1",
    "--tp two": "invalid int value: 'two'",
    "--device tpu": "--device tpu is not here", "--timeout 0": "--timeout 0.0 is not accepted",
    "--nonsense": "unrecognized arguments",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_and_exit_2_before_anything_starts(monkeypatch, capsys, tmp_path, args):
    """Every rank finds it, the first one says it."""
    for name, content in (("SHORT", "short"), ("EMPTY", ""), ("HEADS", json.dumps(CONFIG | {"num_attention_heads": 6}))):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "join_world", lambda *_: pytest.fail("it started"))
    for rank in (0, 3):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4)):
            monkeypatch.setenv(name, str(value))
        assert train.main(["--device", "cpu", *args.split()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == (rank == 0)
        if rank == 0:
            assert err.startswith(TRAIN) and BAD[args] in err, err


def test_bad_input_under_torchrun(torchrun):
    status, out = torchrun("--nproc-per-node", 2, "-m", "gpt4lib.distributed.train", "--tp", 4).wait()
    ours = [line for line in out.splitlines() if line.startswith("gpt4lib.distributed.train:")]
    assert status != 0 and ours == ["gpt4lib.distributed.train: tp=4 x dp=1 x pp=1 needs 4 processes, there are 2; "
                                    "change a degree or the number of processes"] and "exitcode  : 2" in out


# --- a kill while a checkpoint is saved -------------------------------------------------------------------------------

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def rename(path, target, real=pathlib.Path.rename, after=False):
    """Die before, or after, the rename that makes a checkpoint complete."""
    last = path.name.endswith(".partial")
    if last and not after:
        die()
    real(path, target)
    if last:
        die()


def half_remove(path, **_):
    for file in [p for p in pathlib.Path(path).rglob("*") if p.is_file()][:1]:
        file.unlink()
        die()


# where rank 0 dies -> how, and the step that is the last complete one after that
STAGES = {
    "before writing": (lambda: setattr(dcp, "save", die), 2),
    "in the middle": (lambda: setattr(dcp.FileSystemWriter, "finish", die), 2),
    "written": (lambda: setattr(pathlib.Path, "rename", rename), 2),
    "renamed": (lambda: setattr(pathlib.Path, "rename", partialmethod(rename, after=True)), 3),
    "pruning": (lambda: setattr(shutil, "rmtree", half_remove), 3),
}


def losses(first, stop, folder=None, stage=None, again=False):
    """Steps first..stop, the last two saved; rank 0 dies in the last save, or saving the last step again."""
    trainer = Trainer(SPEC, ParallelPlan(tp=dist.get_world_size(), micro_batch=4), 8, dtype=torch.float64)
    if first:
        checkpoint.load(checkpoint.latest(folder), trainer)
    out = []
    for i in range(first, stop):
        rows = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(i))
        out.append(trainer.step(rows)[1].loss)
        if stage and i + 1 == stop and not again and dist.get_rank() == 0:
            STAGES[stage][0]()
        if folder and i + 2 >= stop:
            checkpoint.save(folder, trainer, keep=1)
    if again:
        if dist.get_rank() == 0:
            STAGES[stage][0]()
        checkpoint.save(folder, trainer, keep=1)
    return out


@pytest.fixture(scope="module")
def uninterrupted():
    return launch(1, losses, 0, 5)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_while_saving_loses_no_step_before(tmp_path, uninterrupted, stage):
    """The newest complete checkpoint continues with the losses of the run that never died; the next save cleans up."""
    with pytest.raises(RuntimeError, match="rank 0 of 2 died with exit code -9"):
        launch(2, losses, 0, 3, tmp_path, stage)
    assert checkpoint.steps_of(checkpoint.latest(tmp_path)) == STAGES[stage][1]
    got = launch(1, losses, STAGES[stage][1], 5, tmp_path)[0]
    assert got == pytest.approx(uninterrupted[STAGES[stage][1]:], abs=1e-12)             # fp64: another order of sums
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_a_kill_while_a_checkpoint_is_replaced_leaves_it_whole(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="rank 0 of 1 died with exit code -9"):
        launch(1, losses, 0, 3, tmp_path, "pruning", True)
    assert launch(1, losses, 3, 5, tmp_path)[0] == pytest.approx(uninterrupted[3:], abs=1e-12)
