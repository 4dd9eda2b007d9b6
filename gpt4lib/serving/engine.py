"""The engine: a scheduler, a model and a sampler in conversation, one step at a time."""

from __future__ import annotations

import operator
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Callable, Sequence as Tokens

import torch
from torch import Tensor

from gpt4lib.nn.transformer import Transformer
from gpt4lib.serving import sampling
from gpt4lib.serving.block_pool import BlockPool
from gpt4lib.serving.executor import Executor
from gpt4lib.serving.sampling import SamplingParams
from gpt4lib.serving.scheduler import Scheduler, Step
from gpt4lib.serving.sequence import Sequence
from gpt4lib.serving.text import TextStream, Tokenizer
from gpt4lib.specs.checks import require


@dataclass(eq=False, slots=True)
class Answer(Sequence):
    """A sequence as its reader sees it: its parameters, its own random numbers, its text. `error` says what went wrong."""
    params: SamplingParams = SamplingParams()
    rng: random.Random = field(default_factory=random.Random)
    stops: frozenset[int] = frozenset()
    stream: TextStream | None = None
    seen: Tensor | None = None                                           # bool [vocab_size], for the repetition penalty
    logprobs: list[dict[int, float]] = field(default_factory=list)       # of each token: its own and the likeliest ones'
    error: str | None = None

    @property
    def text(self) -> str:
        return self.stream.text if self.stream else ""


