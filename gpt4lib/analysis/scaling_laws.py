"""Loss from parameters, tokens and experts, as published: each law holds inside the range it was fitted on.

Dense: Hoffmann et al. 2022, arXiv:2203.15556, equation 10. The constants are those the paper prints. They ask for some
90 tokens a parameter at Chinchilla's budget, where its two other methods, and Chinchilla itself, have 20;
Besiroglu et al. 2024, arXiv:2404.10102, refit the data and find about 20 by this method too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

E_LOSS, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def loss(n_parameters, n_tokens):
    """Predicted loss in nats a token of a dense model, as printed in the paper."""
    return E_LOSS + A / n_parameters ** ALPHA + B / n_tokens ** BETA


def optimal(flop):
    """(parameters, tokens) with the lowest predicted loss at 6 N D = flop; equation 4."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n = g * (flop / 6) ** (BETA / (ALPHA + BETA))
    return n, flop / 6 / n


class Routed(NamedTuple):
    """The law of Clark et al. 2022, arXiv:2202.01169, equations 1 and 3, for one way of routing; constants of Table 3.

    Fitted on dense bases of 15M to 1.3B parameters, one expert a token in every other layer, 130B tokens.
    """
    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float

    def saturated(self, n_experts):
        """The number of experts as the law feels it: from e_start at one expert to e_max at any number."""
        return 1 / (1 / (n_experts - 1 + 1 / (1 / self.e_start - 1 / self.e_max)) + 1 / self.e_max)

    def loss(self, n_parameters, n_experts):
        """Nats a token of a dense base of n_parameters (without embeddings) with n_experts in its routed layers."""
        n, e = math.log10(n_parameters), math.log10(self.saturated(n_experts))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def cutoff(self):
        """Parameters of the base above which the law gives more experts a higher loss, not a lower one."""
        return 10 ** (-self.b / self.c)


ROUTED = {"S-BASE": Routed(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
          "RL-R": Routed(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
          "HASH": Routed(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741)}


def fine_grained_loss(n_parameters, n_tokens, granularity):
    """Nats a token of a mixture with 64 times as many expert parameters as a token uses.

    n_parameters in total; granularity G: each expert is 1/G as wide as a dense block and a token uses G of them.
    Krajewski et al. 2024, arXiv:2402.07871, the fitted constants of their joint law.
    """
    return 0.47 + (2.1 / granularity ** 0.58 + 18.1) / n_parameters ** 0.115 + 30.8 / n_tokens ** 0.147
