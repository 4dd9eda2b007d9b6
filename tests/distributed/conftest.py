"""Starts torchrun as a user does, in a process group of its own that never outlives the test."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Job:
    """A running torchrun agent and its workers."""

    def __init__(self, folder, *args):
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        command = [sys.executable, "-m", "torch.distributed.run", *args]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=env, start_new_session=True)

    def members(self):
        """Every live process of the agent's session, workers too: rank -> pid, and -1 -> pid of the agent."""
        found = {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    env = dict(e.partition("=")[::2] for e in entry.joinpath("environ").read_text().split("\0"))
                    found[int(env.get("RANK", -1))] = int(entry.name)
            except (OSError, ValueError):
                pass                                                    # it has just ended
        return found

    def wait(self, timeout=120):
        """(exit status, everything it wrote)"""
        return self.process.wait(timeout), self.log.read_text()

    def kill(self):
        for pid in self.members().values():                             # workers are groups of their own
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(*arguments) -> Job."""
    jobs = []
    yield lambda *args: jobs.append(Job(tmp_path, *map(str, args))) or jobs[-1]
    for job in jobs:
        job.kill()
