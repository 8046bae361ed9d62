"""GPTQ for a stack of matrices at once: codes whose error is smallest on the inputs, not on the weights.

Letters: E experts, R output rows, C input columns, G groups along C, B columns of a block.

With H = sum over inputs of x x^T, damped, and U upper with H^-1 = U^T U, columns are rounded one by one and what a
column loses is made good by the columns behind it:

    q_j = Q(w_j), err_j = (w_j - q_j) / U_jj, W[:, j+1:] -= err_j U[j, j+1:]

Inside a block of columns that is `solve_block`, behind it one product for the block. Rows do not depend on each other.

Source: arXiv 2210.17323, algorithm 1, and quantize.md 1.1 and 1.5 of its published code. Differs from that code: group
scales always come from the weights as they were (static groups), a column whose input was always zero is rounded where
the code sets it to zero, and U comes from one Cholesky factor of the flipped H in place of three factorisations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moecli.ops.kernels import kernels

BLOCK = 128
"""Columns between two products with what is behind them."""
DAMPS = (1.0, 10.0, 100.0)
"""Damping is tried at these multiples until H has a Cholesky factor."""


class Factor(NamedTuple):
    """U of each matrix, its columns' order, and how it came about."""

    upper_ECC: Tensor
    """float32, in the order of columns that `order_EC` gives; the identity where H has no factor"""
    order_EC: Tensor
    """int64, columns in the order they are rounded"""
    tries_E: Tensor
    """int64, index into `DAMPS` of the damping that worked; len(DAMPS) where none did: plain rounding"""

    def expanded(self, experts: int) -> Factor:
        """The one factor for each of so many matrices, without a copy."""
        return Factor(*(values.expand(experts, *values.shape[1:]) for values in self))


class Solved(NamedTuple):
    """Codes of each matrix and what they cost."""

    codes_ERC: Tensor
    """int8, in the original order of columns"""
    loss_E: Tensor
    """float32, half the squared error on the inputs H was made from, as the update sees it"""


def factor(hessian_ECC: Tensor, damp: float = 0.01, act_order: bool = True) -> Factor:
    """U with (H + damp * mean(diag H) * I)^-1 = U^T U, for columns by falling diagonal of H if `act_order`.

    H is symmetric, of any positive scale. Matrices that are not finite, or not positive definite at 100 times the
    damping, get the identity, which makes GPTQ plain rounding; `tries_E` says so. float64 stays float64.
    """
    diagonal_EC = hessian_ECC.diagonal(dim1=-2, dim2=-1)
    order_EC = _order(diagonal_EC, act_order)
    hessian = _permuted(hessian_ECC, order_EC)
    sound_E = torch.isfinite(hessian).all(-1).all(-1) & (diagonal_EC.amax(-1) > 0)
    identity_CC = torch.eye(hessian.shape[-1], device=hessian.device, dtype=hessian.dtype)
    hessian = torch.where(sound_E[:, None, None], hessian, identity_CC)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal.mean(-1)
    diagonal[diagonal == 0] = 1.0
    tries_E = torch.where(sound_E, len(DAMPS), -1)
    upper = identity_CC.expand_as(hessian).clone()
    added = 0.0
    for index, times in enumerate(DAMPS):
        diagonal += ((times - added) * damp * mean_E)[:, None]
        added = times
        lower, info_E = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
        worked_E = (info_E == 0) & (tries_E == len(DAMPS))
        inverse = torch.linalg.solve_triangular(lower, identity_CC.expand_as(lower), upper=False).flip(-1, -2)
        upper = torch.where(worked_E[:, None, None], inverse, upper)
        tries_E = torch.where(worked_E, index, tries_E)
        if bool((tries_E < len(DAMPS)).all()):
            break
    return Factor(upper, order_EC, torch.where(tries_E < 0, len(DAMPS), tries_E))


def solve(weight_ERC: Tensor, scale_ERG: Tensor, found: Factor, bits: int) -> Solved:
    """Codes of `weight_ERC` for group scales that are given, in [-2^(b-1), 2^(b-1) - 1]."""
    columns = weight_ERC.shape[-1]
    group_EC = found.order_EC // (columns // scale_ERG.shape[-1])
    left = _wide(weight_ERC).gather(-1, _rows(found.order_EC, weight_ERC))
    scale = scale_ERG.to(left.dtype)
    codes = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    loss_E = left.new_zeros(len(left))
    fast = kernels("gptq", left)
    block = fast.solve_block if fast is not None else solve_block
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        scale_ERB = scale.gather(-1, _rows(group_EC[:, start:end], scale))
        upper_EBB = found.upper_ECC[:, start:end, start:end].contiguous()
        codes_ERB, error_ERB = block(left[..., start:end].contiguous(), upper_EBB, scale_ERB, bits)
        codes[..., start:end] = codes_ERB
        loss_E += error_ERB.square().sum((-2, -1)) / 2
        left[..., end:] -= error_ERB @ found.upper_ECC[:, start:end, end:]
    inverse_EC = found.order_EC.argsort(-1)
    return Solved(codes.gather(-1, _rows(inverse_EC, codes)), loss_E)


def solve_block(weight_ERB: Tensor, upper_EBB: Tensor, scale_ERB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [E, R, B] of one block of columns, and the errors [E, R, B] that columns behind it make good."""
    left, low, high = weight_ERB.clone(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, errors = torch.empty_like(left, dtype=torch.int8), torch.empty_like(left)
    for j in range(left.shape[-1]):
        scale_ER = scale_ERB[..., j]
        code_ER = (left[..., j] / scale_ER).round().clamp(low, high)
        error_ER = (left[..., j] - code_ER * scale_ER) / upper_EBB[:, j, j, None]
        left[..., j + 1 :] -= error_ER[..., None] * upper_EBB[:, None, j, j + 1 :]
        codes[..., j], errors[..., j] = code_ER.to(torch.int8), error_ER
    return codes, errors


def _order(diagonal_EC: Tensor, act_order: bool) -> Tensor:
    if act_order:
        return diagonal_EC.argsort(dim=-1, descending=True, stable=True)
    return torch.arange(diagonal_EC.shape[-1], device=diagonal_EC.device).expand_as(diagonal_EC)


def _permuted(hessian_ECC: Tensor, order_EC: Tensor) -> Tensor:
    """Both axes in this order; a copy."""
    rows = _wide(hessian_ECC).gather(-2, order_EC[..., None].expand_as(hessian_ECC))
    return rows.gather(-1, order_EC[:, None].expand_as(rows))


def _wide(values: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _rows(index_EC: Tensor, like_ERX: Tensor) -> Tensor:
    """The index for each of R rows."""
    return index_EC[:, None].expand(-1, like_ERX.shape[1], -1)
