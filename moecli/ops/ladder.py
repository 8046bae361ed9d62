"""Second moments of each expert's inputs, however few they are.

With n of an expert's inputs, of width C, and m = C / 4:

    own      n >= max(m, 256)   its own mean
    mixed    32 <= n            n / (n + m) of its own mean and m / (n + m) of the layer's
    pooled   n < 32             the layer's mean

Shrinkage towards the layer's mean, as of a prior worth m inputs; the bounds are ours (quantize.md 1.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEW = 32
"""Inputs below which an expert's own moments say nothing."""
ENOUGH = 256
"""Inputs from which on they are used alone, if they are a quarter of the width too."""


class Ladder(NamedTuple):
    """Moments of each expert, and how much of them is its own."""

    value_E: Tensor
    """[E, C, C] or [E, C]"""
    classes: list[str]
    """`own`, `mixed` or `pooled`"""


def ladder(total_E: Tensor, weight_E: Tensor, count_E: Tensor, pool: Tensor) -> Ladder:
    """From sums over an expert's inputs, [E, C, C] or [E, C], which count `weight_E` in all, and their mean over the
    layer, [C, C] or [C]. `count_E` are the inputs themselves, `total_E` is used up. Waits for the device once.

    Experts with inputs enough keep their own moments whatever the others' are: what is not finite stays where it came
    from.
    """
    quarter, counts = total_E.shape[-1] / 4, count_E.tolist()
    names = ["own" if n >= max(quarter, ENOUGH) else "pooled" if n < FEW else "mixed" for n in counts]
    fixed = {"own": 1.0, "pooled": 0.0}
    shares = [fixed.get(name, n / (n + quarter)) for name, n in zip(names, counts, strict=True)]
    share_E = torch.tensor(shares, dtype=total_E.dtype, device=total_E.device)
    total_E *= (share_E / weight_E.clamp(min=1e-30)).view(-1, *[1] * (total_E.dim() - 1))
    for expert, name in enumerate(names):
        if name == "pooled":
            total_E[expert] = pool
        elif name == "mixed":
            total_E[expert] += (1 - share_E[expert]) * pool
    return Ladder(total_E, names)
