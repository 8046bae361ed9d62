"""The best B A of rank r for what a weight has lost, given what its inputs are like. Many matrices at once.

Letters: E matrices, R outputs, C inputs, r rank.

Of dW = W - W_hat and the second moment G of the inputs, the sum over inputs of ||(dW - B A) x||^2 is
tr((dW - B A) G (dW - B A)^T). With U the r leading eigenvectors of dW G dW^T it is least for

    B = U, A = U^T dW

For any S with S S^T = G, Eckart and Young say that the best matrix of rank r for dW S is U U^T dW S, which is B A S.
Published codes cut off svd(dW S) and multiply by the inverse of S: the same product wherever there is an inverse (EoRA,
arXiv 2410.21271, with G from calibration; L2QER, arXiv 2402.02446, and SLiM-LoRA, arXiv 2410.09615, with a diagonal
one). Here nothing is inverted, so inputs that never came are no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moecli.ops.ladder import ladder


class Correction(NamedTuple):
    """Factors of each matrix, and the loss that they leave. All float64."""

    b_ERr: Tensor
    """orthonormal columns"""
    a_ErC: Tensor
    before_E: Tensor
    """tr(dW G dW^T)"""
    after_E: Tensor
    """The same of dW - B A: the sum of the eigenvalues that were cut off."""


def correction(lost_ERC: Tensor, moment_E: Tensor, rank: int) -> Correction:
    """B and A of rank min(rank, R, C). `moment_E` is G [E, C, C], or [E, C] where it is diagonal; positive
    semi-definite, of any scale. Values are finite. The signs of B's columns are those the eigensolver gives.
    """
    lost = lost_ERC.double()
    moment = moment_E.to(lost)
    rows, columns = lost.shape[-2:]
    basis = None
    if rows > columns:  # dW = Q T: the eigenvectors of dW G dW^T are Q times those of the smaller T G T^T
        basis, lost = torch.linalg.qr(lost)
    gram = output_moment(lost, moment)
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    values = values.clamp(min=0)
    kept = min(rank, values.shape[-1])
    leading = vectors[..., -kept:]
    b = leading if basis is None else basis @ leading
    return Correction(b, leading.mT @ lost, values.sum(-1), values[..., :-kept].sum(-1))


def corrected(weight_RC: Tensor, b_Rr: Tensor, a_rC: Tensor) -> Tensor:
    """W + B A, added up in fp32 at least, in W's type. Leading dimensions are allowed."""
    wide = torch.promote_types(torch.promote_types(weight_RC.dtype, b_Rr.dtype), torch.float32)
    return (weight_RC.to(wide) + b_Rr.to(wide) @ a_rC.to(wide)).to(weight_RC.dtype)


def output_moment(weight_ERC: Tensor, moment_E: Tensor) -> Tensor:
    """W G W^T [E, R, R], for G [E, C, C] or its diagonal [E, C]; in the weight's type."""
    moment = moment_E.to(weight_ERC)
    left = weight_ERC * moment[:, None] if moment.dim() == 2 else weight_ERC @ moment
    return left @ weight_ERC.mT


def output_energy(weight_ERC: Tensor, moment_E: Tensor) -> Tensor:
    """tr(W G W^T) [E], float64: the sum over inputs of ||W x||^2."""
    weight = weight_ERC.double()
    moment = moment_E.to(weight)
    left = weight * moment[:, None] if moment.dim() == 2 else weight @ moment
    return (left * weight).sum((-2, -1))


def pooled(total_E: Tensor, count_E: Tensor) -> tuple[Tensor, Sequence[str]]:
    """Mean moments of each expert's inputs, from sums [E, C] or [E, C, C], and how each was come by: by the ladder of
    `ops.ladder`, or `plain` where that is not finite, or zero: the identity, every input counts the same.

    Float64. Waits for the device twice.
    """
    total = total_E.to(torch.float64, copy=True)
    weight_E = count_E.to(total)
    mean = total.sum(0) / weight_E.sum().clamp(min=1)
    found, names = ladder(total, weight_E, count_E, mean)
    found, sound = sound_moments(found)
    return found, [name if fine else "plain" for name, fine in zip(names, sound, strict=True)]


def sound_moments(moment_E: Tensor) -> tuple[Tensor, list[bool]]:
    """Moments [E, C, C] or [E, C] with the identity in place of those that are not finite, or zero; which were sound.
    Waits for the device once."""
    flat = moment_E.flatten(1)
    sound = (torch.isfinite(flat).all(-1) & (flat.amax(-1) > 0)).tolist()
    if all(sound):
        return moment_E, sound
    identity = torch.ones_like(moment_E[0]) if moment_E.dim() == 2 else torch.eye(moment_E.shape[-1]).to(moment_E)
    return torch.stack([one if fine else identity for one, fine in zip(moment_E, sound, strict=True)]), sound
