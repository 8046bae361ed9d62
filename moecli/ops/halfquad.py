"""Scales by half-quadratic splitting: a norm of the error that forgives outliers, without data (HQQ).

N rows, K columns, G groups, g = K / G. Per group, with error e = w - s q,

    least over s of sum |e|^p, p < 1

is split by a second variable v that stands for the error, and solved by turns, with beta growing:

    v = shrink(e),  shrink(e) = sign(e) max(|e| - |e|^(p - 1) / beta, 0)
    s = <q, w - v> / <q, q>,  q = clamp(round(w / s))

The second line is the least-squares scale of the weights without their outliers' errors; q as in `ops.pack`.

Source: HQQ (Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models"), which moves a zero
point and leaves the scale; symmetric grids have no zero point. Constants are the published ones. Errors are measured in
steps of the first scale, where the published code measures them as they are: for weights of usual size its threshold is
above all errors, and nothing is an outlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecli.ops.pack import group_scale, nearest, rounded_again

P, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20


def half_quadratic_scale(weight_NK: Tensor, bits: int, group_size: int) -> Tensor:
    """Scale of each group [.., N, G] in the weight's dtype; of all that the iteration passes, the one with least
    sum |e|^0.7, so none is worse by this norm than that of `group_scale`, nor larger for a group of zeros.

    Leading dimensions are allowed. Raises ValueError when `group_size` does not divide K.
    """
    first_NG = group_scale(weight_NK, bits, group_size)
    step = first_NG.float()[..., None]
    weight = weight_NK.float().unflatten(-1, (-1, group_size)) / step
    best = scale = torch.ones_like(step)
    least = _norm(weight, scale, bits)
    beta = BETA
    for _ in range(STEPS):
        codes = _codes(weight, scale, bits)
        outlying = _shrunk(weight - codes * scale, beta)
        fit = (codes * (weight - outlying)).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
        # Codes that are all 0 have no scale; one that is not positive would turn the grid around.
        scale = torch.where(fit > 0, fit, scale)
        stored = (scale * step).to(weight_NK.dtype).float() / step
        norm = _norm(weight, stored, bits)
        better = (norm < least) & (stored > 0)
        best, least = torch.where(better, stored, best), torch.where(better, norm, least)
        beta *= GROWTH
    return (best * step)[..., 0].to(weight_NK.dtype)


def quantize_hqq(weight_NK: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [.., N, K] nearest to the weights for these scales, and the scales [.., N, G] in their dtype."""
    scale_NG = half_quadratic_scale(weight_NK, bits, group_size)
    return rounded_again(weight_NK.float(), scale_NG, bits), scale_NG


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return nearest(weight / scale, bits)


def _norm(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (weight - _codes(weight, scale, bits) * scale).abs().pow(P).sum(-1, keepdim=True)


def _shrunk(error: Tensor, beta: float) -> Tensor:
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(P - 1) / beta).clamp(min=0)
