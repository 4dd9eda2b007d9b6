"""The front door: prompts in, answers out, all at once or as they come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import AsyncIterator, NamedTuple, Sequence

from tqdm import tqdm

from gpt4lib.nn.data import VOCAB_SIZE
from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving.engine import Answer, Engine
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.text import Bytes, Tokenizer
from gpt4lib.specs.checks import require

Prompt = str | Sequence[int]


@dataclass
class Output:
    """What became of one prompt: its answers, or the `error` that kept it out. An answer can have an error of its own."""
    prompt: Prompt
    answers: list[Answer] = field(default_factory=list)
    error: str | None = None


class Piece(NamedTuple):
    """What is new in one answer of a stream; `finished` says why it was the last piece."""
    index: int
    tokens: list[int]
    text: str
    finished: str | None


class LLM:
    """A model ready to serve. kv_bytes bounds the memory of the key/value cache; the rest goes to `Engine`.

    Text needs a tokenizer: anything with encode and decode; a model of 256 tokens is taken to speak bytes.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, kv_bytes: float = 2**30, block_size: int = 16,
                 max_running: int = 64, **engine) -> None:
        if tokenizer is None and model.spec.vocab_size == VOCAB_SIZE:
            tokenizer = Bytes()
        spec, dtype = model.spec, engine.get("cache_dtype") or next(model.parameters()).dtype
        width = 2 * spec.kv_width if spec.latent is None else spec.latent.kv_rank + spec.latent.rope_dim
        block_bytes = spec.n_layers * width * block_size * dtype.itemsize
        useful = max_running * -(-spec.context // block_size)                  # more would never be filled
        n_blocks = min(useful, int(kv_bytes // block_bytes) - 1)               # one is the executor's
        require(n_blocks > 0, f"kv_bytes={kv_bytes:.0f} holds no block; give at least {2 * block_bytes}, two blocks of {block_size} tokens")
        self.engine = Engine(model, n_blocks, block_size, max_running, tokenizer=tokenizer, **engine)
        self._news: dict[Answer, asyncio.Event] = {}
        self._turn = asyncio.Lock()                        # to change the engine, between two of its steps
        self._driver: asyncio.Task | None = None

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        require(self.engine.tokenizer, "a prompt of text needs a tokenizer; give LLM one, or give token ids")
        return self.engine.tokenizer.encode(prompt)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
                 progress: bool | None = None) -> list[Output]:
        """Answer all prompts, in order; params for all or for each. progress None shows a bar on a terminal.

        A prompt that cannot be answered has its `error`, and the others do not notice.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        require(not isinstance(prompts, str) and len(each) == len(prompts),
                f"{len(each)} params for {len(prompts)} prompts; give a list of prompts, and one for all or one for each")
        outputs = [Output(prompt) for prompt in prompts]
        for output, p in zip(outputs, each):
            try:
                output.answers = self.engine.add(self._encode(output.prompt), p)
            except ValueError as error:
                output.error = str(error)
        mine = {a for output in outputs for a in output.answers}
        with tqdm(total=len(mine), unit="answers", disable=None if progress is None else not progress) as bar:
            while not all(a.finished for a in mine):
                bar.update(sum(1 for a in self.engine.step() if a.finished and a in mine))
        return outputs

    async def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: int = 0) -> AsyncIterator[Piece]:
        """The answers to one prompt, piece by piece, beside any number of other streams. Leaving the loop cancels them.

        Raises ValueError where the prompt cannot be answered, RuntimeError where an answer fails.
        """
        async with self._turn:
            answers = self.engine.add(self._encode(prompt), params, priority)
        news = asyncio.Event()
        self._news.update(dict.fromkeys(answers, news))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        shown, open_ = [(0, 0)] * len(answers), set(range(len(answers)))
        try:
            while open_:
                await news.wait()
                news.clear()
                for i in sorted(open_):
                    answer, (tokens, letters) = answers[i], shown[i]
                    if answer.error:
                        raise RuntimeError(answer.error)
                    piece = Piece(i, answer.generated[tokens:], answer.text[letters:], answer.finished)
                    shown[i] = len(answer.generated), len(answer.text)
                    if answer.finished:
                        open_.remove(i)
                    if piece.tokens or piece.finished:
                        yield piece
        finally:
            for answer in answers:
                del self._news[answer]
            async with self._turn:
                self.engine.cancel(answers)

    async def _drive(self) -> None:
        """Step the engine, in a thread, as long as there is work."""
        while self.engine.work:
            async with self._turn:
                try:
                    answers = await asyncio.to_thread(self.engine.step)
                except Exception as error:                 # the step itself failed: every stream is told
                    answers = list(self._news)
                    for answer in answers:
                        answer.error = f"the engine failed: {error}"
                    self.engine.cancel(answers)
            for answer in answers:
                if answer in self._news:
                    self._news[answer].set()
