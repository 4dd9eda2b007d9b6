"""The cluster in simulation: queueing theory where there is one, closed forms where there is no queue, and one policy in both worlds."""

import json
import math
from itertools import islice
from statistics import mean

import pytest

from gpt4lib import ClusterSpec, ModelSpec, ParallelPlan
from gpt4lib.analysis.serving_estimator import ServingEstimator
from gpt4lib.cli import main
from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving import simulator as sim
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.engine import Engine
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.scheduler import Scheduler
from gpt4lib.serving.simulator import Cost, Lane, Request, simulate

TOKENS = dict(prompt=100, answer=20)


def lanes(n=1, seats=4, clock=lambda step: Cost(1.0, 1.0), n_blocks=1000, pipelines=None, **options):
    entrances = [[0.0] for _ in range(pipelines or n)]
    return [Lane(Scheduler(BlockPool(n_blocks, 16), seats, prefix_cache=False, **options), clock, entrances[i % len(entrances)])
            for i in range(n)]


def test_one_request_alone_takes_its_steps():
    report = simulate([Request(3.0, 10, 5)], lanes())
    assert report.ttft == [1.0] and report.tpot == [1.0] and report.seconds == 8.0
    assert report.steps == 5 and report.answer_tokens == 5 and report.busy == 5 and report.utilisation == 5 / 8


def test_it_takes_the_steps_that_the_engine_takes():
    """The same requests, all there at the start: a scheduler that knows no tensors cannot tell the difference."""
    spec = ModelSpec("toy", n_layers=1, d_model=8, n_heads=2, head_dim=4, d_ff=8, vocab_size=20, context=256)
    shapes = [(3 + 7 * i % 40, 1 + 11 * i % 30) for i in range(25)]
    engine = Engine(Transformer(spec), 30, 4, max_running=5, max_batched_tokens=16, prefix_cache=False)
    for prompt, answer in shapes:
        engine.add([1] * prompt, SamplingParams(max_tokens=answer))
    while engine.work:
        engine.step()
    scheduler = Scheduler(BlockPool(30, 4), 5, 16, prefix_cache=False)
    report = simulate([Request(0.0, *shape) for shape in shapes], [Lane(scheduler, lambda step: Cost(1.0, 1.0), [0.0])])
    # the first is alone in the first step: it was there a moment before the others
    assert abs(report.steps - engine.steps) <= 1 and report.preemptions > 0 and report.answer_tokens == sum(a for _, a in shapes)


def test_a_single_seat_waits_as_queueing_theory_says():
    """M/G/1: with service S and load rho = rate E[S], requests wait rate E[S^2] / (2 (1 - rho)) on average (Pollaczek and Khinchine).
    20,000 requests; the mean of correlated waits is known to a few per cent."""
    rate, requests = 0.03, list(islice(sim.poisson(0.03, 1e9, prompt=1, answer=20, longest=200), 20_000))
    report = simulate(requests, lanes(seats=1))
    service = [r.answer for r in requests]
    rho = rate * mean(service)
    expected = rate * mean(s * s for s in service) / (2 * (1 - rho))
    assert mean(report.ttft) - 1 == pytest.approx(expected, rel=0.08)
    assert report.utilisation == pytest.approx(rho, rel=0.02)


def test_every_token_is_counted_once_and_none_before_its_prompt_is_read():
    requests = list(sim.poisson(0.5, 4000, **TOKENS))
    report = simulate(requests, lanes(seats=16))
    assert report.answer_tokens == sum(r.answer for r in requests) and report.prompt_tokens == sum(r.prompt for r in requests)
    assert len(report.ttft) == len(requests) and all(t >= 1 for t in report.ttft)


def test_a_window_leaves_filling_and_emptying_out():
    """Sixteen seats that are never empty give sixteen tokens a second; with the time after the last arrival it looks like less."""
    requests = [Request(0.0, 1, 50) for _ in range(160)]
    whole, inside = (simulate(requests, lanes(seats=16), window=w) for w in ((0.0, math.inf), (100.0, 400.0)))
    assert inside.tokens_per_second == 16 and inside.seconds == 300 and inside.utilisation == pytest.approx(1, abs=0.01)
    late = simulate([Request(float(i), 1, 50) for i in range(100)], lanes(seats=200), window=(60.0, 100.0))
    assert late.tokens_per_second == 50 and whole.answer_tokens == 8000


def test_batches_of_a_pipeline_overlap_but_enter_one_after_the_other():
    """Four lanes, steps of 4 s that hold the entrance for 1: four batches in the time of one, and no more."""
    clock = lambda step: Cost(4.0, 1.0)                                                                # noqa: E731
    requests = [Request(0.0, 1, 100) for _ in range(4)]
    report = simulate(requests, lanes(4, clock=clock, pipelines=1))
    assert report.seconds == 400 + 3 and sorted(report.ttft) == [4, 5, 6, 7] and report.utilisation == pytest.approx(400 / 403)
    slow = simulate(requests, lanes(4, clock=lambda step: Cost(4.0, 2.0), pipelines=1))
    assert slow.seconds == pytest.approx(2 * 400 + 2, abs=3)                  # now the entrance is what binds: 2 s a batch
    apart = simulate(requests, lanes(4, clock=clock))
    assert apart.seconds == 400 and apart.pipelines == 4 and apart.utilisation == 1 / 4


