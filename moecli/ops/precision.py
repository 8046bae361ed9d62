"""How many bits each expert gets: the published costs, as problems of `ops.budget`.

PMQ (MC-MoE, arXiv 2410.06270, and MC#, 2510.10962), layer by layer: an expert at b bits costs

    1000 * phi^alpha * w^beta * eps_b^gamma

with phi and w its shares of the layer's assignments and of their router probability (softmax over all experts, before
the top k are renormalized), and eps_b the norm of the layer's output error when this expert alone has b bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moecli.ops.budget import Item, Level, Problem

PMQ_EXPONENTS = (1.0, 1.5, 1.0)
"""alpha, beta, gamma that give the published bit maps. The released option says gamma 2, but its code never uses it."""


def pmq_cost(
    count_E: Sequence[float],
    prob_sum_E: Sequence[float],
    eps_E: Sequence[Mapping[int, float]],
    exponents: tuple[float, float, float] = PMQ_EXPONENTS,
) -> list[dict[int, float]]:
    """{bits: cost} of each expert of one layer, from eps {bits: error norm}. Units cancel: both sums become shares.

    A layer that no token reached costs nothing anywhere.
    """
    alpha, beta, gamma = exponents
    counts, probs = math.fsum(count_E) or 1.0, math.fsum(prob_sum_E) or 1.0
    return [
        {bits: 1000 * (count / counts) ** alpha * (prob / probs) ** beta * error**gamma for bits, error in eps.items()}
        for count, prob, eps in zip(count_E, prob_sum_E, eps_E, strict=True)
    ]


def pmq_problem(cost_E: Sequence[Mapping[int, float]], total_bits: int) -> Problem:
    """One layer: the experts' bits sum to `total_bits` at most, with one expert or more at the highest number of bits
    and at the one below it.

    Items are called "0", "1", ... and every expert has the same levels.
    """
    levels = sorted(set.intersection(*(set(cost) for cost in cost_E)))
    items = tuple(
        Item(str(expert), tuple(Level(bits, bits, cost[bits]) for bits in levels)) for expert, cost in enumerate(cost_E)
    )
    return Problem(items, total_bits, at_least=dict.fromkeys(levels[-2:], 1))
