"""From logits to tokens: one exact distribution a row, and one uniform number to choose from it.

A row depends on its own logits, parameters and number only, so a request draws the same tokens alone and in a crowd.
"""

import math
from dataclasses import dataclass
from typing import Collection, Sequence

import torch
from torch import Tensor

from gpt4lib.specs.checks import require, require_counts


@dataclass(frozen=True)
class SamplingParams:
    """How one request is answered. temperature 0 takes the likeliest token; top_k, top_p and min_p leave the k likeliest,
    the fewest that together reach p, and those at least min_p times as likely as the likeliest (None, 1 and 0: all);
    repetition_penalty > 1 makes tokens seen before less likely (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
    max_tokens, stop_tokens (None: the tokenizer's eos_token_id, if it has one) and stop (strings) end the answer; n answers
    share the prompt's cache; logprobs asks for the logarithms of that many likeliest tokens' probabilities before any of
    this. From the same logits the same seed draws the same tokens; logits of fp32 and less differ in their last bits with
    what else is in the batch.
    """
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 128
    stop_tokens: Collection[int] | None = None
    stop: Collection[str] = ()
    n: int = 1
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, accepted in (("temperature", lambda x: 0 <= x < math.inf, "a finite number >= 0"),
                                     ("top_p", lambda x: 0 < x <= 1, "a number above 0, at most 1"),
                                     ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1"),
                                     ("repetition_penalty", lambda x: 0 < x < math.inf, "a finite number > 0")):
            value = getattr(self, name)
            require(type(value) in (int, float) and good(value), f"{name}={value!r} is not accepted; give {accepted}")
        require_counts(self, 1, "max_tokens", "n", *(["top_k"] if self.top_k is not None else []))
        require_counts(self, 0, *(["logprobs"] if self.logprobs is not None else []))
        require(self.seed is None or type(self.seed) is int, f"seed={self.seed!r} is not accepted; give an integer, or None")
        require(not isinstance(self.stop, str) and all(type(s) is str and s for s in self.stop),
                f"stop={self.stop!r} is not accepted; give a collection of strings that are not empty")
        require(self.stop_tokens is None or not isinstance(self.stop_tokens, (str, int)) and all(type(t) is int for t in self.stop_tokens),
                f"stop_tokens={self.stop_tokens!r} is not accepted; give a collection of token ids")

    @property
    def cuts(self) -> bool:
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


def penalised(logits: Tensor, seen: Tensor, penalty: Sequence[float]) -> Tensor:
    """logits [rows, vocab_size] with the repetition penalty of each row where seen, bool of the same shape, is set."""
    column = logits.new_tensor(penalty)[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / column, logits * column), logits)


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What each row is drawn from: logits [rows, vocab_size] -> the same shape, at least fp32, each row's sum 1.

    Temperature, then top_k, top_p and min_p, in that order, each over what the one before has left, as transformers has
    it; ties are cut by token id. Temperature 0 is the one-hot row of the likeliest token, the first of equals.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = logits.new_tensor([[p.temperature] for p in params])
    greedy = column == 0
    one_hot = torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1)
    if greedy.all():
        return one_hot
    top = logits.max(-1, keepdim=True).values
    p = ((logits - top) / torch.where(greedy, 1, column)).softmax(-1)
    if any(q.cuts for q in params):
        p = _cut(p, params)
    return torch.where(greedy, one_hot, p)


def _cut(p: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    size = p.shape[1]
    top_k, top_p, min_p = (p.new_tensor([[value] for value in column])
                           for column in zip(*((min(q.top_k or size, size), q.top_p, q.min_p) for q in params)))
    values, order = p.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(size, device=p.device) < top_k
    values = values * kept
    values = values / values.sum(-1, keepdim=True)
    kept &= (values.cumsum(-1) - values < top_p) | (top_p == 1)               # what stands before has not reached p
    kept &= values >= min_p * values[:, :1]
    values = values * kept
    return torch.zeros_like(p).scatter_(1, order, values / values.sum(-1, keepdim=True))


def choose(p: Tensor, uniform: Sequence[float]) -> Tensor:
    """The token of each row, int64 [rows]: the first whose cumulated probability exceeds the row's number in [0, 1).

    A token of probability 0 is never chosen.
    """
    total = p.cumsum(-1)
    number = p.new_tensor(uniform)[:, None] * total[:, -1:]
    token = torch.searchsorted(total, number, right=True)[:, 0]
    last = p.shape[1] - 1 - (p.flip(-1) > 0).to(torch.uint8).argmax(-1)      # rounding must not lead past it
    return torch.minimum(token, last)
