"""The estimator: its terms against closed forms, its memory against the parts that running code has confirmed."""

from dataclasses import replace

import pytest

from gpt4lib import ClusterSpec, DeviceSpec, Estimator, ModelSpec, ParallelPlan, flops, memory, parameters
from gpt4lib.analysis import collectives, efficiency, operators, pipeline
from gpt4lib.specs.model import LinearAttention

A100, GPT3 = ClusterSpec.preset("dgx-a100"), ModelSpec.preset("gpt-3-175b")
PLAN = ParallelPlan(tp=8, pp=8, dp=4, n_micro_batches=16, sequence_parallel=True)
# Datasheet speeds, nothing late, nothing hidden: then every term is a closed form.
IDEAL = efficiency.Efficiency(matmul={"ampere": 1.0}, attention={"ampere": 1.0}, memory=1e9, kernel_seconds=0, link=1, network=1,
                              link_hop_seconds=0, network_hop_seconds=0, tensor_overlap=0, shard_overlap=0, step_seconds=0,
                              straggling=0, framework_bytes=0, fragmentation=0, working_layers=0, logit_bytes=0, fp8=1)


def ideal(spec=GPT3, **more):
    return Estimator(spec, A100, 2048, efficiency=IDEAL, **more)


HYBRID = ModelSpec.preset("qwen3-30b-a3b").with_(        # shaped as Qwen3-Next: three linear layers to a full one, a shared expert
    name="hybrid", layer_kinds=("linear", "linear", "linear", "full") * 12, d_shared=768, shared_gate=True, attention_gate=True,
    linear=LinearAttention(n_key_heads=16, n_value_heads=32, key_dim=128, value_dim=128, conv_kernel=4))


@pytest.mark.parametrize("name", [*ModelSpec.presets(), "hybrid"])
def test_the_matrices_of_a_layer_are_the_models(name):
    """Exact: what is multiplied in every layer is what `parameters` and `flops` count, biases, norms and sinks apart."""
    spec = HYBRID if name == "hybrid" else ModelSpec.preset(name)
    layers = [(kind, spec.is_moe_layer(i)) for i, kind in enumerate(spec.layer_kinds)]
    one, count = flops.forward(spec, 1, 64, causal=True).by_part, parameters(spec).by_part
    work = [operators.layer(spec, *layer, ParallelPlan(), 64, True) for layer in layers]
    assert sum(w.flop for w in work) == sum(one[p] for p in ("attention", "ffn", "experts", "shared_experts", "router"))
    assert sum(w.score_flop for w in work) == one["scores"]
    held = sum(p.n_in * p.n_out * p.copies for layer in layers for p in operators.products(spec, *layer))
    kept = sum(count[p] for p in ("attention", "ffn", "experts", "shared_experts", "router"))
    relative = spec.n_layers * spec.d_model * spec.q_width * (spec.positions == "relative")   # done once a batch
    assert 0 <= kept - held - relative < 0.001 * kept


@pytest.mark.parametrize("tp, ep", [(8, 1), (1, 4), (2, 8)])
def test_ranks_share_the_arithmetic_and_the_experts(tp, ep):
    spec = ModelSpec.preset("mixtral-8x7b")
    whole, part = (operators.layer(spec, "full", True, ParallelPlan(tp=t, dp=e, ep=e), 64, True) for t, e in ((1, 1), (tp, ep)))
    router = 2 * 64 * spec.d_model * spec.n_experts                       # every rank has it whole
    assert part.flop - router == pytest.approx((whole.flop - router) / tp, rel=1e-12)
    assert part.weights < whole.weights / tp / ep * 1.6


def test_at_datasheet_speed_a_step_is_flop_over_peak():
    """One device, 3 x forward; scores count 3.5 times, as the backward kernel computes them again."""
    found = ideal(causal=True).estimate(ParallelPlan(n_micro_batches=2))
    one = flops.forward(GPT3, 2, 2048, causal=True)
    expected = (3 * one.total + 0.5 * one.by_part["scores"]) / A100.device.peak["bf16"]
    assert found.step_seconds == pytest.approx(expected, rel=1e-4)                   # the rest: bytes at 1e9 bandwidths
    assert found.mfu == pytest.approx(3 * one.total / expected / A100.device.peak["bf16"], rel=1e-4) and found.hfu == found.mfu