class Engine:
    """Serves a model: call `add` at any time and `step` while there is `work`.

    n_blocks of block_size tokens hold all keys and values; the scheduler's options are passed on to it. `add` and `cancel`
    may be called while another thread is in `step`: they count from the next one. `on_step`, when set, is shown every step
    before it is computed.
    """

    def __init__(self, model: Transformer, n_blocks: int, block_size: int = 16, max_running: int = 64, seed: int = 0,
                 tokenizer: Tokenizer | None = None, cache_dtype: torch.dtype | None = None, **scheduler) -> None:
        self.spec, self.tokenizer = model.spec, tokenizer
        self.scheduler = Scheduler(BlockPool(n_blocks, block_size), max_running, **scheduler)
        self.executor = Executor(model, n_blocks, block_size, cache_dtype)
        self.steps = 0
        self.on_step: Callable[[Step], None] | None = None
        self._seeds = random.Random(seed)
        self._inbox: deque[Callable[[], None]] = deque()                 # what to do between two steps

    @property
    def work(self) -> bool:
        return bool(self._inbox or self.scheduler.waiting or self.scheduler.running)

    def add(self, prompt: Tokens[int], params: SamplingParams = SamplingParams(), priority: int = 0) -> list[Answer]:
        """Queue a request: its n answers, which the coming steps fill. Raises ValueError, one line, for what can never be
        answered; the others do not notice."""
        context, vocab = self.spec.context, self.spec.vocab_size
        try:
            prompt = [operator.index(t) for t in prompt]
        except TypeError:
            raise ValueError(f"prompt={prompt!r:.60} is not accepted; give a sequence of integers") from None
        require(len(prompt) < context, f"a prompt of {len(prompt)} tokens leaves no room for an answer in context={context}; "
                                       f"shorten it")
        bad = next((t for t in prompt if not 0 <= t < vocab), None)
        require(bad is None, f"token {bad} is not in the vocabulary; accepted: 0 to {vocab - 1}")
        require(not params.stop or self.tokenizer, "stop strings need a tokenizer; give the engine one, or use stop_tokens")
        end = getattr(self.tokenizer, "eos_token_id", None)
        stops = frozenset(params.stop_tokens if params.stop_tokens is not None else () if end is None else (end,))
        answers = [Answer(prompt, min(params.max_tokens, context - len(prompt)), priority, params=params, stops=stops,
                          stream=self.tokenizer and TextStream(self.tokenizer, params.stop)) for _ in range(params.n)]
        first, *first.forks = answers
        self.scheduler.check(first)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        for i, answer in enumerate(answers):
            answer.rng = random.Random(f"{seed}/{i}")
        self._inbox.append(lambda: self.scheduler.add(first))
        return answers

    def cancel(self, answers: list[Answer]) -> None:
        """End a request where it is. Nothing happens to answers that are finished."""
        def end() -> None:
            for answer in answers:
                if not answer.finish_reason:
                    self.scheduler.finish(answer, "cancelled")
        if not all(answer.finish_reason for answer in answers):
            self._inbox.append(end)

    def step(self) -> list[Answer]:
        """One pass of the model; the answers that got a token, or an error, in it.

        When the pass itself fails, for lack of memory or by Ctrl-C, all that took part in it end with an error, for nobody
        knows what their blocks hold, and the exception goes on.
        """
        while self._inbox:
            self._inbox.popleft()()
        step = self.scheduler.schedule()
        if not step.work:
            return []
        self.steps += 1
        part = [a for w in step.work for a in (w.sequence, *w.sequence.forks)]
        try:
            if self.on_step:
                self.on_step(step)
            logits = self.executor.run(step)
            groups = self.scheduler.advance(step)
            answers = [a for group in groups for a in group]
            if answers:
                rows = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=logits.device)
                self._take(answers, logits[rows])
        except BaseException as error:
            for answer in part:
                if not answer.finish_reason:
                    self._fail(answer, f"the engine failed: {str(error) or type(error).__name__}")
            raise
        return answers

    def _take(self, answers: list[Answer], logits: Tensor) -> None:
        """Give each answer its next token, from logits [answers, vocab_size]."""
        logits, params = logits.to(torch.promote_types(logits.dtype, torch.float32)), [a.params for a in answers]
        bad = logits.isnan().any(-1) | logits.max(-1).values.isinf()
        logits, raw = logits.masked_fill(bad[:, None], 0), logits
        if penalised := [i for i, p in enumerate(params) if p.repetition_penalty != 1]:
            seen = torch.stack([self._seen(answers[i]) for i in penalised])
            logits[penalised] = sampling.penalised(logits[penalised], seen, [params[i].repetition_penalty for i in penalised])
        chosen = sampling.choose(sampling.probabilities(logits, params), [a.rng.random() for a in answers])
        likely = self._logprobs(raw, chosen, params)
        for answer, token, failed, found in zip(answers, chosen.tolist(), bad.tolist(), likely):
            try:
                require(not failed, "the model's logits are not numbers; look at its weights, or use a wider dtype")
                self._append(answer, token, found)
            except Exception as error:                     # one request's trouble, be it in a caller's tokenizer, is its own
                self._fail(answer, str(error) or type(error).__name__)

    def _seen(self, answer: Answer) -> Tensor:
        if answer.seen is None:
            answer.seen = torch.zeros(self.spec.vocab_size, dtype=torch.bool, device=self.executor.pages.device)
            answer.seen[torch.tensor(answer.prompt, device=answer.seen.device)] = True
        return answer.seen

    @staticmethod
    def _logprobs(logits: Tensor, chosen: Tensor, params: Tokens[SamplingParams]) -> list[dict[int, float] | None]:
        """Where asked for, the log-probability of the chosen token and of the likeliest."""
        most = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        if most is None:
            return [None] * len(params)
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(min(most, logits.shape[1]))
        own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        return [None if p.logprobs is None else {**dict(list(zip(t, v))[:p.logprobs]), token: x}
                for p, t, v, token, x in zip(params, tokens.tolist(), values.tolist(), chosen.tolist(), own)]

    def _append(self, answer: Answer, token: int, logprobs: dict[int, float] | None) -> None:
        stop = token in answer.stops
        if answer.stream and not stop:
            stop = answer.stream.add(token)
        if answer.stream and (stop or len(answer.generated) + 1 == answer.max_new_tokens):
            answer.stream.flush()
        if logprobs is not None:
            answer.logprobs.append(logprobs)
        if answer.seen is not None:
            answer.seen[token] = True
        self.scheduler.append(answer, token, "stop" if stop else None)

    def _fail(self, answer: Answer, error: str) -> None:
        """End one answer; nobody finds the content of its blocks again."""
        answer.error = error
        for block in answer.blocks:
            self.scheduler.pool.forget(block)
        self.scheduler.finish(answer, "error")
