"""The kernels are compiled for an H100/H200 without one: no spills, and tensor cores where they belong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheels here")
TOOL = pathlib.Path(__file__).parents[2] / "tools" / "kernel_resources.py"


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, str(TOOL)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row.pop("kernel"): row for row in map(json.loads, done.stdout.splitlines())}


def test_nothing_spills(resources):
    assert len(resources) == 34 and {name: r for name, r in resources.items() if r["spilled_bytes"]} == {}


def test_large_tiles_use_the_warp_group_products_of_hopper(resources):
    assert all(r["wgmma"] for name, r in resources.items() if "8192" in name and "fp32" not in name)


def test_half_precision_always_runs_on_tensor_cores(resources):
    assert all(r["wgmma"] or r["mma"] for name, r in resources.items() if "fp32" not in name and "merge" not in name)


def test_fp32_is_never_rounded_to_tf32(resources):
    assert not any(r["wgmma"] or r["mma"] for name, r in resources.items() if "fp32" in name)


def test_loads_are_asynchronous(resources):
    assert all(r["async_copy"] for name, r in resources.items() if "merge" not in name)


def test_everything_fits_the_shared_memory_of_a_multiprocessor(resources):
    assert max(r["shared_bytes"] for r in resources.values()) <= 227 * 1024