def test_it_is_the_same_every_time():
    a, b = (simulate(sim.bursts(2.0, 300, **TOKENS), lanes(3, seats=8)) for _ in range(2))
    assert a == b
    assert a != simulate(sim.bursts(2.0, 300, seed=1, **TOKENS), lanes(3, seats=8))


def test_bursts_of_the_same_rate_wait_longer():
    steady, bursty = (simulate(trace(1.0, 2000, **TOKENS), lanes(seats=32)) for trace in (sim.poisson, sim.bursts))
    assert len(bursty.ttft) == pytest.approx(len(steady.ttft), rel=0.1)
    assert sim.quantile(bursty.ttft, 0.99) > sim.quantile(steady.ttft, 0.99)


def test_a_day_has_its_trough_at_the_start_and_its_mean_in_all():
    hours = [0] * 24
    for r in sim.diurnal(0.5, swing=0.6, **TOKENS):
        hours[int(r.arrival // 3600)] += 1
    assert sum(hours) == pytest.approx(0.5 * 86_400, rel=0.02) and min(hours) in (hours[0], hours[23])
    assert max(hours[11:13]) / min(hours[0], hours[23]) == pytest.approx(1.6 / 0.4, rel=0.15)


def test_a_request_no_lane_can_hold_is_refused_and_counted():
    report = simulate([Request(0.0, 10, 5), Request(1.0, 1000, 5)], lanes(n_blocks=10))
    assert report.refused == 1 and len(report.ttft) == 1


def test_goodput_and_quantiles():
    report = sim.Report(ttft=[1, 2, 3, 4], tpot=[0.1, 0.3, 0.1, 0.1], seconds=2.0)
    assert report.goodput(3, 0.2) == 2 / 2 and report.goodput(0.5, 1) == 0
    assert [sim.quantile([4, 1, 3, 2], q) for q in (0, 0.5, 0.75, 0.99, 1)] == [1, 2, 3, 4, 4] and math.isnan(sim.quantile([], 0.5))


@pytest.fixture(scope="module")
def estimator():
    return ServingEstimator(ModelSpec.preset("gpt-4"), ClusterSpec.around("a100-40gb"), ParallelPlan(tp=8, pp=16))


def test_a_predicted_clock_prices_what_the_scheduler_put_together(estimator):
    scheduler = sim.cluster(estimator, max_batched_tokens=300)[0].scheduler
    clock, sequences = sim.predicted(estimator), [sim.Sequence(range(n), 5) for n in (100, 50, 400)]
    for s in sequences:
        scheduler.add(s)
    first = scheduler.schedule()                                    # 100 and 50 whole, and 150 of the 400
    pairs = sum(n * (n + 1) / 2 for n in (100, 50, 150))            # nobody attends to another's prompt
    assert clock(first) == Cost(*(lambda e: (e.seconds, e.turn))(estimator.step(0, 0, 300, 0.0, 3, pairs)))
    assert clock(first).seconds < estimator.step(0, 0, 300).seconds
    for group in scheduler.advance(first):
        for s in group:
            scheduler.append(s, 0)
    second = scheduler.schedule()                                   # two tokens, and what is left of the prompt
    expected = estimator.step(2, (101 + 51) / 2, 250, 150)
    assert clock(second) == Cost(expected.seconds, expected.turn) and expected.turn < expected.seconds / 10


def test_a_lone_request_on_gpt_4_s_cluster_takes_what_the_estimator_says(estimator):
    report = simulate([Request(0.0, 1000, 3)], sim.cluster(estimator))
    steps = [estimator.step(0, 0, 1000), estimator.step(1, 1001), estimator.step(1, 1002)]
    assert report.ttft == [pytest.approx(steps[0].seconds)] and report.tpot == [pytest.approx((steps[1].seconds + steps[2].seconds) / 2)]


def test_the_cluster_has_a_lane_for_every_batch_under_way_and_all_the_memory(estimator):
    found = sim.cluster(estimator, block_size=16)
    assert len(found) == 16 and len({id(lane.entrance) for lane in found}) == 1
    assert sum(lane.scheduler.pool.n_blocks for lane in found) * 16 == pytest.approx(estimator.largest_batch(16) * 16, rel=0.01)
    for model, plan, pipelines in (("llama-3.1-8b", ParallelPlan(dp=2), 2), ("mixtral-8x7b", ParallelPlan(dp=16, ep=8), 2)):
        several = sim.cluster(ServingEstimator(ModelSpec.preset(model), ClusterSpec.around("h100-sxm"), plan))
        assert len({id(lane.entrance) for lane in several}) == len(several) == pipelines
    windowed = ServingEstimator(ModelSpec.preset("llama-3.1-8b").with_(window=1024), ClusterSpec.around("h100-sxm"))
    pool = sim.cluster(windowed, typical_context=16384)[0].scheduler.pool
    assert pool.n_blocks * 16 / 16384 == pytest.approx(windowed.largest_batch(16384), rel=0.01)
    with pytest.raises(ValueError, match="leaves no room"):
        sim.cluster(ServingEstimator(ModelSpec.preset("gpt-4"), ClusterSpec.around("a100-40gb"), ParallelPlan(tp=8)))


def test_more_load_never_means_a_sooner_median(estimator):
    medians = [sim.quantile(simulate(sim.poisson(rate, 240, prompt=500, answer=100), sim.cluster(estimator)).ttft, 0.5)
               for rate in (4, 8, 16)]
    assert medians == sorted(medians)


def test_traces_are_read_in_both_forms(tmp_path):
    ours, azure = tmp_path / "ours.csv", tmp_path / "azure.csv"
    ours.write_text("arrival_seconds,prompt_tokens,answer_tokens\n5,100,10\n6.5,200,20\n")
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,100,10\n2023-11-16 18:15:48.1805900,200,20\n")
    assert list(sim.read(ours)) == [Request(0.0, 100, 10), Request(1.5, 200, 20)]
    assert list(sim.read(azure)) == [Request(0.0, 100, 10), Request(pytest.approx(1.5), 200, 20)]


@pytest.mark.parametrize("text, words", [
    ("a,b\n1,2\n", "line 1: needed are the columns"), ("arrival_seconds,prompt_tokens,answer_tokens\n", "and a row"),
    ("arrival_seconds,prompt_tokens,answer_tokens\n0,x,1\n", "line 2, column prompt_tokens: 'x'"),
    ("arrival_seconds,prompt_tokens,answer_tokens\n0,5,0\n", "column answer_tokens: '0' is not accepted; give tokens"),
    ("arrival_seconds,prompt_tokens,answer_tokens\n1,5,5\n0.5,5,5\n", "line 3, column arrival_seconds: '0.5' is before"),
    ("arrival_seconds,prompt_tokens,answer_tokens\nnan,5,5\n", "'nan' is not accepted; give a time")])
def test_a_bad_trace_names_file_line_and_column(tmp_path, text, words):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        list(sim.read(path))
    assert "\n" not in str(error.value) and "t.csv" in str(error.value)


def test_a_missing_trace_and_bad_rates_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        list(sim.read(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="most=0"):
        list(sim.poisson(0, 10, **TOKENS))


def test_progress_is_told(estimator):
    times = []
    simulate(sim.poisson(0.3, 4000, **TOKENS), lanes(seats=8), progress=times.append)
    assert len(times) >= 2 and times == sorted(times)


def cli(*arguments, capsys):
    code = main(["simulate", *map(str, arguments)])
    return code, capsys.readouterr()


def test_the_command_simulates_a_rate_or_a_trace(tmp_path, capsys):
    code, out = cli("llama-3.1-8b", "--rate", 2, "--seconds", 30, "--json", capsys=capsys)
    data = json.loads(out.out)
    assert code == 0 and data["refused"] == 0 and data["ttft_seconds"]["p50"] <= data["ttft_seconds"]["p99"] < 1
    assert 0 < data["utilisation"] < 1 and data["goodput_requests_per_second"] > 0 and data["plan"]["tp"] == 1
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_seconds,prompt_tokens,answer_tokens\n0,100,10\n1,200,20\n")
    code, out = cli("llama-3.1-8b", "--trace", trace, capsys=capsys)
    assert code == 0 and "2 requests" in out.out and "first token" in out.out


@pytest.mark.parametrize("arguments, words", [
    ((), "give either --trace FILE or --rate"), (("--rate", 1, "--trace", "x.csv"), "give either"), (("--trace", "x.csv"), "x.csv cannot be read"),
    (("--rate", 1, "--shape", "wave"), "shape='wave' is not known; accepted: poisson, bursts, diurnal"), (("--rate", -1), "most=-1"),
    (("--rate", 1, "--engine", "vlllm"), "engine='vlllm' is not known; accepted: "), (("--rate", 1, "--tp", 3), "do not fit --gpus 1"), (("--rate", 1, "--seconds", 0), "--seconds"), (("--rate", 1e-9), "no request was answered")])
def test_a_bad_option_is_one_line_and_exit_2(arguments, words, capsys):
    code, out = cli("llama-3.1-8b", *arguments, capsys=capsys)
    assert code == 2 and words in out.err and out.err.count("\n") == 1 and not out.out
