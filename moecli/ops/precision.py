"""How many bits each expert gets: the published costs, as problems of `ops.budget`.

PMQ (MC-MoE, arXiv 2410.06270, and MC#, 2510.10962), layer by layer: an expert at b bits costs

    1000 * phi^alpha * w^beta * eps_b^gamma

with phi and w its shares of the layer's assignments and of their router probability (softmax over all experts, before
the top k are renormalized), and eps_b the norm of the layer's output error when this expert alone has b bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moecli.ops.budget import Item, Level, Problem
from moecli.ops.pack import dequantize, quantize_rtn

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


def outlier_score(weight_NK: Tensor) -> Tensor:
    """Largest over input channels of max|w| / mean|w| of the channel; [...] for [..., N outputs, K inputs].

    QuantMoE-Bench's scorer of linears (arXiv 2406.08155). A channel of zeros counts as 0.
    """
    size_NK = weight_NK.float().abs()
    mean_K = size_NK.mean(-2)
    return (size_NK.amax(-2) / mean_K.where(mean_K > 0, torch.inf)).amax(-1)


def asymmetric(weight_NK: Tensor, bits: int, group_size: int) -> Tensor:
    """Values left by rounding to nearest between the least and the largest weight of each group, 0 among them; the zero
    point is rounded. With 1 bit the sign times mean|w|. Same shape and dtype, computed in fp32; leading dimensions are
    allowed.

    The grid on which the published code of PMQ and GEMQ measures (scales and zero points are not rounded to a dtype).
    """
    if bits == 1:
        return dequantize(*quantize_rtn(weight_NK.float(), bits, group_size)).to(weight_NK.dtype)
    grouped = weight_NK.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = scale.where(scale > 0, torch.ones_like(scale))
    zero = (-low / scale).round()
    codes = ((grouped / scale).round() + zero).clamp(0, 2**bits - 1)
    return (scale * (codes - zero)).flatten(-2).to(weight_NK.dtype)


def bits_problem(
    cost: Mapping[int, Sequence[Mapping[int, float]]],
    total: int,
    share: Literal["expert", "layer", "model"] = "expert",
    upper_two: bool = False,
) -> Problem:
    """Experts of some layers, {layer: {bits: cost} of each}, whose bits sum to `total` at most.

    Items are called "<layer>.<expert>"; `share` is what has one number of bits. `upper_two`: every layer has one expert
    or more at the highest number of bits and at the one below it.
    """
    ties: Mapping[str, Callable[[int], str | None]] = {
        "expert": lambda layer: None, "layer": lambda layer: f"layer {layer}", "model": lambda layer: "model",
    }  # fmt: skip
    items = tuple(
        Item(
            f"{layer}.{expert}",
            tuple(Level(b, b, c) for b, c in sorted(of_bits.items())),
            str(layer),
            ties[share](layer),
        )
        for layer, experts in cost.items()
        for expert, of_bits in enumerate(experts)
    )
    levels = sorted({level.key for item in items for level in item.levels})
    return Problem(items, total, at_least=dict.fromkeys(levels[-2:], 1) if upper_two else {})
