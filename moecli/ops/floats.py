"""Weights as small floats with shared scales: FP8 (e4m3) and MXFP4 (e2m1 with powers of two).

Letters: N output rows, K input columns. All functions are pure, run on any device and allow leading dimensions.
Layouts are those of compressed-tensors `float-quantized` and `mxfp4-pack-quantized`; element formats those of the
OCP Microscaling Formats specification 1.0 (section 5.3) and of OFP8.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128
"""Rows and columns that share a scale of FP8 in blocks."""
MX_GROUP = 32
"""Columns that share a power of two in MXFP4."""
FP8_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each code's three low bits; the fourth bit is the sign."""
_BIAS = 127


def quantize_fp8(weight_NK: Tensor, blocks: bool = False) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [N, K] and scales in the weight's dtype: [N, 1], or [ceil(N/128), ceil(K/128)] of `blocks`.

    scale = max|w| / 448 over a row or a block of 128 x 128, cast to the weight's dtype *before* it divides; nearest
    code, ties to even. Zeros get scale 1. Blocks at the edges may be smaller.
    """
    weight = weight_NK.float()
    largest = _block_amax(weight) if blocks else weight.abs().amax(-1, keepdim=True)
    scale = (largest / FP8_MAX).to(weight_NK.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # A scale that was rounded down leaves quotients above 448, which would become NaN.
    quotient = (weight / _spread(scale.float(), weight.shape, blocks)).clamp(-FP8_MAX, FP8_MAX)
    return quotient.to(torch.float8_e4m3fn), scale


def dequantize_fp8(codes_NK: Tensor, scale: Tensor, blocks: bool = False) -> Tensor:
    """code * scale in the scale's dtype, rounded once. `scale` as `quantize_fp8` gives it."""
    return (codes_NK.float() * _spread(scale.float(), codes_NK.shape, blocks)).to(scale.dtype)


def _block_amax(weight_NK: Tensor) -> Tensor:
    rows, columns = weight_NK.shape[-2:]
    padded = torch.nn.functional.pad(weight_NK.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).amax((-3, -1))


def _spread(scale: Tensor, shape: torch.Size, blocks: bool) -> Tensor:
    """The scale of each weight, or of each row."""
    if not blocks:
        return scale
    rows, columns = shape[-2:]
    return scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def quantize_mxfp4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [N, K/2], the first of two in the low half, and exponents uint8 [N, K/32] plus 127 (e8m0).

    A group's power of two is that of its largest magnitude over 4, one higher where that magnitude is at least 7/8 of
    the next power of two: there rounding up loses no more than the 6 that ends e2m1. (compressed-tensors has the same
    rule; the OCP text's own is without "one higher".) Nearest code, ties to an even mantissa. Raises ValueError when
    32 does not divide K.
    """
    columns = weight_NK.shape[-1]
    if columns % MX_GROUP:
        raise ValueError(f"MXFP4 has groups of {MX_GROUP}, which do not divide the input width {columns}")
    grouped = weight_NK.float().unflatten(-1, (-1, MX_GROUP))
    mantissa, exponent = torch.frexp(grouped.abs().amax(-1))  # magnitude = mantissa * 2^exponent, mantissa in [1/2, 1)
    shared = (exponent - 3 + (mantissa >= 0.875)).clamp(-_BIAS, _BIAS)
    codes = _e2m1_codes(torch.ldexp(grouped, -shared[..., None])).flatten(-2)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, (shared + _BIAS).to(torch.uint8)


def dequantize_mxfp4(packed_NH: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] of `packed_NH` uint8 [N, K/2] and `scale_NG` uint8 [N, K/32]. Exact in bfloat16 and float32."""
    codes = torch.stack((packed_NH & 0xF, packed_NH >> 4), -1).flatten(-2)
    values = torch.tensor(E2M1, device=codes.device)[(codes & 7).int()]
    values = torch.where(codes >= 8, -values, values).unflatten(-1, (-1, MX_GROUP))
    return torch.ldexp(values, scale_NG.int()[..., None] - _BIAS).flatten(-2).to(dtype)


def _e2m1_codes(values: Tensor) -> Tensor:
    """uint8 code of the nearest e2m1 number, ties to the even code; beyond 6 it is 6."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for below, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        code += magnitude >= middle if below % 2 else magnitude > middle
    return code | (values < 0).to(torch.uint8) << 3
