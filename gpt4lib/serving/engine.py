"""The engine: a scheduler, a model and a sampler in conversation, one step at a time."""

from __future__ import annotations

import random
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


@dataclass(eq=False)
class Answer(Sequence):
    """A sequence as its reader sees it: its parameters, its own random numbers, its text. `error` says what went wrong."""
    params: SamplingParams = SamplingParams()
    dice: random.Random = field(default_factory=random.Random)
    stream: TextStream | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)       # of each token: its own and the likeliest ones'
    error: str | None = None

    @property
    def text(self) -> str:
        return self.stream.text if self.stream else ""


class Engine:
    """Serves a model: `add` requests at any time, and call `step` while there is `work`.

    n_blocks of block_size tokens hold all keys and values; the scheduler's options are passed on to it. `observe`, when set,
    is shown every step before it is computed.
    """

    def __init__(self, model: Transformer, n_blocks: int, block_size: int = 16, max_running: int = 64, seed: int = 0,
                 tokenizer: Tokenizer | None = None, cache_dtype: torch.dtype | None = None, **scheduler) -> None:
        self.spec, self.tokenizer = model.spec, tokenizer
        self.scheduler = Scheduler(BlockPool(n_blocks, block_size), max_running, **scheduler)
        self.executor = Executor(model, n_blocks, block_size, cache_dtype)
        self.steps = 0
        self.observe: Callable[[Step], None] | None = None
        self._seeds = random.Random(seed)

    @property
    def work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, prompt: Tokens[int], params: SamplingParams = SamplingParams(), priority: int = 0) -> list[Answer]:
        """Queue a request: its n answers, which the coming steps fill. Raises ValueError, one line, for what can never be
        answered; the others do not notice."""
        context, vocab = self.spec.context, self.spec.vocab_size
        require(len(prompt) < context, f"a prompt of {len(prompt)} tokens leaves no room for an answer in context={context}; "
                                       f"shorten it")
        bad = next((t for t in prompt if not 0 <= t < vocab), None)
        require(bad is None, f"token {bad} is not in the vocabulary; accepted: 0 to {vocab - 1}")
        require(not params.stop or self.tokenizer, "stop strings need a tokenizer; give the engine one, or use stop_tokens")
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        answers = [Answer(prompt, min(params.max_tokens, context - len(prompt)), priority, params=params,
                          dice=random.Random(f"{seed}/{i}"), stream=self.tokenizer and TextStream(self.tokenizer, params.stop))
                   for i in range(params.n)]
        first, *first.forks = answers
        self.scheduler.add(first)
        return answers

    def cancel(self, answers: list[Answer]) -> None:
        """End a request where it is; its blocks are free at once."""
        for answer in answers:
            if not answer.finished:
                self.scheduler.finish(answer, "cancelled")

    def step(self) -> list[Answer]:
        """One pass of the model; the answers that got a token, or an error, in it."""
        step = self.scheduler.schedule()
        if not step.work:
            return []
        self.steps += 1
        if self.observe:
            self.observe(step)
        logits = self.executor.run(step)
        groups = self.scheduler.advance(step)
        answers = [a for group in groups for a in group]
        if not answers:
            return []
        rows = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=logits.device)
        self._take(answers, logits[rows])
        return answers

    def _take(self, answers: list[Answer], logits: Tensor) -> None:
        """Give each answer its next token, from logits [answers, vocab_size]."""
        params = [a.params for a in answers]
        bad = logits.isnan().any(-1) | logits.max(-1).values.isinf()
        raw = logits.log_softmax(-1) if any(p.logprobs is not None for p in params) else None
        if any(p.repetition_penalty != 1 for p in params):
            logits = sampling.penalised(logits, [a.tokens(0, a.n_tokens) for a in answers], params)
        p = sampling.probabilities(logits.masked_fill(bad[:, None], 0), params)
        tokens = sampling.choose(p, [a.dice.random() for a in answers]).tolist()
        for i, (answer, token, failed) in enumerate(zip(answers, tokens, bad.tolist())):
            try:
                require(not failed, "the model's logits are not numbers; look at its weights, or use a wider dtype")
                if answer.params.logprobs is not None:
                    best = raw[i].topk(min(answer.params.logprobs, raw.shape[1]))
                    answer.logprobs.append({**dict(zip(best.indices.tolist(), best.values.tolist())), token: float(raw[i, token])})
                self._append(answer, token)
            except Exception as error:                     # one request's trouble, be it in a caller's tokenizer, is its own
                self._fail(answer, str(error) or type(error).__name__)

    def _append(self, answer: Answer, token: int) -> None:
        stop = token in answer.params.stop_tokens
        if answer.stream and not stop:
            stop = answer.stream.add(token)
        self.scheduler.append(answer, token, "stop" if stop else None)
        if answer.stream and answer.finished:
            answer.stream.flush()

    def _fail(self, answer: Answer, error: str) -> None:
        """End one answer; nobody finds its blocks' content again, or inherits it."""
        answer.error, blocks, pool = error, answer.blocks, self.scheduler.pool
        for block in blocks:
            pool.forget(block)
        self.scheduler.finish(answer, "error")
        self.executor.clear([b for b in blocks if not pool.references(b)])
