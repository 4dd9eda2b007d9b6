"""Devices and clusters: the printed figures, their sources, and errors a person understands."""

import pytest

from gpt4lib.specs import ClusterSpec, DeviceSpec, ParallelPlan, registry

A100 = DeviceSpec.preset("a100-80gb")


@pytest.mark.parametrize("name, dtype, tera, gigabytes, bandwidth, link, watts", [
    ("v100-32gb", "fp16", 125, 32, 900, 150, 300), ("a100-40gb", "bf16", 312, 40, 1555, 300, 400),
    ("a100-80gb", "bf16", 312, 80, 2039, 300, 400), ("h100-sxm", "bf16", 989, 80, 3350, 450, 700),
    ("h200", "bf16", 989, 141, 4800, 450, 700), ("h800", "fp8", 1979, 80, 3350, 200, 700),
    ("b200", "fp4", 9000, 180, 7700, 900, 1000), ("gb200", "fp8", 5000, 186, 8000, 900, 1200),
    ("tpu-v4", "bf16", 275, 34.36, 1200, 300, 192)])
def test_devices_are_as_printed(name, dtype, tera, gigabytes, bandwidth, link, watts):
    """To the digits of the datasheets, which round 989.4 to 989 or 990."""
    d = DeviceSpec.preset(name)
    assert d.peak_flop_rate(dtype) == pytest.approx(tera * 1e12, rel=1e-3)
    assert d.memory_bytes == pytest.approx(gigabytes * 1e9, rel=1e-4)
    assert (d.memory_bandwidth, d.link_bandwidth, d.power_watts) == (bandwidth * 1e9, link * 1e9, watts)


def test_every_device_is_listed():
    assert DeviceSpec.presets() == ("v100-32gb", "a100-40gb", "a100-80gb", "h100-sxm", "h100-96gb", "h200", "h800", "b200",
                                   "gb200", "tpu-v4")
    assert ClusterSpec.presets() == ("dgx-a100", "dgx-h100", "dgx-2", "a100-40gb-cloud", "jean-zay", "grand-teton", "dgx-h200",
                                     "dgx-b200", "gb200-nvl72", "gpt-4-training", "gpt-4-serving")


@pytest.mark.parametrize("name", DeviceSpec.presets())
def test_peaks_are_dense(name):
    """Elsewhere: figures for 2:4 sparsity, twice as high, mixed in. Each halving of the width doubles a
    dense tensor-core peak exactly, except where a chip has no faster units for it (TPU v4)."""
    peak = DeviceSpec.preset(name).peak
    if "bf16" in peak and "fp16" in peak:
        assert peak["bf16"] == peak["fp16"]
    for wide, narrow in (("tf32", "bf16"), ("bf16", "fp8"), ("fp8", "fp4")):
        if wide in peak and narrow in peak:
            assert peak[narrow] / peak[wide] == pytest.approx(2, rel=1e-3)         # datasheets round
    assert peak.get("bf16", 0) <= 2500e12


@pytest.mark.parametrize("kind", ["devices", "clusters"])
def test_every_number_has_a_source_and_a_status(kind):
    for name in registry.names(kind):
        for field, source in registry.provenance(kind, name).items():
            assert source.status in registry.STATUSES and len(source.source) > 20


def test_what_is_rumoured_is_called_so():
    training = registry.provenance("clusters", "gpt-4-training")
    assert (training["n_devices"].status, training["device"].status) == ("reported", "inferred")
    assert registry.provenance("clusters", "gpt-4-serving")["n_devices"].status == "reported"


def test_clusters_are_made_of_devices():
    gpt4 = ClusterSpec.preset("gpt-4-training")
    assert gpt4.device == A100 and gpt4.n_devices == 25_000
    assert ClusterSpec.preset("gpt-4-serving").n_devices == 128


def test_the_network_is_in_bytes_not_bits():
    """Elsewhere: 200 Gb/s read as 200 GB/s, eight times too fast."""
    assert ClusterSpec.preset("dgx-a100").inter_node_bandwidth * 8 == 200e9
    assert ClusterSpec.preset("dgx-h100").inter_node_bandwidth * 8 == 400e9


def test_a_preset_cannot_be_spoilt_by_its_user():
    A100.peak["bf16"] = 1.0
    try:
        assert DeviceSpec.preset("a100-80gb").peak["bf16"] == 312e12
    finally:
        A100.peak["bf16"] = 312e12


@pytest.mark.parametrize("call, words", [
    (lambda: DeviceSpec.preset("a1000"), "device 'a1000' is not a preset; accepted: v100-32gb"),
    (lambda: ClusterSpec.preset("mine"), "cluster 'mine' is not a preset; accepted: dgx-a100"),
    (lambda: A100.peak_flop_rate("fp8"), "a100-80gb has no fp8 peak; accepted: fp32"),
    (lambda: DeviceSpec("x", {"bf16": 1e12}, float("nan"), 1, 1, 1), "memory_bytes=nan"),
    (lambda: DeviceSpec("x", {"bf16": -1}, 1, 1, 1, 1), r"peak\[bf16\]=-1 is not accepted"),
    (lambda: DeviceSpec("x", {"fp17": 1e12}, 1, 1, 1, 1), "dtype 'fp17' is not known; accepted: fp32"),
    (lambda: DeviceSpec("x", {"bf16": 1e12}, "80 GB", 1, 1, 1), "memory_bytes='80 GB' is not accepted"),
    (lambda: DeviceSpec("x", {}, 1, 1, 1, 1), "peak is empty"),
    (lambda: ClusterSpec("x", A100, 0, 8, 1), "n_devices=0"),
    (lambda: ClusterSpec("x", A100, True, 8, 1), "n_devices=True"),
    (lambda: ParallelPlan(zero_stage=True), "zero_stage=True is not accepted"),
    (lambda: ParallelPlan(sequence_parallel=1), "sequence_parallel=1 is not accepted"),
    (lambda: ParallelPlan(dp=2.0), "dp=2.0 is not accepted; give an integer >= 1"),
])
def test_nonsense_is_named_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
