"""Two nodes, here two agents on one machine: they train as one process, stop together, and go on together."""

import json
import socket
import time

import pytest
import torch.distributed as dist

from gpt4lib.distributed import launch as launcher, train

STEPS = 60
CONFIG = dict(model_type="llama", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=64,
              max_position_embeddings=16)


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def nodes(torchrun, *args):
    """Two agents of two processes each; the first one is where they meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for _ in range(2):
        found.append(torchrun("--nnodes", 2, "--nproc-per-node", 2, "--max-restarts", 0, "--rdzv-backend", "c10d",
                              "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", port, "--local-addr", "localhost",
                              "-m", "gpt4lib.distributed.train", "--tp", 2, "--dp", 2, "--timeout", 240, *args))
        until(lambda: listens(port))
    return found


def losses(log):
    """(step, loss) of each line, the last of which may be half written."""
    return [(line["step"], line["loss"]) for line in map(json.loads, log.read_text().rpartition("\n")[0].splitlines())]


def test_two_nodes_train_stop_and_resume(torchrun, tmp_path):
    """fp64: every loss of the interrupted run is that of one process that was never interrupted, to 1e-9."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "data").write_bytes(bytes(i * i % 61 for i in range(2000)))
    common = [tmp_path / "config.json", "--data", tmp_path / "data", "--steps", STEPS, "--seq-len", 8, "--micro-batch", 1,
              "--global-batch", 4, "--dtype", "fp64", "--save-every", 5, "--device", "cpu"]
    assert train.main([*map(str, common), "--metrics", str(tmp_path / "one")]) == 0
    log, folder = tmp_path / "two", tmp_path / "checkpoints"
    common += ["--metrics", log, "--checkpoint", folder]

    first, second = nodes(torchrun, *common)
    until(lambda: log.exists() and len(losses(log)) > 7)
    workers = {rank for job in (first, second) for rank in job.members()}
    second.kill()
    start = time.monotonic()
    status, out = first.wait()
    assert status != 0 and time.monotonic() - start < 120 and first.members() == {} and workers == {-1, 0, 1, 2, 3}
    assert " of 4 failed: " in out, out
    stopped = len(losses(log))
    assert 7 < stopped < STEPS

    jobs = nodes(torchrun, *common)
    assert [job.wait()[0] for job in jobs] == [0, 0], jobs[0].wait()[1] + jobs[1].wait()[1]
    got, expected = losses(log), dict(losses(tmp_path / "one"))
    assert got[stopped][0] % 5 == 1 and 5 < got[stopped][0] <= stopped + 1 and got[-1][0] == STEPS
    assert [loss for _, loss in got] == pytest.approx([expected[step] for step, _ in got], abs=1e-9)


def test_tensor_parallelism_stays_inside_a_node(monkeypatch, capsys):
    """tp 4 on two nodes of 2 is refused by every rank in the same way, before anything starts."""
    for rank in range(4):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank % 2), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(launcher, "join_world", lambda *_: pytest.fail("it started"))
        assert train.main(["--tp", "4", "--device", "cpu"]) == 2 and not dist.is_initialized()
    assert capsys.readouterr().err == ("gpt4lib.distributed.train: tp=4 does not divide the 2 devices of a node; "
                                       "tensor parallelism has to stay inside one\n")
