"""Loss from parameters and tokens. Hoffmann et al. 2022, arXiv:2203.15556, equation 10.

The constants are those the paper prints. They ask for some 90 tokens a parameter at Chinchilla's
budget, where its two other methods, and Chinchilla itself, have 20; Besiroglu et al. 2024,
arXiv:2404.10102, refit the data and find about 20 by this method too.
"""

from __future__ import annotations

E_LOSS, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def loss(n_parameters, n_tokens):
    """Predicted loss in nats a token of a dense model, as printed in the paper."""
    return E_LOSS + A / n_parameters ** ALPHA + B / n_tokens ** BETA


def optimal(flop):
    """(parameters, tokens) with the lowest predicted loss at 6 N D = flop; equation 4."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n = g * (flop / 6) ** (BETA / (ALPHA + BETA))
    return n, flop / 6 / n
