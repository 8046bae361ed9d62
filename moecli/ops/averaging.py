"""Weighted averages of experts. Source: HC-SMoE (arXiv 2410.08589), M-SMoE (2310.01334)."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Largest fp32 copy of weights held at a time."""


def mixed(value_E: Tensor, share_KE: Tensor) -> Tensor:
    """sum_e share_ke value_e: [E, ...] -> float32 [K, ...]. One matrix product for all groups, in slices of columns."""
    flat_EX = value_E.reshape(len(value_E), -1)
    step = max(1, CHUNK_BYTES // (4 * len(flat_EX)))
    share_KE = share_KE.to(flat_EX.device, torch.float32)
    parts = [share_KE @ flat_EX[:, start : start + step].float() for start in range(0, flat_EX.shape[1], step)]
    return torch.cat(parts, dim=1).view(len(share_KE), *value_E.shape[1:])


def share_matrix(share_E: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """float32 [K, E]: each expert's share in the row of its group, 0 elsewhere; experts outside (-1) are in no row."""
    matrix_KE = torch.zeros(groups, len(share_E))
    inside = (group_E >= 0).nonzero().flatten()
    matrix_KE[group_E[inside], inside] = share_E[inside].float()
    return matrix_KE


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
