"""What speculative decoding gains. Leviathan et al. 2023, arXiv:2211.17192, section 3."""

from __future__ import annotations


def expected_tokens(acceptance: float, n_draft: int) -> float:
    """Tokens one verification yields: (1 - a^(g+1)) / (1 - a), always at least one."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance={acceptance!r} is not accepted; give a probability between 0 and 1")
    return n_draft + 1 if acceptance == 1 else (1 - acceptance ** (n_draft + 1)) / (1 - acceptance)


def speed_up(acceptance: float, n_draft: int, draft_cost: float) -> float:
    """Against plain decoding, when a draft step costs `draft_cost` of a target step and verifying costs one."""
    return expected_tokens(acceptance, n_draft) / (1 + n_draft * draft_cost)
