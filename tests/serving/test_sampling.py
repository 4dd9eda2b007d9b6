"""Sampling: the distribution of each row against transformers' own, and the same draws alone and in a crowd."""

import dataclasses
import random

import pytest
import torch
from transformers.generation import logits_process as theirs

from gpt4lib.serving.sampling import SamplingParams, choose, penalised, probabilities

LOGITS = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expected(logits, p):
    """What transformers leaves of one row, as probabilities."""
    steps = [theirs.TemperatureLogitsWarper(float(p.temperature))]
    steps += [theirs.TopKLogitsWarper(p.top_k)] if p.top_k else []
    steps += [theirs.TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
    steps += [theirs.MinPLogitsWarper(p.min_p)] if p.min_p else []
    for step in steps:
        logits = step(None, logits)
    return logits.softmax(-1)


CUTS = [dict(), dict(top_k=5), dict(top_k=1), dict(top_k=1000), dict(top_p=0.8), dict(top_p=1e-9), dict(min_p=0.1), dict(min_p=1.0),
        dict(top_k=7, top_p=0.9, min_p=0.05), dict(top_k=3, top_p=0.5)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_each_row_is_what_transformers_leaves_of_it(cut, temperature):
    p = SamplingParams(temperature=temperature, **cut)
    torch.testing.assert_close(probabilities(LOGITS, [p] * 6), expected(LOGITS, p), rtol=1e-12, atol=1e-15)


def test_a_row_does_not_see_its_neighbours():
    params = [SamplingParams(temperature=0.5 + i % 3, **CUTS[i]) if i % 4 else SamplingParams() for i in range(6)]
    together = probabilities(LOGITS, params)
    for i, p in enumerate(params):
        torch.testing.assert_close(together[i:i + 1], probabilities(LOGITS[i:i + 1], [p]), rtol=1e-14, atol=0)


def test_temperature_zero_is_the_one_hot_row_of_the_first_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    assert probabilities(logits, [SamplingParams()] * 2).tolist() == [[0, 1, 0], [1, 0, 0]]
    mixed = probabilities(logits, [SamplingParams(), SamplingParams(temperature=1.0)])
    assert mixed[0].tolist() == [0, 1, 0] and mixed[1].min() > 0


def test_top_k_leaves_k_even_among_equals():
    p = probabilities(torch.zeros(1, 8), [SamplingParams(temperature=1.0, top_k=3)])
    assert p.tolist() == [pytest.approx([1 / 3] * 3 + [0] * 5)]


def test_half_precision_is_sampled_in_fp32():
    p = probabilities(LOGITS.bfloat16(), [SamplingParams(temperature=1.0)] * 6)
    assert p.dtype == torch.float32 and torch.allclose(p.sum(-1), torch.ones(6))


def test_the_repetition_penalty_is_transformers_own():
    seen, penalty = [[1, 5, 5, 9], [0], list(range(40)), [3], [2, 2], [39]], [1.3, 2.0, 1.1, 1.0, 0.7, 1.5]
    mask = torch.tensor([[t in tokens for t in range(40)] for tokens in seen])
    ours = penalised(LOGITS, mask, penalty)
    for row, tokens, p in zip(range(6), seen, penalty):
        peer = theirs.RepetitionPenaltyLogitsProcessor(p)(torch.tensor([tokens]), LOGITS[row:row + 1].clone())
        torch.testing.assert_close(ours[row:row + 1], peer, rtol=0, atol=0)


def test_a_token_is_chosen_as_often_as_it_is_likely():
    """100,000 draws: a share's standard deviation is at most 0.0016, five of them are allowed."""
    p = probabilities(LOGITS[:1], [SamplingParams(temperature=1.5, top_k=10)])
    dice = random.Random(1)
    drawn = choose(p.expand(100_000, -1), [dice.random() for _ in range(100_000)])
    share = torch.bincount(drawn, minlength=40) / 1e5
    assert (share - p[0]).abs().max() < 0.008 and (share[p[0] == 0] == 0).all()


@pytest.mark.parametrize("row", [[0, 0.5, 0, 0.5, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
def test_the_ends_of_the_range_never_choose_what_is_impossible(row):
    p = torch.tensor([row])
    for u in (0.0, 0.5, 1 - 2**-53):                    # in fp32 the last is 1
        assert row[int(choose(p, [u]))] > 0


@pytest.mark.parametrize("name, value", [
    ("temperature", -1.0), ("temperature", float("nan")), ("temperature", "1"), ("temperature", float("inf")), ("top_k", 0),
    ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("max_tokens", 0), ("n", 0),
    ("logprobs", -1), ("stop", "end"), ("stop", ("",)), ("stop_tokens", 3), ("stop_tokens", ("a",)), ("top_k", 2.0), ("seed", 1.5)])
def test_a_bad_parameter_is_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value) and repr(value) in str(error.value)


def test_parameters_are_a_value():
    assert dataclasses.replace(SamplingParams(), seed=1) != SamplingParams() and hash(SamplingParams()) == hash(SamplingParams())
