"""Low rank in the directions that outputs take. Source: Sub-MoE (arXiv 2506.23266, section 3.4, Eqs. 9-12).

The paper factors [W_1 S_1 ... W_n S_n] = U' Sigma' V'^T, S_i S_i^T the second moment of the inputs of expert i, takes
the mean of V'_i^T S_i^{-1} and keeps r singular values. Its result is U'_r U'_r^T times the mean of the W_i, exactly:
U'_r is all that is needed, and it is the leading eigenvectors of sum_i W_i S_i S_i^T W_i^T, an O x O matrix. Neither
the wide decomposition nor an inverse of S_i is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_at(ratio: float, outputs: int, inputs: int) -> int:
    """floor(ratio O I / (O + I)), at least 1: factors [O, r] and [r, I] then hold `ratio` of the matrix's numbers."""
    return max(1, min(outputs, inputs, int(ratio * outputs * inputs / (outputs + inputs))))


def output_gram(weight_EOI: Tensor, moment_EII: Tensor) -> Tensor:
    """W_i C_i W_i^T of every expert, float64 [E, O, O]: the second moment of its outputs."""
    weight = weight_EOI.double()
    return weight @ moment_EII.to(weight) @ weight.mT


def projected(weight_KOI: Tensor, gram_KOO: Tensor, rank: int) -> Tensor:
    """U_r U_r^T W with U_r the leading eigenvectors of a symmetric matrix, float64 [K, O, I]."""
    vectors_KOO = torch.linalg.eigh((gram_KOO + gram_KOO.mT) / 2).eigenvectors
    leading_KOr = vectors_KOO[..., -rank:]
    return leading_KOr @ (leading_KOr.mT @ weight_KOI.double())
