"""The front door: many prompts at once, and streams side by side."""

import asyncio
import time

import pytest
import torch

from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.llm import LLM
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.specs import LatentAttention, ModelSpec

SPEC = ModelSpec("bytes", n_layers=2, d_model=24, n_heads=4, head_dim=6, n_kv_heads=1, d_ff=40, vocab_size=256, context=64, tied=False)
MODEL = Transformer(SPEC, seed=1).double()
with torch.no_grad():
    for weight in MODEL.parameters():
        if weight.dim() > 1:
            weight.mul_(12)


def llm(**options):
    return LLM(MODEL, block_size=4, **options)


def alone(prompt, n):
    tokens = list(prompt.encode())
    return MODEL.generate(torch.tensor([tokens]), n)[0, len(tokens):].tolist()


def test_text_in_text_out_in_the_order_of_the_prompts():
    texts = ["one", "a longer prompt", "x"]
    outputs = llm(max_running=2).generate(texts, [SamplingParams(max_tokens=n) for n in (9, 3, 5)])
    assert [o.answers[0].generated for o in outputs] == [alone(t, n) for t, n in zip(texts, (9, 3, 5))]
    assert [o.prompt for o in outputs] == texts
    assert all(o.answers[0].text == bytes(o.answers[0].generated).decode(errors="replace") for o in outputs)


def test_a_bad_prompt_has_its_error_and_the_others_their_answers():
    outputs = llm().generate(["good", "", [300], "x" * 70, "fine"], SamplingParams(max_tokens=4))
    assert [bool(o.error) for o in outputs] == [False, True, True, True, False]
    assert "prompt is empty" in outputs[1].error and "token 300" in outputs[2].error and "context=64" in outputs[3].error
    assert outputs[4].answers[0].generated == alone("fine", 4)


def test_n_answers_to_a_prompt():
    (output,) = llm().generate(["so"], SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=5))
    assert len(output.answers) == 3 and {a.finish_reason for a in output.answers} == {"length"}


def test_the_bar_counts_answers(capsys):
    llm().generate(["a", "b"], SamplingParams(max_tokens=2, n=2), progress=True)
    assert "4/4" in capsys.readouterr().err
    llm().generate(["a"], SamplingParams(max_tokens=2))
    assert capsys.readouterr().err == ""                           # not a terminal


@pytest.mark.parametrize("latent", [None, LatentAttention(q_rank=None, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=6)])
def test_the_cache_takes_its_bytes_and_no_more(latent):
    for kv_bytes in (20_000, 1e6):
        engine = LLM(Transformer(SPEC.with_(latent=latent)), kv_bytes=kv_bytes, block_size=4, max_running=2).engine
        held = sum(pool.nbytes for pool in engine.executor.pages.pools)
        assert 0.9 * kv_bytes < held <= kv_bytes


@pytest.mark.parametrize("act, words", [
    (lambda: llm(kv_bytes=100), "kv_bytes=100 holds no block"),
    (lambda: llm().generate("text"), "give a list of prompts"),
    (lambda: llm().generate(["a", "b"], [SamplingParams()]), "1 params for 2 prompts")])
def test_misuse_is_named(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def test_text_without_a_tokenizer_is_that_prompt_s_error():
    model = Transformer(SPEC.with_(vocab_size=50))
    outputs = LLM(model).generate(["text", [1, 2]], SamplingParams(max_tokens=2))
    assert "needs a tokenizer" in outputs[0].error and len(outputs[1].answers[0].generated) == 2


async def collect(door, prompt, params, stop_after=None):
    pieces = []
    stream = door.stream(prompt, params)
    async for piece in stream:
        pieces.append(piece)
        if stop_after and len(pieces) == stop_after:
            await stream.aclose()
            break
    return pieces


def test_streams_run_side_by_side_and_leaving_one_cancels_it():
    async def main():
        door = llm(max_running=4)
        results = await asyncio.gather(
            collect(door, "first", SamplingParams(max_tokens=20)), collect(door, "second", SamplingParams(max_tokens=9)),
            collect(door, "left", SamplingParams(max_tokens=40), stop_after=3))
        late = await collect(door, "late", SamplingParams(max_tokens=5))       # after the engine had gone to sleep
        return door, *results, late

    door, first, second, left, late = asyncio.run(main())
    for pieces, prompt, n in ((first, "first", 20), (second, "second", 9), (late, "late", 5)):
        assert [t for p in pieces for t in p.tokens] == alone(prompt, n)
        assert "".join(p.text for p in pieces) == bytes(alone(prompt, n)).decode(errors="replace")
        assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish_reason == "length"
    assert len(left) == 3 and len(first) > 10                      # token by token, not all at the end
    pool = door.engine.scheduler.pool
    assert not door.engine.work and pool.n_free == pool.n_blocks and not door._readers


def test_several_answers_stream_together():
    pieces = asyncio.run(collect(llm(), "so", SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=6)))
    (output,) = llm().generate(["so"], SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=6))
    for i, answer in enumerate(output.answers):
        assert [t for p in pieces if p.index == i for t in p.tokens] == answer.generated


