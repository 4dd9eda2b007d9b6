"""Starts torchrun as a user does, in a process group of its own that never outlives the test."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]


class Job:
    """A torchrun agent and its workers, which it puts in sessions of their own; a mark in their environment finds them."""

    def __init__(self, folder, *args):
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        self.mark = f"GPT4LIB_TEST_JOB={self.log}"
        env = {**os.environ, **dict([self.mark.split("=")]), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
               "GLOO_SOCKET_IFNAME": "lo"}
        with open(self.log, "w") as out:
            self.process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *args], stdout=out, stderr=out,
                                            cwd=folder, env=env)

    def members(self):
        """Every live process of the job: rank -> pid, the agent's is -1."""
        found = {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                env = entry.joinpath("environ").read_text().split("\0")
            except OSError:                                             # it has just ended
                continue
            if self.mark in env:
                found[int(dict(e.partition("=")[::2] for e in env).get("RANK", -1))] = int(entry.name)
        return found

    def wait(self, timeout=300):
        """(exit status, everything it wrote)"""
        return self.process.wait(timeout), self.log.read_text()

    def kill(self):
        for pid in self.members().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(*arguments) -> Job."""
    jobs = []
    yield lambda *args: jobs.append(Job(tmp_path, *map(str, args))) or jobs[-1]
    for job in jobs:
        job.kill()


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """A run in this process too has one thread: several, on busy cores, wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
