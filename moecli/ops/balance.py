"""A choice of samples that uses experts evenly.

N samples, L layers, E experts. The unevenness of counts c [L, E] is the mean over layers of the standard deviation over
experts of their share of the layer's visits, c_e / sum c: what MoEQuant (arXiv 2505.03804) calls expert balance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unevenness(count_LE: Tensor) -> float:
    """Mean over layers of the standard deviation of shares; 0 where no token came. Leading dimensions are allowed."""
    count = count_LE.double()
    share = count / count.sum(-1, keepdim=True).clamp(min=1)
    return float(share.std(-1, unbiased=False).mean())


def balanced(count_NLE: Tensor, keep: int) -> Tensor:
    """Which `keep` of N samples to take, int64, ascending: each in turn the one that leaves the least sum over layers
    of the squared shares; ties go to the earlier one. If the first `keep` samples are at least as even, those.
    """
    count = count_NLE.double()
    samples = len(count)
    chosen: list[int] = []
    total_LE = torch.zeros_like(count[0])
    free_N = torch.ones(samples, dtype=torch.bool, device=count.device)
    square_NL, visits_NL = count.square().sum(-1), count.sum(-1)
    for _ in range(min(keep, samples)):
        # |C + c|^2 / (sum C + sum c)^2 for every sample at once
        both_NL = total_LE.square().sum(-1) + 2 * torch.einsum("nle,le->nl", count, total_LE) + square_NL
        cost_N = (both_NL / (total_LE.sum(-1) + visits_NL).clamp(min=1).square()).sum(-1)
        best = int(cost_N.masked_fill(~free_N, float("inf")).argmin())
        chosen.append(best)
        free_N[best] = False
        total_LE += count[best]
    first = list(range(min(keep, samples)))
    if unevenness(count[chosen].sum(0)) >= unevenness(count[first].sum(0)):
        chosen = first
    return torch.tensor(sorted(chosen), dtype=torch.int64)