def test_a_stream_that_cannot_be_answered_says_so():
    with pytest.raises(ValueError, match="prompt is empty"):
        asyncio.run(collect(llm(), "", SamplingParams()))


def test_when_a_step_fails_every_stream_in_it_is_told_and_the_next_is_served():
    async def main():
        door = llm(max_running=2)
        run, door.engine.executor.run = door.engine.executor.run, lambda step: 1 / 0
        both = await asyncio.gather(*(collect(door, p, SamplingParams(max_tokens=5)) for p in "abc"), return_exceptions=True)
        door.engine.executor.run = run
        return both, await collect(door, "next", SamplingParams(max_tokens=4))

    both, after = asyncio.run(main())
    assert all(isinstance(e, RuntimeError) and "the engine failed: division by zero" in str(e) for e in both)
    assert [t for p in after for t in p.tokens] == alone("next", 4)


def slow(door, seconds=0.02):
    """Steps long enough for anything to happen meanwhile."""
    run = door.engine.executor.run
    door.engine.executor.run = lambda step: (time.sleep(seconds), run(step))[1]
    return door


def test_a_stream_cancelled_again_and_again_in_the_middle_of_a_step_leaves_nothing():
    async def main():
        door = slow(llm())
        tasks = [asyncio.create_task(collect(door, p, SamplingParams(max_tokens=30))) for p in ("left", "stays")]
        await asyncio.sleep(0.05)
        for _ in range(3):
            tasks[0].cancel()
            await asyncio.sleep(0)
        pieces = await tasks[1]
        assert tasks[0].cancelled()
        return door, pieces

    door, pieces = asyncio.run(main())
    assert [t for p in pieces for t in p.tokens] == alone("stays", 30)
    assert not door.engine.work and door.engine.scheduler.pool.n_free == door.engine.scheduler.pool.n_blocks and not door._readers


def test_a_loop_that_ends_in_the_middle_leaves_a_door_that_another_can_use():
    door = slow(llm())

    async def hasty():
        task = asyncio.create_task(collect(door, "left", SamplingParams(max_tokens=30)))
        await asyncio.sleep(0.05)
        task.cancel()

    async def later():
        return await asyncio.gather(*(collect(door, p, SamplingParams(max_tokens=6)) for p in ("one", "two")))

    asyncio.run(hasty())
    for pieces, p in zip(asyncio.run(later()), ("one", "two")):
        assert [t for piece in pieces for t in piece.tokens] == alone(p, 6)
    assert not door.engine.work


def test_a_slow_reader_gets_every_token_and_its_whole_text():
    async def main():
        door, pieces = llm(), []
        async for piece in door.stream("slow", SamplingParams(max_tokens=12, stop=["never"])):
            await asyncio.sleep(0.01)                              # the engine goes on meanwhile, and ends
            pieces.append(piece)
        return pieces

    pieces = asyncio.run(main())
    assert [t for p in pieces for t in p.tokens] == alone("slow", 12)
    assert "".join(p.text for p in pieces) == bytes(alone("slow", 12)).decode(errors="replace")


def test_generate_is_refused_beside_open_streams():
    async def main():
        door = llm()
        stream = door.stream("a", SamplingParams(max_tokens=9))
        await anext(stream)
        with pytest.raises(ValueError, match="beside open streams"):
            door.generate(["b"])
        await stream.aclose()
    asyncio.run(main())


def test_what_a_tokenizer_raises_is_that_prompt_s_error():
    outputs = llm().generate(["good", ["a"], 3, [1.5]], SamplingParams(max_tokens=3))
    assert [bool(o.error) for o in outputs] == [False, True, True, True] and outputs[0].answers[0].generated == alone("good", 3)


def test_after_an_interruption_nothing_of_it_goes_on():
    door, steps = llm(max_running=2), iter(range(3))
    run = door.engine.executor.run

    def interrupted(step):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return run(step)

    door.engine.executor.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        door.generate(["a", "b", "c", "d"], SamplingParams(max_tokens=20))
    door.engine.executor.run = run
    (output,) = door.generate(["e"], SamplingParams(max_tokens=5))
    assert output.answers[0].generated == alone("e", 5) and door.engine.steps < 12 and not door.engine.work
