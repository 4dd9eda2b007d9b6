"""The problems of the chapters: right answers pass, wrong ones are told how wrong they are."""

import pytest

from gpt4lib.problems import EXPECTED, PROBLEMS, check


def test_every_hint_has_its_answer():
    assert list(PROBLEMS) == list(EXPECTED)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_expected_answer_is_accepted_and_double_is_not(problem):
    expected = PROBLEMS[problem].expected()
    assert "✓" in check(problem, expected)
    assert "✗" in check(problem, 2 * expected)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_empty_answer_gives_the_hint(problem):
    assert PROBLEMS[problem].hint in check(problem)


def test_a_wrong_answer_is_told_by_how_much():
    assert "1e+03 times" in check("1.1", 1000 * PROBLEMS["1.1"].expected())
    assert "+10.00%" in check("1.3", 1.1 * PROBLEMS["1.3"].expected())


def test_zero_and_negative_answers_are_wrong_not_a_crash():
    assert "✗" in check("1.2", 0)
    assert "✗" in check("1.2", -5.0)


def test_an_unknown_problem_is_named():
    with pytest.raises(ValueError, match="'9.9' does not exist"):
        check("9.9")
