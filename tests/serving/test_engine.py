"""The engine against one-by-one generation, and every way a request can go wrong alone."""

import random
from types import SimpleNamespace

import pytest
import torch

from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.engine import Engine
from gpt4lib.serving.executor import DecodeGraphs
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.text import Bytes
from gpt4lib.specs import LatentAttention, ModelSpec

BASE = ModelSpec("base", n_layers=2, d_model=24, n_heads=4, head_dim=6, d_ff=40, vocab_size=50, context=64, tied=False)
KINDS = {"multi-head": {}, "multi-query": dict(n_kv_heads=1), "grouped": dict(n_kv_heads=2, gated_ffn=True, norm="rmsnorm"),
         "learned": dict(positions="learned"), "window": dict(window=6), "experts": dict(n_experts=4, top_k=2, n_kv_heads=1),
         "sinks": dict(sinks=True), "latent": dict(latent=LatentAttention(q_rank=None, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=6))}
MODELS = {}


def model(kind="multi-query"):
    """fp64, so that sums in another order change no token; weights so large that a token depends on all before it."""
    if kind not in MODELS:
        MODELS[kind] = loud(Transformer(BASE.with_(**KINDS[kind]), seed=1).double())
    return MODELS[kind]


@torch.no_grad()
def loud(net):
    for p in net.parameters():
        if p.dim() > 1:
            p.mul_(12)
    return net


def engine(kind="multi-query", n_blocks=40, block_size=4, **options):
    return Engine(model(kind), n_blocks, block_size, **options)


def alone(prompt, n, kind="multi-query"):
    """Greedy, by a contiguous cache of its own."""
    return model(kind).generate(torch.tensor([list(prompt)]), n)[0, len(prompt):].tolist()


def run(e):
    while e.work:
        e.step()
    assert e.scheduler.pool.n_free == e.scheduler.pool.n_blocks
    return e