@pytest.mark.parametrize("recompute, sp", [("none", False), ("none", True), ("full", False), ("full", True)])
def test_tensor_parallel_time_is_the_counted_bytes_over_the_link(recompute, sp):
    """The bytes that a running step was counted to send, layers and embedding, over one link; recomputation sends some."""
    plan = ParallelPlan(tp=8, n_micro_batches=3, recompute=recompute, sequence_parallel=sp)
    found = ideal().estimate(plan)
    sent = {t.what: 0 for t in collectives.training_step(GPT3, plan, 2048)}
    for term in collectives.training_step(GPT3, plan, 2048):
        sent[term.what] += term.sent
    again = found.by_term["recomputation"] - (found.hardware_flop - found.flop) / found.peak
    assert found.by_term["tensor"] + again == pytest.approx((sent["layers"] + sent["embedding and head"]) / A100.device.link_bandwidth,
                                                            rel=2e-3)                # bytes at 1e9 bandwidths in `again`


@pytest.mark.parametrize("n, nodes", [(8, 1), (16, 2), (64, 8)])
def test_a_ring_between_nodes_is_bound_by_what_must_cross(n, nodes):
    """Inside: 2 (n - 1) / n bytes over a link. Between: 2 (N - 1) / N over the eight ports of a node."""
    seconds = ideal().collective(2, 1e9, n, 1)
    inside, across = 2 * 1e9 * 7 / 8 / 300e9, 2 * 1e9 * (nodes - 1) / nodes / (8 * 25e9)
    assert seconds == pytest.approx(max(inside, across), rel=1e-12)
    assert ideal().collective(2, 1e9, n // 8, 8) == pytest.approx(across * 8, rel=1e-12)   # one rank a node: one port


def test_hops_add_to_a_ring():
    slow = replace(IDEAL, link_hop_seconds=1e-3, network_hop_seconds=1e-2)
    late = Estimator(GPT3, A100, 2048, efficiency=slow).collective(2, 1e9, 16, 1) - ideal().collective(2, 1e9, 16, 1)
    assert late == pytest.approx(2 * (2 * 1e-2 + 14 * 1e-3), rel=1e-12)


@pytest.mark.parametrize("m, v", [(8, 1), (32, 1), (32, 3), (4, 1), (4, 2)])
def test_the_bubble_is_the_closed_form(m, v):
    """With a negligible head all stages are alike, and idle over useful time is `pipeline.bubble_overhead`."""
    found = ideal(GPT3.with_(vocab_size=8)).estimate(replace(PLAN, tp=1, sequence_parallel=False, n_micro_batches=m, n_chunks=v))
    useful = sum(t for term, t in found.by_term.items() if term not in ("bubble", "replicas", "optimizer"))
    assert found.by_term["bubble"] / useful == pytest.approx(pipeline.bubble_overhead(8, m, v), rel=2e-3)


def test_a_heavy_head_slows_the_pipeline_but_layers_move_away_from_it():
    plain, heavy = (ideal(GPT3.with_(vocab_size=v)).estimate(PLAN) for v in (8, 400_000))
    ratio = flops.forward(GPT3.with_(vocab_size=400_000), 1, 2048, causal=True).total / flops.forward(
        GPT3.with_(vocab_size=8), 1, 2048, causal=True).total
    assert ratio < heavy.step_seconds / plain.step_seconds < ratio * 1.2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_on_a_stage_in_the_middle_is_bytes_a_parameter(stage):
    """2 of weight, 4 of gradient, 12 of the optimizer, each divided by the replicas from its stage on."""
    plan = replace(PLAN, zero_stage=stage)
    found = ideal().memory_by_stage(plan)[1].by_part
    held = sum(memory.stage_parameters(GPT3, plan, 1).values())
    for part, each, first in (("weights", 2, 3), ("gradients", 4, 2), ("optimizer", 12, 1)):
        assert found[part] == pytest.approx(each * held / (4 if stage >= first else 1), rel=1e-6)


def test_activations_of_a_layer_are_counted_by_hand():
    """Multi-head, 4h block, fused attention, no sequence parallelism: inputs of two norms and two blocks whole; q, k, v, output and
    the block's two wide tensors cut by tp; 2 bytes each (Korthikanti et al. 2022, equation 2, without masks and scores)."""
    plan, d = replace(PLAN, sequence_parallel=False), GPT3.d_model
    found = ideal().memory_by_stage(plan)[0].by_part["activations"]
    a_layer = 2 * 2048 * (4 * d + (4 * d + 2 * 4 * d) / 8)
    assert found == pytest.approx(12 * pipeline.in_flight(8, 16, 0) * a_layer)


def test_fused_attention_keeps_no_scores_and_recipes_order_as_they_should():
    one = {r: memory.layer_activation_bytes(GPT3, replace(PLAN, recompute=r), 2048, fused=True) for r in ("none", "selective", "full")}
    old = memory.layer_activation_bytes(GPT3, PLAN, 2048)
    assert one["full"] < one["selective"] < one["none"] < old
    assert old - one["none"] == 2 * 2048 * 2048 * GPT3.n_heads / 8


def test_more_recomputation_is_slower_and_smaller():
    found = [Estimator(GPT3, A100, 2048).estimate(replace(PLAN, recompute=r)) for r in ("none", "selective", "full")]
    assert [f.step_seconds for f in found] == sorted(f.step_seconds for f in found)
    assert [f.memory.total for f in found] == sorted((f.memory.total for f in found), reverse=True)
    assert found[2].hfu > found[2].mfu and found[0].hfu == found[0].mfu


def test_overlap_hides_fsdp_and_only_that():
    spec, plan = ModelSpec.preset("llama-3.1-8b"), ParallelPlan(dp=64, zero_stage=3, micro_batch=2)
    half = lambda share: Estimator(spec, A100, 4096, efficiency=replace(efficiency.fitted(), shard_overlap=share)).estimate(plan)
    bare, hidden = half(0.0), half(1.0)
    assert hidden.by_term["replicas"] < 0.2 * bare.by_term["replicas"]
    assert {k: v for k, v in bare.by_term.items() if k != "replicas"} == {k: v for k, v in hidden.by_term.items() if k != "replicas"}


def test_hybrid_shards_gather_inside_the_node():
    spec = ModelSpec.preset("llama-3.1-8b")
    far, near = (ideal(spec).estimate(ParallelPlan(dp=64, zero_stage=3, shard=s, n_micro_batches=16)) for s in (None, 8))
    assert near.by_term["replicas"] < far.by_term["replicas"] and near.memory.by_part["weights"] == 8 * far.memory.by_part["weights"]


def test_an_unfitted_generation_is_taken_for_the_slowest():
    k = efficiency.fitted()
    assert k.of("matmul", DeviceSpec.preset("tpu-v4")) == min(k.matmul.values())


def test_explain_names_every_term_and_its_error_bar():
    found = Estimator(GPT3, A100, 2048).estimate(replace(PLAN, recompute="full", zero_stage=1))
    text = found.explain()
    assert all(term in text for term, t in found.by_term.items() if t) and "half are within" in text and "nine in ten" in text
    assert found.bound_by == "products" and sum(found.by_term.values()) == found.step_seconds


@pytest.mark.parametrize("v", [1, 2])
def test_another_micro_batch_never_shortens_a_step(v):
    """Below as many micro-batches as stages too; and one alone passes every stage once."""
    spec = ModelSpec.preset("llama-3.1-8b")
    estimator = Estimator(spec, A100, 8192)
    steps = [estimator.estimate(ParallelPlan(tp=2, pp=8, n_chunks=v, n_micro_batches=m)).step_seconds for m in range(1, 40)]
    assert steps == sorted(steps)
    whole = estimator.estimate(ParallelPlan(tp=2)).step_seconds
    if v == 1:
        assert 0.9 * whole < steps[0] < 1.2 * whole


def test_only_a_head_makes_layers_move():
    """Mixtures in the first quarter of the layers: that stage sets the pace, whatever an even share would be."""
    spec = ModelSpec.preset("mixtral-8x7b").with_(n_experts=64, top_k=8, moe_layers=tuple(range(8)))
    found = ideal(spec).estimate(ParallelPlan(tp=8, pp=4, n_micro_batches=64))
    share = sum(p.uses * p.n_in * p.n_out for i in range(8) for p in operators.products(spec, "full", True))
    every = sum(p.uses * p.n_in * p.n_out for i in range(32) for p in operators.products(spec, "full", i < 8))
    assert found.by_term["products"] / 64 == pytest.approx(3 * 2 * 2048 * share / 8 / A100.device.peak["bf16"], rel=0.02)
    assert share > 0.5 * every


def test_context_parallelism_gathers_what_attention_keeps():
    wide, latent = (ModelSpec.preset(n) for n in ("llama-3.1-8b", "deepseek-v3"))
    per_layer = [ideal(s).estimate(ParallelPlan(cp=8)).by_term["context"] / s.n_layers for s in (wide, latent)]
    assert per_layer[0] / per_layer[1] == pytest.approx(2 * 8 * 128 / (512 + 64), rel=1e-9)


def test_traffic_hides_behind_the_same_work_once():
    """Weights and experts together: what is longer than the work shows, even where everything may hide."""
    spec, plan = ModelSpec.preset("mixtral-8x7b"), ParallelPlan(dp=64, ep=8, zero_stage=3)
    bare, hidden = (Estimator(spec, A100, 1024, efficiency=replace(efficiency.fitted(), shard_overlap=s, straggling=0)).estimate(plan)
                    for s in (0.0, 1.0))
    work = sum(t for term, t in bare.by_term.items() if term not in ("replicas", "optimizer", "fixed"))
    assert hidden.by_term["replicas"] == pytest.approx(max(bare.by_term["replicas"] - work, 0), abs=1e-9)


def test_each_zero_stage_sends_more():
    """Stage 2 scatters after every micro-batch, stage 3 gathers too; with nothing hidden that is the order of their times."""
    estimator = Estimator(ModelSpec.preset("llama-3.1-8b"), A100, 2048, efficiency=replace(efficiency.fitted(), shard_overlap=0.0))
    one, two, three = (estimator.estimate(ParallelPlan(dp=64, zero_stage=z, n_micro_batches=8)).by_term["replicas"] for z in (1, 2, 3))
    assert one < two < three


def test_fp8_is_faster_in_matrices_only():
    spec, h100 = ModelSpec.preset("llama-3.1-8b"), ClusterSpec.preset("dgx-h100")
    half, eight = (Estimator(spec, h100, 8192, dtype).estimate(ParallelPlan(tp=8)) for dtype in ("bf16", "fp8"))
    assert 0.5 < eight.by_term["products"] / half.by_term["products"] < 0.75 and eight.memory.by_part == half.memory.by_part
    assert eight.by_term["attention"] == half.by_term["attention"]


@pytest.mark.parametrize("make, words", [
    (lambda: Estimator(GPT3, A100, 2048, "int8"), "dtype 'int8' is not accepted for training; give bf16, fp16, fp8"),
    (lambda: Estimator(GPT3, A100, 2048, "bf16", "int4"), "gradient_dtype 'int4' is not accepted"),
    (lambda: Estimator(GPT3, A100, 4096), "seq_len=4096 is more than the 2048 positions"),
    (lambda: Estimator(GPT3, A100, 2047).estimate(ParallelPlan(cp=2)), "seq_len=2047 is not divisible by cp=2"),
    (lambda: Estimator(GPT3, A100, 0), "seq_len=0"),
    (lambda: Estimator(GPT3, ClusterSpec.preset("dgx-2"), 2048), "v100-32gb has no bf16 peak"),
    (lambda: Estimator(GPT3, A100, 2048).estimate(ParallelPlan(tp=5)), "n_heads=96 is not divisible by tp=5"),
    (lambda: Estimator(GPT3, A100, 2048).estimate(ParallelPlan(pp=97)), "pp=97")])
def test_nonsense_is_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("plan", [ParallelPlan(), ParallelPlan(tp=8, dp=124, zero_stage=3, micro_batch=8, recompute="full")])
def test_without_a_pipeline_there_is_no_bubble_not_even_of_rounding(plan):
    assert Estimator(GPT3, A100, 2048).estimate(plan).by_term["bubble"] == 0
