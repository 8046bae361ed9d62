"""Second moments of what goes into the matrices of experts, trustworthy for experts with few tokens too.

E experts, C inputs of a matrix, n tokens of an expert. Source: shrinkage as in Ledoit and Wolf (2004), with a fixed
weight: what an expert's own n tokens say counts n against the C of what is assumed otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ENOUGH = 2
"""Tokens for each input from which on an expert's own moment is used alone."""


class Moments(NamedTuple):
    """Second moments, and what each is made of."""

    value_ECC: Tensor
    own: int
    """Experts whose own tokens are enough."""
    mixed: int
    """Experts with too few."""
    unseen: int
    """Experts without any."""


def moments(gram_ECC: Tensor, count_E: Tensor, pool_CC: Tensor | None = None) -> Moments:
    """Mean of x x^T of each expert, in the dtype of its sums `gram_ECC`, which are used up.

    With n < 2 C tokens it is (1 - g) C_e / n + g P, g = C / (C + n), so that it has full rank where P has. P is
    `pool_CC`, a mean over many tokens of the same inputs; without one (inputs of different experts are not the same
    things) it is the identity times the mean diagonal of C_e / n. Without any token it is P, or the identity.

    ValueError names the first expert whose sums are not finite.
    """
    experts, inputs = gram_ECC.shape[:2]
    if not bool(torch.isfinite(gram_ECC).all()):
        bad = int((~torch.isfinite(gram_ECC)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"sums over the inputs of expert {bad} hold values that are not numbers")
    count_E = count_E.to(gram_ECC.device)
    few_E = count_E < ENOUGH * inputs
    weight_E = torch.where(few_E, inputs / (inputs + count_E), 0.0).to(gram_ECC)
    gram_ECC /= count_E.clamp(min=1).to(gram_ECC)[:, None, None]
    mean_E = gram_ECC.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram_ECC *= (1 - weight_E)[:, None, None]
    if pool_CC is None:
        level_E = torch.where(mean_E > 0, mean_E, torch.ones_like(mean_E))
        gram_ECC.diagonal(dim1=-2, dim2=-1).add_((weight_E * level_E)[:, None])
    else:
        for expert in few_E.nonzero().flatten().tolist():  # one by one: [E, C, C] once more may not fit
            gram_ECC[expert] += weight_E[expert] * pool_CC.to(gram_ECC)
    unseen, few = int((count_E == 0).sum()), int(few_E.sum())
    return Moments(gram_ECC, experts - few, few - unseen, unseen)
