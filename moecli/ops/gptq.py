"""GPTQ for a stack of matrices at once: codes whose error is smallest on the inputs, not on the weights.

Letters: E experts, R output rows, C input columns, G groups along C, B columns of a block, X and Y columns of halves.

With H = sum over inputs of x x^T, damped, and U upper with H^-1 = U^T U, columns are rounded one by one and what a
column loses is made good by the columns behind it:

    q_j = Q(w_j), err_j = (w_j - q_j) / U_jj, W[:, j+1:] -= err_j U[j, j+1:]

Inside a block of columns that is `solve_block`. Blocks are halves of halves: what a half of the columns loses is made
good in the other half by one product. Rows do not depend on each other.

GPTAQ also makes good that inputs are no longer those of the unquantized model, x~. With D = sum of (x~ - x) x^T over
the inputs of H and the same scale, each column adds w_j (x~_j - x_j) to what is missing, least squares of which on the
columns behind it are

    W[:, j+1:] += w_j P[j, j+1:], P = alpha triu(D U^T, 1) U (`pull`)

w_j as it is when it is rounded: halves of halves hold, with the columns' values beside their errors. There is no
Triton twin for it; its blocks run in PyTorch on any device.

Source: arXiv 2210.17323, algorithm 1, and quantize.md 1.1 and 1.5 of its published code; GPTAQ is arXiv 2504.02692.
Differs from that code: group scales always come from the weights as they were (static groups), a column whose input was
always zero is rounded where the code sets it to zero, and U comes from one Cholesky factor of the flipped H in place of
three factorisations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moecli.ops.kernels import kernels
from moecli.ops.pack import nearest

LEAF = 32
"""Columns that are rounded one by one between two products."""
BLOCK = 256
"""Columns that are factored in one piece."""
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
    damping, get the identity, which makes GPTQ plain rounding; `tries_E` says so. float64 stays float64. Takes twice
    the memory of H. Waits for the device once, and again for each further damping.
    """
    diagonal_EC = hessian_ECC.diagonal(dim1=-2, dim2=-1)
    order_EC = _order(diagonal_EC, act_order)
    upper_ECC, worked_E = _attempt(hessian_ECC, order_EC, damp)
    tries_E = torch.where(worked_E, 0, len(DAMPS))
    bad = (~worked_E).nonzero().flatten()
    for index, times in enumerate(DAMPS[1:], 1):
        if not len(bad):
            break
        upper_ECC[bad], worked = _attempt(hessian_ECC[bad], order_EC[bad], times * damp)
        tries_E[bad] = torch.where(worked, index, len(DAMPS))
        bad = bad[~worked]
    upper_ECC[bad] = torch.eye(upper_ECC.shape[-1], device=upper_ECC.device, dtype=upper_ECC.dtype)
    return Factor(upper_ECC, order_EC, tries_E)


