"""The planner: every layout priced, the best of them found, the reasons true."""

import pytest

from gpt4lib import ClusterSpec, Estimator, ModelSpec, ParallelPlan, planner

GPT4 = Estimator(ModelSpec.preset("gpt-4"), ClusterSpec.preset("gpt-4-training"), 8192)
SMALL = Estimator(ModelSpec.preset("llama-2-7b"), ClusterSpec.preset("dgx-a100"), 4096)


@pytest.fixture(scope="module")
def small():
    return planner.search(SMALL, 16, 64)


def test_gpt_4_has_more_than_ten_thousand_layouts_all_lawful_and_different():
    plans = list(planner.layouts(GPT4.spec, 25_000, 8, 7324))
    assert len(plans) > 10_000 and len(set(plans)) == len(plans)
    assert all(p.n_devices <= 25_000 and p.dp % p.ep == 0 for p in plans)
    for plan in plans[::97]:
        plan.check(GPT4.spec)
    assert {p.zero_stage for p in plans} == {0, 1, 2, 3} and {p.n_chunks for p in plans} == {1, 2, 4, 8}
    assert all(abs(p.global_batch - 7324) <= 0.02 * 7324 for p in plans)


@pytest.mark.parametrize("batch", [64, 90, 96, 100])
def test_the_batch_that_was_asked_for_is_planned(batch):
    """64 replicas do not divide 96 sequences; 48 do."""
    plans = list(planner.layouts(SMALL.spec, 64, 8, batch))
    assert plans and all(abs(p.global_batch - batch) <= 0.02 * batch for p in plans)
    assert batch != 96 or any(p.dp == 48 for p in plans)


def test_the_best_is_the_fastest_that_fits(small):
    limit = SMALL.cluster.device.memory_bytes
    every = [SMALL.estimate(p) for p in planner.layouts(SMALL.spec, 16, 8, 64)]
    fits = [e for e in every if e.memory.total <= limit]
    assert len(small.fitting) == len(fits) and len(small.too_large) == len(every) - len(fits) > 0
    assert planner.rate(small.best, 4096) == max(planner.rate(e, 4096) for e in fits)
    assert [planner.rate(e, 1) for e in small.fitting] == sorted((planner.rate(e, 1) for e in fits), reverse=True)


def test_a_loser_knows_why(small):
    assert small.why(small.best) == "the fastest that fits"
    big = small.why(small.too_large[-1])
    assert big.startswith("needs ") and "of 80.0 GB" in big and "GB, " in big
    deep = next(e for e in small.fitting if e.plan.pp == 16 and e.plan.n_chunks == 1)
    assert "slower" in small.why(deep) and "a sequence" in small.why(deep)
    fewer = next(e for e in planner.search(SMALL, 12, 64).fitting if e.plan.n_devices == 8)
    assert planner.search(SMALL, 12, 64).best.plan.n_devices == 8 or "devices fewer" in planner.search(SMALL, 12, 64).why(fewer)


def test_where_nothing_fits_the_least_is_named():
    with pytest.raises(ValueError, match="no layout fits: the least, tp .*needs .* of 80.0 GB"):
        planner.search(GPT4, 64, 64).best


def test_the_reverse_question_returns_what_was_asked_for(small):
    tokens = planner.rate(small.best, 4096) * 86_400 * 10                       # ten days at the best
    found = planner.explaining(small, tokens, (9.9, 12), (small.best.mfu * 0.9, 1))
    assert found[0] is small.best and len(found) < len(small.fitting)
    assert all(9.9 <= tokens / planner.rate(e, 4096) / 86_400 <= 12 for e in found)


@pytest.mark.parametrize("n, batch", [(0, 1), (8, 0)])
def test_nonsense_is_refused(n, batch):
    with pytest.raises(ValueError, match="are not accepted"):
        planner.search(SMALL, n, batch)


def test_a_plan_reads_in_one_line():
    plan = ParallelPlan(tp=8, pp=15, dp=208, ep=16, zero_stage=1, n_chunks=2, n_micro_batches=35, recompute="full")
    assert planner.name(plan) == "tp 8 pp 15x2 dp 208 ep 16 zero 1 micro 1x35 recompute full"
