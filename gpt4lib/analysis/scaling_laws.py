"""Loss from parameters, tokens and experts, as published: each law holds inside the range it was fitted on.

Dense: Hoffmann et al. 2022, arXiv:2203.15556, equation 10. The constants that the paper prints ask for some 90 tokens a
parameter at Chinchilla's budget, where its two other methods, and Chinchilla itself, have 20; with four digits they ask
for some 60, and Besiroglu et al. 2024, arXiv:2404.10102, who refit part of the data, find about 20 by this method too.
"""

import math
from typing import Callable, NamedTuple, Sequence

Run = tuple[float, float, float]        # parameters, tokens, loss


class Dense(NamedTuple):
    """Nats a token = e + a / parameters^alpha + b / tokens^beta."""
    e: float
    a: float
    b: float
    alpha: float
    beta: float


CHINCHILLA = Dense(1.69, 406.4, 410.7, 0.34, 0.28)                  # as printed
UNROUNDED = Dense(1.6934, 406.4, 410.7, 0.3392, 0.2849)             # as Pearce and Song 2024, arXiv:2406.12907, compute with
REFIT = Dense(1.8172, 482.01, 2085.43, 0.3478, 0.3658)              # Besiroglu et al. 2024, table 1


def loss(n_parameters, n_tokens, law: Dense = CHINCHILLA):
    """Predicted loss in nats a token of a dense model."""
    return law.e + law.a / n_parameters ** law.alpha + law.b / n_tokens ** law.beta


def optimal(flop, law: Dense = CHINCHILLA):
    """(parameters, tokens) with the lowest predicted loss at 6 N D = flop; equation 4."""
    g = (law.alpha * law.a / (law.beta * law.b)) ** (1 / (law.alpha + law.beta))
    n = g * (flop / 6) ** (law.beta / (law.alpha + law.beta))
    return n, flop / 6 / n


def optimal_served(target: float, inference_tokens: float, law: Dense = CHINCHILLA) -> tuple[float, float]:
    """(parameters, tokens) with the least 6 N D + 2 N inference_tokens among those of loss `target`.

    Sardana et al. 2024, arXiv:2401.00448, section 2. With nothing to serve it is the optimum of training alone.
    Raises ValueError for a loss that no model reaches.
    """
    gap = target - law.e
    if gap <= 0:
        raise ValueError(f"a loss of {target} is not accepted; give more than {law.e}, which the law never reaches")

    def model(share: float) -> tuple[float, float]:                 # what is left of the loss, split between the two terms
        return (law.a / (gap * share)) ** (1 / law.alpha), (law.b / (gap * (1 - share))) ** (1 / law.beta)

    low, high = 0.0, 1.0
    for _ in range(60):                                             # the derivative of the cost changes its sign once
        share = (low + high) / 2
        grows = law.alpha * share / (law.beta * (1 - share)) < 1 + inference_tokens / (3 * model(share)[1])
        low, high = (share, high) if grows else (low, share)
    return model(low)


def effective_tokens(unique, epochs, r_star: float = 15.387756):
    """Tokens seen once that would be worth as much as `unique` ones seen `epochs` times.

    Muennighoff et al. 2023, arXiv:2305.16264, section 3.1; the constant from appendix A.
    """
    return unique * (1 + r_star * (1 - math.exp(-(epochs - 1) / r_star)))


def critical_batch(loss):
    """Tokens a step at which twice the least steps and twice the least tokens reach this loss (WebText2, nats a token).

    Kaplan et al. 2020, arXiv:2001.08361, figure 10: fitted on losses from 10 down to 3.
    """
    return 2.1e8 / loss ** 4.8


def batch_cost(batch, critical):
    """(steps over the fewest possible, tokens over the fewest possible); McCandlish et al. 2018, arXiv:1812.06162, section 2.3."""
    return 1 + critical / batch, 1 + batch / critical


def fit(runs: Sequence[Run]) -> Dense:
    """The dense law of least squared error.

    For given exponents the other three constants are linear; the exponents are searched in ever smaller steps.
    """
    if min(len({n for n, _, _ in runs}), len({d for _, d, _ in runs})) < 2 or len(runs) < 5:
        raise ValueError(f"{len(runs)} runs do not settle five constants; give at least five, of two sizes and two lengths")
    def solved(alpha: float, beta: float) -> tuple[float, Dense]:
        x, y, z = ([n ** -alpha for n, _, _ in runs], [d ** -beta for _, d, _ in runs], [value for _, _, value in runs])
        (mx, x), (my, y), (mz, z) = ((m := sum(v) / len(v), [e - m for e in v]) for v in (x, y, z))
        xx, yy, xy, xz, yz = (sum(map(lambda p, q: p * q, *pair)) for pair in ((x, x), (y, y), (x, y), (x, z), (y, z)))
        a, b = (xz * yy - yz * xy) / (xx * yy - xy * xy), (yz * xx - xz * xy) / (xx * yy - xy * xy)
        law = Dense(mz - a * mx - b * my, a, b, alpha, beta)
        return sum((loss(n, d, law) - value) ** 2 for n, d, value in runs), law

    best, step = solved(0.5, 0.5), 0.25
    while step > 1e-4:
        near = min(solved(max(best[1].alpha + i * step, 0.01), max(best[1].beta + j * step, 0.01))
                   for i in (-1, 0, 1) for j in (-1, 0, 1))
        best, step = (near, step) if near[0] < best[0] else (best, step / 2)
    return best[1]


def jackknife(estimate: Callable[[Sequence[Run]], Sequence[float]], runs: Sequence[Run]) -> list[float]:
    """Standard error of each number that `estimate` finds, from leaving out one run at a time (Efron 1979)."""
    without = list(zip(*(estimate([*runs[:i], *runs[i + 1:]]) for i in range(len(runs)))))
    return [math.sqrt((len(v) - 1) / len(v) * sum((x - sum(v) / len(v)) ** 2 for x in v)) for v in without]


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