def prompts(n, seed=0, longest=20):
    dice = random.Random(seed)
    return [[dice.randrange(50) for _ in range(dice.randint(1, longest))] for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_answers_in_a_crowd_as_alone(kind):
    e = engine(kind, n_blocks=12, max_running=5, max_batched_tokens=12)
    asked = [(p if i % 2 else list(range(9)) + p, 6 + i % 9) for i, p in enumerate(prompts(12))]
    given = [e.add(p, SamplingParams(max_tokens=n))[0] for p, n in asked]
    run(e)
    answers = [alone(p, n, kind) for p, n in asked]
    assert [a.generated for a in given] == answers
    assert len({t for answer in answers for t in answer}) > 15                      # they say something,
    assert any(a.preemptions for a in given) and any(a.n_cached and not a.preemptions for a in given)      # and this happened


def test_static_batching_gives_the_same_answers_in_more_steps():
    steps = {}
    for continuous in (True, False):
        e = engine(continuous=continuous, max_running=4)
        given = [e.add(p, SamplingParams(max_tokens=1 + 3 * i))[0] for i, p in enumerate(prompts(12))]
        steps[continuous] = run(e).steps
        assert [a.generated for a in given] == [alone(a.prompt, a.max_new_tokens) for a in given]
    assert steps[True] < steps[False]


def test_n_samples_share_the_prompt_and_differ():
    e = engine(max_running=4)
    given = e.add(range(10), SamplingParams(n=4, temperature=1.0, max_tokens=6, seed=3))
    e.step()
    assert all(a.blocks[:2] == given[0].blocks[:2] for a in given) and e.scheduler.pool.n_free == 40 - 3
    run(e)
    assert len({tuple(a.generated) for a in given}) == 4


@pytest.mark.parametrize("kind", ["multi-query", "latent"])
def test_samples_of_one_prompt_write_to_copies_not_to_each_other(kind):
    """Greedy, all four must give the answer of one: a write into a shared tail would show."""
    e = engine(kind, max_running=4)
    given = e.add([3, 1, 4, 1, 5, 9], SamplingParams(n=4, max_tokens=9))
    run(e)
    assert [a.generated for a in given] == [alone([3, 1, 4, 1, 5, 9], 9, kind)] * 4


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd_and_after_preemption():
    params = SamplingParams(temperature=1.2, top_p=0.9, repetition_penalty=1.2, max_tokens=12, seed=7, n=2)
    e = engine()
    lone = e.add([1, 2, 3], params)
    run(e)
    e = engine(n_blocks=14, max_running=6, max_batched_tokens=8)
    crowded = e.add([1, 2, 3], params)
    for i, p in enumerate(prompts(6, seed=5)):
        e.step()
        e.add(p, SamplingParams(temperature=0.8, max_tokens=12), priority=-1)
    run(e)
    assert sum(a.preemptions for a in crowded) > 0
    assert [a.generated for a in crowded] == [a.generated for a in lone]


def test_without_seeds_an_engine_still_repeats_itself_but_not_from_request_to_request():
    params = SamplingParams(temperature=1.0, max_tokens=8)
    runs = []
    for _ in range(2):
        e = engine()
        given = [e.add([1, 2], params)[0] for _ in range(2)]
        run(e)
        runs.append([a.generated for a in given])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_a_stop_token_ends_its_own_row_only():
    prompt, other = [5, 6, 7], [8, 9]
    plain = alone(prompt, 10)
    stop = plain[4]
    e = engine()
    a, b = e.add(prompt, SamplingParams(max_tokens=10, stop_tokens=(stop,)))[0], e.add(other, SamplingParams(max_tokens=10))[0]
    run(e)
    assert a.generated == plain[:plain.index(stop) + 1] and a.finish_reason == "stop"
    assert b.generated == alone(other, 10) and b.finish_reason == "length"


def test_stop_strings_and_text():
    letters = SimpleNamespace(encode=None, decode=lambda tokens: "".join(chr(65 + t) for t in tokens))
    plain = letters.decode(alone([5, 6, 7], 12))
    e = engine(tokenizer=letters)
    a, b = (e.add([5, 6, 7], SamplingParams(max_tokens=12, stop=stop))[0] for stop in ((plain[5:8],), ("never",)))
    run(e)
    assert plain.startswith(a.text) and a.text == plain[:plain.index(plain[5:8])] and a.finish_reason == "stop"
    assert b.text == plain and b.finish_reason == "length"


def test_logprobs_are_those_of_the_full_pass():
    e = engine()
    a, = e.add([5, 6, 7], SamplingParams(max_tokens=6, logprobs=2, temperature=0.7, seed=1))
    run(e)
    with torch.no_grad():
        exact = model()(torch.tensor([[5, 6, 7, *a.generated]]))[0].log_softmax(-1)
    for i, (token, found) in enumerate(zip(a.generated, a.logprobs)):
        row = exact[2 + i]
        assert set(row.topk(2).indices.tolist()) | {token} == set(found)
        assert found == pytest.approx({t: float(row[t]) for t in found}, abs=1e-12)


def test_cancelling_frees_the_blocks_with_the_next_step_and_disturbs_nobody():
    e = engine()
    a, b = e.add(range(9), SamplingParams(max_tokens=20, n=2)), e.add([4, 2], SamplingParams(max_tokens=9))
    for _ in range(3):
        e.step()
    e.cancel(a)
    e.step()
    assert e.scheduler.pool.n_free == 40 - len(b[0].blocks) and {x.finish_reason for x in a} == {"cancelled"}
    e.cancel(a)                                                    # once more does no harm
    run(e)
    assert b[0].generated == alone([4, 2], 9)


@pytest.mark.parametrize("prompt, params, words", [
    ([], {}, "prompt is empty"), ([50], {}, "token 50 is not in the vocabulary; accepted: 0 to 49"), ([-1], {}, "token -1"),
    ([1] * 64, {}, "64 tokens leaves no room"), ([1], dict(n=9, max_tokens=2), "9 samples of one prompt"), ([1], dict(stop=("x",)), "tokenizer"),
    ([1] * 30, dict(max_tokens=30), "needs 15 blocks of 4, the pool has 10")])
def test_a_request_that_cannot_be_answered_is_refused_and_leaves_nothing(prompt, params, words):
    e = engine(n_blocks=10, max_running=8)
    good = e.add([1, 2], SamplingParams(max_tokens=5))[0]
    with pytest.raises(ValueError, match=words) as error:
        e.add(prompt, SamplingParams(**params))
    assert "\n" not in str(error.value)
    run(e)
    assert good.generated == alone([1, 2], 5)


def test_an_answer_ends_at_the_context():
    e = engine()
    a, = e.add([1] * 60, SamplingParams(max_tokens=100))
    run(e)
    assert len(a.generated) == 4 and a.finish_reason == "length"


class Poisoned(torch.nn.Module):
    """Token 13 turns everything that sees it into NaN."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, tokens):
        x = torch.nn.functional.embedding(tokens, self.weight)
        return x.masked_fill((tokens == 13)[..., None], float("nan"))


@pytest.mark.parametrize("kind", ["multi-query", "window", "latent"])
def test_logits_that_are_not_numbers_end_that_request_only_and_poison_no_block(kind):
    """Also not through the blocks it leaves behind, whose unused ends the next owner multiplies by zero."""
    sick = loud(Transformer(BASE.with_(**KINDS[kind]), seed=1).double())
    sick.embedding = Poisoned(sick.embedding)
    e = Engine(sick, 20, 4, max_running=5, max_batched_tokens=10)
    good = [e.add(p, SamplingParams(max_tokens=n))[0] for p, n in (([5], 1), ([6, 7, 8, 9, 10], 9), ([7, 8, 9], 9))]
    e.step()                                                       # the first is done and leaves block 0, the others decode,
    bad, = e.add([13, *range(30)], SamplingParams(max_tokens=5))   # and meanwhile this prompt takes some steps
    while not bad.finish_reason:
        e.step()
    assert bad.finish_reason == "error" and "not numbers" in bad.error and bad.generated == []
    good += [e.add(p, SamplingParams(max_tokens=6))[0] for p in ([6, 7, 8, 9, 11], [7, 8, 9, 10, 11, 12, 14, 15, 16], [3])]
    run(e)
    for a in good:
        expected = alone(a.prompt, a.max_new_tokens, kind)
        assert a.generated == expected[:[*expected, 13].index(13) + 1]              # whoever says 13 is sick from then on
    again, = e.add(bad.prompt, SamplingParams(max_tokens=5))
    run(e)
    assert again.n_cached == 0 and again.finish_reason == "error"


def test_a_tokenizer_that_fails_ends_its_own_request():
    def decode(tokens):
        if alone([1], 9)[5] in tokens:
            raise OverflowError("too much")
        return ""
    e = engine(tokenizer=SimpleNamespace(encode=None, decode=decode))
    a, b = e.add([1], SamplingParams(max_tokens=9))[0], e.add([2], SamplingParams(max_tokens=9))[0]
    run(e)
    assert a.finish_reason == "error" and a.error == "too much" and len(a.generated) < 9


@pytest.mark.parametrize("failing", ["executor.run", "_take"])
def test_a_step_that_fails_ends_who_took_part_and_leaves_the_engine_sound(failing, monkeypatch):
    """Out of memory or Ctrl-C in the middle: a copy on write is lost then, and what a block holds nobody knows."""
    e = engine(max_running=5)
    waiting = SamplingParams(max_tokens=6)
    part = e.add([3, 1, 4, 1, 5, 9], SamplingParams(n=4, max_tokens=9))
    e.step()
    owner = e.executor if failing == "executor.run" else e
    with monkeypatch.context() as broken:
        broken.setattr(owner, failing.split(".")[-1], lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            e.step()
    assert {a.finish_reason for a in part} == {"error"} and "the engine failed: KeyboardInterrupt" in part[0].error
    after, = e.add([3, 1, 4, 1, 5, 9, 2, 6], waiting)
    run(e)
    assert after.generated == alone(after.prompt, 6) and after.n_cached == 0


@pytest.mark.parametrize("kind", ["multi-query", "window", "latent"])
def test_what_a_cancelled_request_leaves_behind_poisons_nobody(kind):
    """Ended before its logits are looked at, it takes its NaN unnoticed; who gets its block next reads one row of four, padded
    to another's three."""
    sick = loud(Transformer(BASE.with_(**KINDS[kind]), seed=1).double())
    sick.embedding = Poisoned(sick.embedding)
    e = Engine(sick, 4, 4, max_running=3, max_batched_tokens=6, prefix_cache=False)
    bad = e.add([13] * 9, SamplingParams(max_tokens=3))
    e.step()
    e.cancel(bad)
    good = [e.add(p, SamplingParams(max_tokens=4))[0] for p in ([1], [3, 4, 5])]
    run(e)
    assert [a.generated for a in good] == [alone(a.prompt, 4, kind) for a in good]


def test_the_prompt_is_the_caller_s_to_change_and_must_be_integers():
    e, prompt = engine(), [1, 2, 3]
    a, = e.add(prompt, SamplingParams(max_tokens=4))
    prompt[0] = 40
    run(e)
    assert a.generated == alone([1, 2, 3], 4)
    for wrong in ([1.5] * 9, "ab", [None], 3):
        with pytest.raises(ValueError, match="give a sequence of integers"):
            e.add(wrong)


def test_a_refused_request_changes_nobody_s_draws():
    answers = []
    for refuse in (True, False):
        e = engine()
        if refuse:
            with pytest.raises(ValueError):
                e.add([50])
            with pytest.raises(ValueError):
                e.add([1] * 30, SamplingParams(n=99))
        a, = e.add([1, 2], SamplingParams(temperature=1.0, max_tokens=8))
        run(e)
        answers.append(a.generated)
    assert answers[0] == answers[1]


def test_a_tokenizer_s_end_token_stops_unless_other_stops_are_given():
    plain = alone([5, 6, 7], 12)
    e = engine(tokenizer=SimpleNamespace(encode=None, decode=lambda tokens: "", eos_token_id=plain[3]))
    ends, goes_on = (e.add([5, 6, 7], SamplingParams(max_tokens=12, stop_tokens=stops))[0] for stops in (None, ()))
    run(e)
    assert ends.generated == plain[:plain.index(plain[3]) + 1] and ends.finish_reason == "stop" and goes_on.generated == plain


def test_nothing_to_do_is_no_step():
    e = engine()
    assert e.step() == [] and e.steps == 0 and not e.work


def rerun(call):
    """What `capture` makes of a call, without a GPU: (replay, a result that every replay writes anew)."""
    result = call().clone()
    return lambda: result.copy_(call()), result


def test_decode_by_recorded_batches_of_powers_of_two_gives_the_same_answers():
    """The seats, tables and lengths of the graphs, replayed by calling the model again."""
    e, buckets = engine(max_running=7), []
    graphs = DecodeGraphs(e.executor.model, e.executor.pages, e.executor.spare, lambda call: (buckets.append(1), rerun(call))[1])
    e.executor.graphs = graphs
    asked = [(p, 2 + i) for i, p in enumerate(prompts(9))]
    given = [e.add(p, SamplingParams(max_tokens=n))[0] for p, n in asked]
    run(e)
    assert [a.generated for a in given] == [alone(p, n) for p, n in asked]
    assert {seats for seats, _ in graphs.recorded} == {1, 2, 4, 8} and len(buckets) == len(graphs.recorded) <= 6


def test_a_cache_may_be_narrower_than_the_model():
    e = engine(cache_dtype=torch.float32)
    assert e.executor.pages.pools[0].dtype == torch.float32
    a, = e.add([1, 2, 3], SamplingParams(max_tokens=9))
    run(e)
    assert a.generated == alone([1, 2, 3], 9)                      # the margins of these logits are far above fp32's rounding


def test_text_is_what_the_tokens_say():
    bytes_model = Transformer(BASE.with_(vocab_size=256), seed=1).double()
    e = Engine(bytes_model, 40, 4, tokenizer=Bytes())
    a, = e.add(Bytes().encode("hello"), SamplingParams(max_tokens=12, temperature=2.0, seed=0))
    run(e)
    assert a.text == bytes(a.generated).decode(errors="replace")
