"""Low rank in the directions that outputs take, and matrices kept as factors.

E experts, O outputs, I inputs of a matrix W, r rank. With C the second moment of the inputs, S S^T = C and
W S = U Sigma V^T, SVD-LLM (arXiv 2403.07378) keeps U_r Sigma_r V_r^T S^-1. That is U_r U_r^T W, exactly: `truncated`
takes the factors U_r and U_r^T W, for which neither a Cholesky factor nor an inverse is needed, whatever the rank of C.
The squared error on the inputs is the sum of the dropped sigma^2.

Sub-MoE (arXiv 2506.23266, section 3.4, Eqs. 9-12) factors [W_1 S_1 ... W_n S_n] = U' Sigma' V'^T, S_i S_i^T the second
moment of the inputs of expert i, takes the mean of V'_i^T S_i^{-1} and keeps r singular values. Its result is
U'_r U'_r^T times the mean of the W_i, exactly: U'_r is all that is needed, and it is the leading eigenvectors of
sum_i W_i S_i S_i^T W_i^T, an O x O matrix. Neither the wide decomposition nor an inverse of S_i is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factored(NamedTuple):
    """Matrices of E experts, left_e right_e plus what else there is."""

    left_EOr: Tensor
    right_ErI: Tensor
    base_OI: Tensor | None = None
    """Added to each expert's."""
    rows_EnI: Tensor | None = None
    """Rows that are added ..."""
    at_En: Tensor | None = None
    """... int64, and to which."""

    def expanded(self) -> Tensor:
        """The matrices [E, O, I]: multiplied and added in float32 at least, in the dtype of the factors."""
        dtype = torch.promote_types(self.left_EOr.dtype, torch.float32)
        weight_EOI = self.left_EOr.to(dtype) @ self.right_ErI.to(dtype)
        if self.base_OI is not None:
            weight_EOI += self.base_OI.to(dtype)
        if self.rows_EnI is not None and self.at_En is not None:
            at_EnI = self.at_En[..., None].expand_as(self.rows_EnI)
            weight_EOI.scatter_add_(1, at_EnI, self.rows_EnI.to(dtype))
        return weight_EOI.to(self.left_EOr.dtype)

    def to(self, like: Tensor) -> Factored:
        """All numbers in the dtype and on the device of `like`; indices on its device."""
        return Factored(*(v if v is None else v.to(like.device, like.dtype if v.is_floating_point() else None)
                          for v in self))  # fmt: skip


class Truncated(NamedTuple):
    """Factors of rank r, float64, and what they cost on the inputs."""

    left_EOr: Tensor
    """Orthonormal columns, the most important first."""
    right_ErI: Tensor
    lost_E: Tensor
    """E |(W - left right) x|^2: the dropped sigma^2."""
    total_E: Tensor
    """E |W x|^2: all sigma^2."""


def rank_at(ratio: float, outputs: int, inputs: int) -> int:
    """floor(ratio O I / (O + I)), at least 1: factors [O, r] and [r, I] then hold `ratio` of the matrix's numbers."""
    return max(1, min(outputs, inputs, int(ratio * outputs * inputs / (outputs + inputs))))


def truncated(weight_EOI: Tensor, rank: int, moment_EII: Tensor | None = None) -> Truncated:
    """The matrices of this rank nearest to W on inputs of this second moment; None: of the identity, a plain SVD.

    One symmetric eigenvalue problem of the smaller of O and I for each expert (and one of I to take the root of the
    moment where I is smaller), in float64. Eigenvalues of W C W^T are sigma^2, so that sigma below about 1e-8 of the
    largest are noise: of these directions any is as good on the inputs.
    """
    weight = weight_EOI.double()
    if weight.shape[-2] <= weight.shape[-1]:
        gram_EOO = weight @ weight.mT if moment_EII is None else output_gram(weight, moment_EII)
        value_EO, vectors_EOO = torch.linalg.eigh((gram_EOO + gram_EOO.mT) / 2)
        left_EOr = vectors_EOO[..., -rank:].flip(-1)
    else:
        spread_EOI = weight if moment_EII is None else weight @ _root(moment_EII.double())
        value_EO, vectors_EII = torch.linalg.eigh(spread_EOI.mT @ spread_EOI)
        left_EOr = torch.linalg.qr(spread_EOI @ vectors_EII[..., -rank:].flip(-1)).Q
    value_EO = value_EO.clamp(min=0)
    return Truncated(left_EOr, left_EOr.mT @ weight, value_EO[..., :-rank].sum(-1), value_EO.sum(-1))


def _root(moment_EII: Tensor) -> Tensor:
    """S with S S^T = C, for any C without negative eigenvalues beyond rounding."""
    value_EI, vectors_EII = torch.linalg.eigh((moment_EII + moment_EII.mT) / 2)
    return vectors_EII * value_EI.clamp(min=0).sqrt()[..., None, :]


def output_gram(weight_EOI: Tensor, moment_EII: Tensor) -> Tensor:
    """W_i C_i W_i^T of every expert, float64 [E, O, O]: the second moment of its outputs."""
    weight = weight_EOI.double()
    return weight @ moment_EII.to(weight) @ weight.mT


def projected(weight_KOI: Tensor, gram_KOO: Tensor, rank: int) -> Tensor:
    """U_r U_r^T W with U_r the leading eigenvectors of a symmetric matrix, float64 [K, O, I]."""
    vectors_KOO = torch.linalg.eigh((gram_KOO + gram_KOO.mT) / 2).eigenvectors
    leading_KOr = vectors_KOO[..., -rank:]
    return leading_KOr @ (leading_KOr.mT @ weight_KOI.double())
