"""Weighted averages of experts. Source: HC-SMoE (arXiv 2410.08589), M-SMoE (2310.01334)."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(weight_EFD: Tensor, share_E: Tensor) -> Tensor:
    """sum_e share_e W_e over the first dimension, accumulated in fp32 and cast once.

    `share_E` must sum to 1. A single expert of share 1 comes back bit for bit.
    """
    if len(weight_EFD) == 1:
        return weight_EFD[0].clone()
    return torch.einsum("e...,e->...", weight_EFD.float(), share_E.float()).to(weight_EFD.dtype)


def shares(weight_E: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """Each expert's share of its group, float32 [E]; experts outside every group (-1) get 0.

    A group whose weights are all zero is averaged uniformly: dividing by a tiny sum, as authors' code
    does, would make a zero expert.
    """
    weight_E = weight_E.double()
    inside = group_E >= 0
    index = group_E.clamp(min=0)
    zeros = torch.zeros(groups, dtype=torch.float64)
    total = zeros.index_add(0, index, weight_E * inside)
    size = zeros.index_add(0, index, inside.double())
    uniform = 1 / size[index].clamp(min=1)
    share = torch.where(total[index] > 0, weight_E / total[index].clamp(min=1e-300), uniform)
    return (share * inside).float()