def _attempt(hessian_ECC: Tensor, order_EC: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """U at one damping, and whether it is any good."""
    diagonal_EC = hessian_ECC.diagonal(dim1=-2, dim2=-1)
    sound_E = torch.isfinite(hessian_ECC).flatten(1).all(-1) & (diagonal_EC.amax(-1) > 0)
    damped_ECC = _permuted(hessian_ECC, order_EC)
    diagonal = damped_ECC.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal.mean(-1)
    diagonal[diagonal == 0] = 1.0
    diagonal += (damp * mean_E)[:, None]
    upper_ECC, worked_E = _inverse_factor(damped_ECC)
    return upper_ECC, worked_E & sound_E


def _inverse_factor(matrix_ECC: Tensor) -> tuple[Tensor, Tensor]:
    """U, upper, with U^T U the inverse, and where it exists. `matrix_ECC` is used up.

    M = V V^T with V upper, block of columns by block from the last one, and U = V^-1 beside it, so that all but blocks
    on the diagonal are products of all matrices at once; torch's own routines for many large matrices reach a tenth
    of their speed. V overwrites the upper half of M.
    """
    columns = matrix_ECC.shape[-1]
    upper_ECC = torch.zeros_like(matrix_ECC)
    worked_E = torch.ones(len(matrix_ECC), dtype=torch.bool, device=matrix_ECC.device)
    for start in reversed(range(0, columns, BLOCK)):
        end = min(start + BLOCK, columns)
        beside_EBX = matrix_ECC[:, start:end, end:]
        if end < columns:
            matrix_ECC[:, :end, start:end].baddbmm_(matrix_ECC[:, :end, end:], beside_EBX.mT, alpha=-1)
        lower_EBB, info_E = torch.linalg.cholesky_ex(matrix_ECC[:, start:end, start:end].flip(-1, -2))
        identity_BB = torch.eye(end - start, device=lower_EBB.device, dtype=lower_EBB.dtype)
        inverse = torch.linalg.solve_triangular(lower_EBB, identity_BB.expand_as(lower_EBB), upper=False)
        inverse_EBB = inverse.flip(-1, -2)
        worked_E &= info_E == 0
        matrix_ECC[:, :start, start:end] = matrix_ECC[:, :start, start:end] @ inverse_EBB.mT
        upper_ECC[:, start:end, start:end] = inverse_EBB
        if end < columns:
            upper_ECC[:, start:end, end:] = -inverse_EBB @ (beside_EBX @ upper_ECC[:, end:, end:])
    return upper_ECC, worked_E & torch.isfinite(upper_ECC.diagonal(dim1=-2, dim2=-1)).all(-1)


def pull(drift_ECC: Tensor, found: Factor, alpha: float) -> Tensor:
    """P of each matrix, in the order of `found`, from D in the original one; 0 where H has no factor. The loss that
    `solve` states does not count it.
    """
    upper_ECC = found.upper_ECC
    pull_ECC = (_permuted(drift_ECC, found.order_EC).to(upper_ECC) @ upper_ECC.mT).triu_(1) @ upper_ECC
    return pull_ECC.mul_(alpha).masked_fill_((found.tries_E == len(DAMPS))[:, None, None], 0)


def solve(weight_ERC: Tensor, scale_ERG: Tensor, found: Factor, bits: int, pull_ECC: Tensor | None = None) -> Solved:
    """Codes of `weight_ERC` for group scales that are given, on the grid of `ops.pack`; by GPTAQ with `pull`."""
    columns = weight_ERC.shape[-1]
    # Rows come last from here on: what a thread does for one row it does for its neighbours in memory as well.
    left_ECR = _wide(weight_ERC).mT.contiguous().gather(1, _columns(found.order_EC, weight_ERC))
    scale_EGR = scale_ERG.mT.to(left_ECR.dtype).contiguous()
    group_EC = found.order_EC // (columns // scale_ERG.shape[-1])
    codes_ECR = torch.empty(left_ECR.shape, dtype=torch.int8, device=left_ECR.device)
    seen_ECR = None if pull_ECC is None else torch.empty_like(left_ECR)
    fast = kernels("gptq", left_ECR) if left_ECR.dtype == torch.float32 and pull_ECC is None else None
    block = fast.solve_block if fast is not None else solve_block

    def some(start: int, end: int) -> None:
        """Codes of these columns; what they lose takes their place in `left_ECR`."""
        if end - start <= LEAF:
            here = slice(start, end)
            block(
                left_ECR[:, here],
                found.upper_ECC[:, here, here],
                scale_EGR,
                group_EC[:, here],
                codes_ECR[:, here],
                bits,
                *(() if pull_ECC is None else (pull_ECC[:, here, here], seen_ECR[:, here])),
            )
            return
        middle = start + -(-(end - start) // (2 * LEAF)) * LEAF
        some(start, middle)
        upper_EXY = found.upper_ECC[:, start:middle, middle:end]
        left_ECR[:, middle:end].baddbmm_(upper_EXY.mT, left_ECR[:, start:middle], alpha=-1)
        if pull_ECC is not None:
            left_ECR[:, middle:end].baddbmm_(pull_ECC[:, start:middle, middle:end].mT, seen_ECR[:, start:middle])
        some(middle, end)

    some(0, columns)
    loss_E = torch.linalg.vector_norm(left_ECR.flatten(1), dim=-1).square() / 2
    codes_ECR = codes_ECR.gather(1, _columns(found.order_EC.argsort(-1), weight_ERC))
    return Solved(codes_ECR.mT.contiguous(), loss_E)


def solve_block(
    left_EBR: Tensor, upper_EBB: Tensor, scale_EGR: Tensor, group_EB: Tensor, codes_EBR: Tensor, bits: int,
    pull_EBB: Tensor | None = None, seen_EBR: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the codes of one block of columns; `left_EBR` becomes the errors that columns behind it make good, and
    with a pull `seen_EBR` what each column was when it was rounded.
    """
    scale_EBR = scale_EGR.gather(1, group_EB[..., None].expand(*group_EB.shape, scale_EGR.shape[-1]))
    for j in range(left_EBR.shape[1]):
        code_ER = nearest(left_EBR[:, j] / scale_EBR[:, j], bits)
        error_ER = (left_EBR[:, j] - code_ER * scale_EBR[:, j]) / upper_EBB[:, j, j, None]
        left_EBR[:, j + 1 :] -= upper_EBB[:, j, j + 1 :, None] * error_ER[:, None]
        if pull_EBB is not None:
            seen_EBR[:, j] = left_EBR[:, j]
            left_EBR[:, j + 1 :] += pull_EBB[:, j, j + 1 :, None] * seen_EBR[:, None, j]
        codes_EBR[:, j], left_EBR[:, j] = code_ER.to(torch.int8), error_ER


def _order(diagonal_EC: Tensor, act_order: bool) -> Tensor:
    if act_order:
        return diagonal_EC.argsort(dim=-1, descending=True, stable=True)
    return torch.arange(diagonal_EC.shape[-1], device=diagonal_EC.device).expand_as(diagonal_EC)


def _permuted(hessian_ECC: Tensor, order_EC: Tensor) -> Tensor:
    """Both axes in this order; a copy."""
    # One after the other: on CUDA an index for both axes at once is written out, 24 bytes for each element.
    rows = _wide(hessian_ECC).gather(-2, order_EC[..., None].expand_as(hessian_ECC))
    return rows.gather(-1, order_EC[:, None].expand_as(rows))


def _wide(values: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _columns(index_EC: Tensor, like_ERC: Tensor) -> Tensor:
    """The index for each of R rows, rows last."""
    return index_EC[..., None].expand(-1, -1, like_ERC.shape[1])
