"""Every layout trains like one process: five steps in fp64 against the oracle, which shares no parallel code."""

import functools

import pytest
import torch

from gpt4lib.distributed.launch import launch
from gpt4lib.specs import LatentAttention
from gpt4lib.specs.workload import ParallelPlan as Plan
from tests.distributed import oracle
from tests.distributed.oracle import BIASED, DENSE, MIXED

workers = oracle.Workers(__name__)

EXACT = 1e-11            # fp64: sums in another order, 1e-16 a term, that five steps of AdamW magnify at most thousandfold
ROWS = 8                 # sequences in a batch, whatever the plan

LATENT = LatentAttention(kv_rank=10, rope_dim=4, nope_dim=6, v_dim=8, q_rank=12)
SPECS = {
    "biases": BIASED,
    "untied": DENSE.with_(tied=False, head_bias=True),
    "learned positions": DENSE.with_(positions="learned", position_offset=2, embedding_norm=True),
    "shared experts": MIXED.with_(gated_ffn=True, d_shared=12, shared_gate=True, router_bias=True, ffn_bias=True, norm="rmsnorm"),
    "gate and sinks": DENSE.with_(attention_gate=True, sinks=True, qkv_bias=True),
    "query-key norms": DENSE.with_(qk_norm="head", norms_per_layer=4),
    "latent": DENSE.with_(latent=LATENT, head_dim=10, out_bias=True),
    "latent with biases": DENSE.with_(latent=LATENT, head_dim=10, qkv_bias=True),
    "latent, direct queries": DENSE.with_(latent=LatentAttention(kv_rank=10, rope_dim=4, nope_dim=6, v_dim=8), head_dim=10),
    "parallel block": DENSE.with_(norms_per_layer=1, norm="layernorm_nobias"),
    "windows": DENSE.with_(window=3, layer_kinds=("window", "full", "window", "full")),
}
TP2, TP2PP2 = dict(tp=2, n_micro_batches=2), dict(tp=2, pp=2, n_micro_batches=2)
SP = dict(sequence_parallel=True)
ALL = dict(tp=2, pp=2, dp=2, ep=2, n_micro_batches=2, recompute="full") | SP
CASES = {                # name -> spec, degrees; micro_batch follows from ROWS
    "one process": (MIXED, dict(n_micro_batches=2)),
    "tp2": (MIXED, TP2),
    "tp2 sp": (MIXED, TP2 | SP),
    **{f"tp4, {n} key/value heads": (MIXED.with_(n_kv_heads=n), dict(tp=4, n_micro_batches=2)) for n in (1, 2, 4)},
    "tp4 sp, 1 key/value head": (MIXED.with_(n_kv_heads=1), dict(tp=4, n_micro_batches=2) | SP),
    "pp2": (MIXED, dict(pp=2, n_micro_batches=4)),
    "pp3, uneven": (MIXED, dict(pp=3, n_micro_batches=4)),
    "pp4": (MIXED, dict(pp=4, n_micro_batches=8)),
    "pp2, two chunks": (MIXED, dict(pp=2, n_micro_batches=4, n_chunks=2)),
    "pp2, two chunks, uneven rounds": (DENSE.with_(n_layers=5), dict(pp=2, n_micro_batches=1, n_chunks=2)),
    "pp4, gpipe": (MIXED, dict(pp=4, n_micro_batches=4, schedule="gpipe")),
    "pp4, fewer micro-batches than stages": (MIXED, dict(pp=4, n_micro_batches=2)),
    "pp4, one micro-batch": (MIXED, dict(pp=4, n_micro_batches=1)),
    "dp2": (MIXED, dict(dp=2, n_micro_batches=2)),
    "dp2 zero1": (MIXED, dict(dp=2, n_micro_batches=2, zero_stage=1)),
    "dp2 zero3": (MIXED, dict(dp=2, n_micro_batches=2, zero_stage=3)),
    "dp4 zero3 in pairs": (MIXED, dict(dp=4, n_micro_batches=2, zero_stage=3, shard=2)),
    "ep2": (MIXED, dict(dp=2, ep=2, n_micro_batches=2)),
    "ep2 zero3": (MIXED, dict(dp=2, ep=2, n_micro_batches=2, zero_stage=3)),
    "ep2 dp4": (MIXED, dict(dp=4, ep=2, n_micro_batches=2)),
    "ep2 dp4 zero1": (MIXED, dict(dp=4, ep=2, n_micro_batches=2, zero_stage=1)),
    "ep2 dp4 zero3": (MIXED, dict(dp=4, ep=2, n_micro_batches=2, zero_stage=3)),
    "ep4": (MIXED, dict(dp=4, ep=4, n_micro_batches=2)),
    "tp2 pp2": (MIXED, TP2PP2),
    "tp2 ep2": (MIXED, dict(tp=2, dp=2, ep=2, n_micro_batches=2) | SP),
    "tp2 zero3": (MIXED, dict(tp=2, dp=2, zero_stage=3, n_micro_batches=2) | SP),
    "pp2 zero1": (MIXED, dict(pp=2, dp=2, zero_stage=1, n_micro_batches=2)),
    "pp2 zero3, two chunks": (MIXED, dict(pp=2, dp=2, zero_stage=3, n_micro_batches=2, n_chunks=2)),
    "tp2 pp2 zero1": (MIXED, dict(tp=2, pp=2, dp=2, zero_stage=1, n_micro_batches=2)),
    "tp2 pp2 zero3": (MIXED, dict(tp=2, pp=2, dp=2, zero_stage=3, n_micro_batches=2)),
    "everything": (SPECS["shared experts"], ALL | dict(zero_stage=1, n_chunks=2)),
    "everything zero3": (SPECS["shared experts"], ALL | dict(zero_stage=3)),
    **{f"tp2 {name}": (spec, TP2) for name, spec in SPECS.items()},
    **{f"tp2 sp {name}": (SPECS[name], TP2 | SP) for name in
       ("biases", "learned positions", "shared experts", "query-key norms")},
    **{f"tp2 pp2 {name}": (SPECS[name], TP2PP2) for name in
       ("biases", "untied", "learned positions", "latent", "parallel block")},
    **{f"tp2 recompute {kind}": (SPECS["shared experts"], TP2 | dict(recompute=kind))
       for kind in ("selective", "full")},
    "ep2 recompute full": (MIXED, dict(dp=2, ep=2, n_micro_batches=2, recompute="full")),
    "pp2 recompute selective": (MIXED, dict(pp=2, n_micro_batches=2, recompute="selective")),
}
CASES = {name: (spec, Plan(**degrees, micro_batch=ROWS // degrees.get("dp", 1) // degrees["n_micro_batches"]))
         for name, (spec, degrees) in CASES.items()}


@functools.cache
def world(n):
    """All cases of n processes, run in one launch; by name, one Run a rank."""
    mine = {name: case for name, case in CASES.items() if case[1].n_devices == n}
    ranks = launch(n, oracle.several, mine)
    return {name: [runs[name] for runs in ranks] for name in mine}


@functools.cache
def expected(spec, n_micro):
    return oracle.alone(spec, oracle.data(spec, ROWS, 5), n_micro)


@pytest.mark.parametrize("name", sorted(CASES, key=lambda name: CASES[name][1].n_devices))
def test_a_layout_trains_like_one_process(name):
    """Losses, norms, gradients and weights are the oracle's; replicas are the same to the bit; nothing is missing."""
    spec, plan = CASES[name]
    ranks, one = world(plan.n_devices)[name], expected(spec, plan.n_micro_batches)
    oracle.compare(ranks, one, atol=EXACT)
    oracle.covered(ranks, plan, one.weights)
    assert plan.dp * plan.tp == 1 or oracle.replicas_agree(ranks) > 0


def test_the_oracle_clips_in_some_steps_and_moves_every_parameter():
    """Otherwise half of what is compared would be idle."""
    run, start = expected(MIXED, 2), oracle.Transformer(MIXED).double()
    assert min(run.norms) < oracle.ADAMW.clip < max(run.norms)
    assert all((run.weights[name] - p).abs().max() > 1e-4 for name, p in start.named_parameters())


NARROW = {"tp2 zero1": Plan(tp=2, dp=2, zero_stage=1, n_micro_batches=2),
          "tp2 zero3": Plan(tp=2, dp=2, zero_stage=3, n_micro_batches=2),
          "pp2": Plan(pp=2, dp=2, n_micro_batches=2), "ep2 zero3": Plan(dp=4, ep=2, zero_stage=3),
          "ep2 zero1": Plan(dp=4, ep=2, zero_stage=1)}


@workers.on(4)
def in_fp32():
    return {name: oracle.on_a_rank(MIXED, plan, dtype=torch.float32) for name, plan in NARROW.items()}


@pytest.mark.parametrize("name", NARROW)
def test_fp32(name):
    """1e-4 absolute: a gradient near zero has few right digits in fp32, and AdamW steps by lr = 1e-2 whatever its size."""
    plan = NARROW[name]
    one = oracle.alone(MIXED, oracle.data(MIXED, plan.global_batch, 5), plan.n_micro_batches, dtype=torch.float32)
    ranks = [rank[name] for rank in in_fp32()]
    oracle.compare(ranks, one, atol=1e-4)
    assert oracle.replicas_agree(ranks) > 0 and {w.dtype for run in ranks for w in run.weights.values()} == {torch.float32}


@workers.on(4)
def in_bf16():
    found = {}
    for name, plan in NARROW.items():
        it = oracle.trainer(MIXED, plan, dtype=torch.bfloat16)
        batch = oracle.data(MIXED, plan.global_batch, 1)[0]
        losses = [it.step(batch)[1].loss for _ in range(20)]
        masters, local = oracle.weights(it), {n: p.detach() for stage in it.stages for n, p in stage.named_parameters()}
        it.backward(batch)
        gradients = oracle.gradients(it)
        found[name] = losses, oracle.Run([], [], [], gradients, masters, it.pieces), {} if plan.zero_stage == 3 else local
    return found


@pytest.mark.parametrize("name", NARROW)
def test_bf16_weights_have_fp32_masters_and_gradients(name):
    """One batch 20 times, so the loss has to fall; the weights are the masters rounded, which hold more than that."""
    losses, runs, local = zip(*(rank[name] for rank in in_bf16()))
    assert all(rank == losses[0] for rank in losses) and losses[0][-1] < losses[0][0] - 0.5
    assert oracle.replicas_agree(runs) > 0
    for run, weights in zip(runs, local):
        assert {t.dtype for t in (*run.gradients.values(), *run.weights.values())} == {torch.float32}
        assert any((w != w.bfloat16()).any() for w in run.weights.values())
        assert all(torch.equal(w, run.weights[n].bfloat16()) for n, w in weights.items())
