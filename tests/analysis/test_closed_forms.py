"""The first closed forms of the other rooms, each against a hand count or a published figure."""

import pytest

from gpt4lib.analysis import collectives, cost, inference, pipeline, roofline, scaling_laws, speculation, training
from gpt4lib.specs import ClusterSpec, DeviceSpec, ModelSpec

A100, H100 = DeviceSpec.preset("a100-80gb"), DeviceSpec.preset("h100-sxm")


def test_ridge_points():
    assert [round(roofline.ridge(d, t)) for d, t in (
        (A100, "bf16"), (DeviceSpec.preset("a100-40gb"), "bf16"), (H100, "bf16"), (H100, "fp8"))] == [153, 201, 295, 591]


def test_the_roofline_says_what_binds():
    assert roofline.time(A100, "bf16", flop=1, bytes_moved=1).bound_by == "memory"
    assert roofline.time(A100, "bf16", flop=312e12, bytes_moved=1) == roofline.Time(1.0, "compute")


def test_distinct_experts():
    """At batch 1 exactly top-k, at a large batch all; 10.5 of 16 at batch 8."""
    assert roofline.distinct_experts(16, 2, 1) == 2
    assert roofline.distinct_experts(16, 2, 8) == pytest.approx(10.5, abs=0.05)
    assert roofline.distinct_experts(16, 2, 10_000) == 16


def test_mixtral_at_batch_64_reads_all_its_experts():
    """Elsewhere: only top-k at any batch (8.65 ms where the bytes alone take 22.9 on two A100s), or all at batch 1."""
    spec, a100 = ModelSpec.preset("mixtral-8x7b"), DeviceSpec.preset("a100-80gb")
    assert inference.decode_step(spec, a100, 2, batch=64, context=1).seconds >= 22.8e-3
    one = inference.decode_bytes(spec, 1, 1)
    assert one == pytest.approx(2 * (12_879_925_248 - 131_072_000), rel=1e-3)      # active, less the embedding look-up


def test_arithmetic_binds_a_large_decode_batch():
    """Elsewhere: memory-bound at any batch."""
    spec = ModelSpec.preset("llama-2-7b").with_(n_kv_heads=1)
    assert inference.decode_step(spec, A100, 1, batch=1, context=1).bound_by == "memory"
    assert inference.decode_step(spec, A100, 1, batch=4096, context=1).bound_by == "compute"


def test_ring_collectives_by_hand():
    assert collectives.all_gather(80, 8) == collectives.reduce_scatter(80, 8) == 70
    assert collectives.all_reduce(80, 8) == 140 and collectives.all_to_all(80, 8) == 70
    assert collectives.all_reduce(80, 1) == 0


def test_a_bubble_by_counting_slots():
    """p=15, m=35: a stage works 35 of 49 slots. A single micro-batch leaves p-1 of p idle."""
    assert pipeline.bubble_fraction(15, 35) == 14 / 49
    assert pipeline.bubble_fraction(8, 1) == 7 / 8
    assert pipeline.bubble_fraction(15, 35, n_chunks=2) == 14 / 84
    assert [pipeline.in_flight(4, 8, s) for s in range(4)] == [4, 3, 2, 1]


def test_gpt4_utilisation():
    """Claims C1-C3: 2.15e25 FLOP on 25,000 A100 for 90 to 100 days."""
    mfu = [training.mfu(2.15e25, 25_000, days * 86_400, 312e12) for days in (90, 100)]
    assert [round(m, 3) for m in mfu] == [0.354, 0.319]
    assert training.seconds(2.15e25, 25_000, 312e12, mfu[0]) == pytest.approx(90 * 86_400)
    with pytest.raises(ValueError, match="utilisation=1.2"):
        training.seconds(1, 1, 1, 1.2)


def test_rent():
    assert cost.dollars(25_000, 100 * 86_400, 1) == 60e6
    assert cost.tokens_per_second(128, 1, 4.9e-6) == pytest.approx(7256, rel=1e-3)


def test_speculation_at_its_edges():
    assert speculation.expected_tokens(0, 4) == 1 and speculation.expected_tokens(1, 4) == 5
    assert speculation.expected_tokens(0.8, 4) == pytest.approx(1 + .8 + .64 + .512 + .4096)
    assert speculation.speed_up(0.8, 4, 0) == speculation.expected_tokens(0.8, 4)
    with pytest.raises(ValueError, match="acceptance=1.5"):
        speculation.expected_tokens(1.5, 4)


def test_the_scaling_law_is_lowest_where_it_says():
    n, tokens = scaling_laws.optimal(5.76e23)
    assert 6 * n * tokens == pytest.approx(5.76e23)
    best = scaling_laws.loss(n, tokens)
    assert all(scaling_laws.loss(n * f, tokens / f) > best for f in (0.9, 1.1))


def test_clusters_are_made_of_devices():
    gpt4 = ClusterSpec.preset("gpt-4-training")
    assert gpt4.device == DeviceSpec.preset("a100-80gb") and gpt4.n_devices == 25_000


@pytest.mark.parametrize("call, words", [
    (lambda: DeviceSpec.preset("a1000"), "device 'a1000' is not a preset; accepted: v100-32gb"),
    (lambda: A100.peak_flop_rate("fp8"), "a100-80gb has no fp8 peak; accepted: fp32"),
    (lambda: DeviceSpec("x", {"bf16": 1e12}, float("nan"), 1, 1, 1), "memory_bytes=nan"),
    (lambda: DeviceSpec("x", {}, 1, 1, 1, 1), "peak is empty"),
    (lambda: ClusterSpec("x", A100, 0, 8, 1), "n_devices=0")])
def test_bad_hardware_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
