"""Loss from parameters and tokens. Hoffmann et al. 2022, arXiv:2203.15556, section 3.3, equation 10.

The constants are those the paper prints; its own two other methods put more tokens to a parameter (about 20),
and Besiroglu et al. 2024, arXiv:2404.10102, trace the gap to the fit of these five numbers.
"""

from __future__ import annotations

E_LOSS, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def loss(n_parameters, n_tokens):
    """Predicted loss in nats a token of a dense model, as printed in the paper."""
    return E_LOSS + A / n_parameters ** ALPHA + B / n_tokens ** BETA


def optimal(flop):
    """(parameters, tokens) with the lowest predicted loss at 6 N D = flop; equation 4 of the paper."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n = g * (flop / 6) ** (BETA / (ALPHA + BETA))
    return n, flop / 6 / n
