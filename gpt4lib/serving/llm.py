"""The front door: prompts in, answers out, all at once or as they come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import AsyncIterator, Callable, NamedTuple, Sequence

from tqdm import tqdm

from gpt4lib.nn.cache import Pages
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
    """What is new in one answer of a stream; `finish_reason` says why it was the last piece."""
    index: int
    tokens: list[int]
    text: str
    finish_reason: str | None


class LLM:
    """A model ready to serve. kv_bytes is the memory of the key/value cache, allocated at once; the rest goes to `Engine`.

    Text needs a tokenizer: anything with encode and decode; a model of 256 tokens is taken to speak bytes. Latent attention and
    sinks are computed one sequence at a time.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, kv_bytes: float = 2**28, block_size: int = 16,
                 **engine) -> None:
        if tokenizer is None and model.spec.vocab_size == VOCAB_SIZE:
            tokenizer = Bytes()
        block_bytes = Pages.page_bytes(model.spec, block_size, engine.get("cache_dtype") or next(model.parameters()).dtype)
        n_blocks = int(kv_bytes // block_bytes) - 1                            # one is the executor's
        require(n_blocks > 0, f"kv_bytes={kv_bytes:.0f} holds no block; give at least {2 * block_bytes}, two blocks of {block_size} tokens")
        self.engine = Engine(model, n_blocks, block_size, tokenizer=tokenizer, **engine)
        self._readers: dict[Answer, Callable[[], None]] = {}                   # answer -> hand on what is new in it
        self._driver: asyncio.Task | None = None

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        require(self.engine.tokenizer, "a prompt of text needs a tokenizer; give LLM one, or give token ids")
        return self.engine.tokenizer.encode(prompt)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
                 progress: bool | None = None) -> list[Output]:
        """Answer all prompts, in order; params for all or for each. progress None shows a bar on a terminal.

        A prompt that cannot be answered has its `error`, and the others do not notice. Not while streams are open.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        require(not isinstance(prompts, str) and len(each) == len(prompts),
                f"{len(each)} params for {len(prompts)} prompts; give a list of prompts, and one for all or one for each")
        require(self._driver is None or self._driver.done(), "generate cannot run beside open streams; stream these prompts too")
        outputs = [Output(prompt) for prompt in prompts]
        try:
            for output, p in zip(outputs, each):
                try:
                    output.answers = self.engine.add(self._encode(output.prompt), p)
                except Exception as error:                 # also what a tokenizer may raise
                    output.error = str(error) or type(error).__name__
            mine = {a for output in outputs for a in output.answers}
            with tqdm(total=len(mine), unit="answers", disable=None if progress is None else not progress) as bar:
                while not all(a.finish_reason for a in mine):
                    bar.update(sum(1 for a in self.engine.step() if a.finish_reason and a in mine))
        finally:                                           # after Ctrl-C nothing of this goes on in the next call
            self.engine.cancel([a for output in outputs for a in output.answers])
        return outputs

    async def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams(), priority: int = 0) -> AsyncIterator[Piece]:
        """The answers to one prompt, piece by piece, beside any number of other streams. Leaving the loop cancels them.

        Raises ValueError where the prompt cannot be answered, RuntimeError where an answer fails.
        """
        answers = self.engine.add(self._encode(prompt), params, priority)
        pieces: asyncio.Queue[tuple[Piece, str | None]] = asyncio.Queue()
        for i, answer in enumerate(answers):
            self._readers[answer] = self._reader(i, answer, pieces)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            unfinished = len(answers)
            while unfinished:
                piece, error = await pieces.get()
                if error:
                    raise RuntimeError(error)
                unfinished -= piece.finish_reason is not None
                yield piece
        finally:
            for answer in answers:
                self._readers.pop(answer, None)
            self.engine.cancel(answers)

    def _reader(self, index: int, answer: Answer, pieces: asyncio.Queue) -> Callable[[], None]:
        """A call that puts what has come since the last into `pieces`."""
        tokens = letters = 0

        def read() -> None:
            nonlocal tokens, letters
            piece = Piece(index, answer.generated[tokens:], answer.text[letters:], answer.finish_reason)
            tokens, letters = len(answer.generated), len(answer.text)
            if piece.tokens or piece.finish_reason:
                pieces.put_nowait((piece, answer.error))
            if piece.finish_reason:
                del self._readers[answer]
        return read

    async def _drive(self) -> None:
        """Step the engine in a thread as long as anybody reads, and read only between two steps."""
        while self._readers:
            try:
                await asyncio.to_thread(self.engine.step)
            except Exception:                              # whoever took part has it as an error of its own
                pass
            for read in list(self._readers.values()):
                read()
