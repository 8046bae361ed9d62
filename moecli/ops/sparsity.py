"""Which weights of a matrix stay when most go: by score, or column by column (SparseGPT), all experts at once.

Letters: E experts, R output rows, C input columns, B columns of a block. A sparsity is the part of the weights that
goes, or `Pattern(n, m)`: of each m consecutive inputs of an output n stay. Among equal scores the lower column stays.

Source of SparseGPT: arXiv 2301.00774, algorithm 1. With H the second moment of the inputs, damped, and U upper with
H^-1 = U^T U, columns are looked at one by one, and what a column loses is made good by the columns behind it:

    err_j = w_j / U_jj where w_j goes, else 0;  W[:, j+1:] -= err_j U[j, j+1:]

What goes is what has the lowest w_j^2 / U_jj^2: in a block of columns, over all its rows, or for N:M in each group of m
columns, when the first of them is reached. The published code drops one weight a block more than the sparsity says.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Columns among which SparseGPT chooses, and between two products with what is behind them."""

Compare = Literal["output", "matrix"]


class Pattern(NamedTuple):
    """N:M sparsity."""

    keep: int
    of: int

    @property
    def part(self) -> float:
        """What goes."""
        return 1 - self.keep / self.of


Sparsity = float | Pattern


def kept(score: Tensor, sparsity: Sparsity, compare: Compare = "output") -> Tensor:
    """What stays, bool [E, R, C]: the highest scores in each row (`output`) or each matrix, or in each group of N:M.

    Of n weights that are compared floor(sparsity n) go. ValueError: the group of N:M does not divide C.
    """
    if isinstance(sparsity, Pattern):
        if score.shape[-1] % sparsity.of:
            raise ValueError(f"groups of {sparsity.of} do not divide {score.shape[-1]} inputs")
        return _best(score.unflatten(-1, (-1, sparsity.of)), sparsity.keep).flatten(-2)
    if compare == "output":
        return _best(score, score.shape[-1] - dropped(score.shape[-1], sparsity))
    flat = score.flatten(-2)
    return _best(flat, flat.shape[-1] - dropped(flat.shape[-1], sparsity)).view_as(score)


def dropped(count: int, sparsity: float) -> int:
    """floor(sparsity count), whatever binary fractions make of it."""
    return math.floor(count * sparsity + 1e-9)


def has_pattern(weight: Tensor, pattern: Pattern) -> bool:
    """Whether at most n of each m consecutive inputs are not zero."""
    return bool((weight.unflatten(-1, (-1, pattern.of)) != 0).sum(-1).le(pattern.keep).all())


def sparsegpt(weight_ERC: Tensor, upper_ECC: Tensor, sparsity: Sparsity) -> Tensor:
    """The weights that stay, changed to stand in for those that are 0 now: float32, or float64 where U is that.

    `upper_ECC` is that of `ops.gptq.factor` in the columns' own order. ValueError: the group of N:M does not divide C.
    """
    left = weight_ERC.to(upper_ECC.dtype).clone()
    columns, group = left.shape[-1], sparsity.of if isinstance(sparsity, Pattern) else 1
    if columns % group:
        raise ValueError(f"groups of {group} do not divide {columns} inputs")
    step = max(group, BLOCK // group * group)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block_ERB = left[..., start:end]  # a view
        error_ERB = _sparse_block(block_ERB, upper_ECC[:, start:end, start:end], sparsity)
        left[..., end:] -= error_ERB @ upper_ECC[:, start:end, end:]
    return left


def _sparse_block(block_ERB: Tensor, upper_EBB: Tensor, sparsity: Sparsity) -> Tensor:
    """Make the block sparse in place; the errors [E, R, B] that columns behind it make good."""
    diagonal_E1B = upper_EBB.diagonal(dim1=-2, dim2=-1)[:, None]
    errors = torch.empty_like(block_ERB)
    stays = torch.empty(block_ERB.shape, dtype=torch.bool, device=block_ERB.device)
    if not isinstance(sparsity, Pattern):
        stays = kept((block_ERB / diagonal_E1B).square(), sparsity, "matrix")
    for j in range(block_ERB.shape[-1]):
        if isinstance(sparsity, Pattern) and j % sparsity.of == 0:
            some = slice(j, j + sparsity.of)
            stays[..., some] = kept((block_ERB[..., some] / diagonal_E1B[..., some]).square(), sparsity)
        weight_ER = block_ERB[..., j]
        error_ER = weight_ER.masked_fill(stays[..., j], 0) / upper_EBB[:, None, j, j]
        errors[..., j] = error_ER
        weight_ER.masked_fill_(~stays[..., j], 0)
        block_ERB[..., j + 1 :] -= error_ER[..., None] * upper_EBB[:, None, j, j + 1 :]
    return errors


def _best(score: Tensor, count: int) -> Tensor:
    """The `count` highest of the last dimension."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)
