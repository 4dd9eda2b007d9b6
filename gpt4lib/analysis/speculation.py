"""What speculative decoding gains. Leviathan et al. 2023, arXiv:2211.17192, section 3."""


def expected_tokens(acceptance, n_draft: int):
    """Tokens one verification yields, if each of n_draft guesses is accepted independently.

    The paper's (1 - a^(g+1)) / (1 - a) as the sum it is, 1 + a + ... + a^g, so that a = 1 needs no
    special case; `acceptance` may be an array. ValueError for a number that is no probability.
    """
    if isinstance(acceptance, (int, float)) and not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance={acceptance!r} is not accepted; give a probability between 0 and 1")
    return sum(acceptance ** i for i in range(n_draft + 1))


def speed_up(acceptance, n_draft: int, draft_cost):
    """Against plain decoding, when a draft step costs `draft_cost` of a target step; theorem 3.8.

    Verifying n_draft + 1 tokens is taken to cost one step. It costs more where the extra tokens
    touch more experts.
    """
    return expected_tokens(acceptance, n_draft) / (1 + n_draft * draft_cost)
