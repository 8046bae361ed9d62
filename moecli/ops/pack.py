"""Round-to-nearest integer codes and their dense bit packing (compressed-tensors `pack-quantized`).

A weight is code * scale, symmetric grids only:

    b > 1    codes -2^(b-1) .. 2^(b-1) - 1, scale max|w| / ((2^b - 1) / 2) of the group
    b = 1    codes -1 and 1, the sign (that of 0 is 1), scale mean|w| of the group: the least squared error

The second row is MC-MoE's (arXiv 2410.06270); compressed-tensors has -1 and 0 there, so no stock loader reads 1 bit.

Letters: N output rows, K input columns, G groups along K. All functions are pure and run on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT_BITS = (1, 2, 3, 4, 8)


def quantize_rtn(weight_NK: Tensor, bits: int, group_size: int, shrink: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest: codes_NK int8 and scale_NG in the weight's dtype, on the grid above.

    Scales are cast to the weight's dtype *before* they divide, so that the codes are the best ones for the scale that
    is stored (as compressed-tensors does, quantize.md 1.2). `shrink`, and groups of zeros: see `group_scale`. Leading
    batch dimensions are allowed. Raises ValueError when `group_size` does not divide K.
    """
    scale = group_scale(weight_NK, bits, group_size, shrink)
    grouped = weight_NK.float().unflatten(-1, (-1, group_size))
    return _codes(grouped, scale.float(), bits).to(torch.int8).flatten(-2), scale


def group_scale(weight_NK: Tensor, bits: int, group_size: int, shrink: bool = False) -> Tensor:
    """Scale of each group [N, G] in the weight's dtype; for a group of zeros 1, or the least normal number with 1 bit,
    which has no code for zero.

    With `shrink` the best of 80 scales, 1.00, 0.99, ... 0.21 of that, by the sum of |error|^2.4 over the group (GPTQ's
    MSE search, quantize.md 1.2); with 1 bit of twice that, for there the best may be larger. Raises ValueError when
    `group_size` does not divide K.
    """
    columns = weight_NK.shape[-1]
    if columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide the input width {columns}")
    grouped = weight_NK.float().unflatten(-1, (columns // group_size, group_size))
    plain = grouped.abs().mean(-1) if bits == 1 else grouped.abs().amax(-1) / ((2**bits - 1) / 2)
    best = _stored(plain, weight_NK.dtype, bits)
    if shrink:
        least = _error(grouped, best.float(), bits)
        widest = 2 * plain if bits == 1 else plain
        for step in range(80):
            scale = _stored(widest * (1 - step / 100), weight_NK.dtype, bits)
            error = _error(grouped, scale.float(), bits)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def rounded_again(weight_NK: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """int8 codes of the weights nearest to these for scales that are given. Leading dimensions are allowed."""
    grouped = weight_NK.unflatten(-1, (scale_NG.shape[-1], -1))
    return _codes(grouped, scale_NG.to(grouped), bits).to(torch.int8).flatten(-2)


def nearest(value: Tensor, bits: int) -> Tensor:
    """The code nearest to each weight, given in units of its scale; in its dtype."""
    if bits == 1:
        return torch.where(value < 0, -1.0, 1.0).to(value)
    return value.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _stored(scale_NG: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    scale = scale_NG.to(dtype)
    return scale.masked_fill(scale == 0, torch.finfo(dtype).tiny if bits == 1 else 1.0)


def _codes(grouped_NGg: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    return nearest(grouped_NGg / scale_NG[..., None], bits)


def _error(grouped_NGg: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    return (_codes(grouped_NGg, scale_NG, bits) * scale_NG[..., None] - grouped_NGg).abs().pow(2.4).sum(-1)


def dequantize(codes_NK: Tensor, scale_NG: Tensor, group_size: int | None = None) -> Tensor:
    """codes * scale, in the scale's dtype, as compressed-tensors decompresses: the product is taken in that dtype."""
    groups = scale_NG.shape[-1]
    width = group_size or codes_NK.shape[-1] // groups
    grouped = codes_NK.unflatten(-1, (groups, width)).to(scale_NG.dtype)
    return (grouped * scale_NG.unsqueeze(-1)).flatten(-2)


def pack_rows(codes_NK: Tensor, bits: int) -> Tensor:
    """int8 codes to a dense little-endian int32 stream per row: int32 [N, ceil(K*bits/32)].

    Code u = q + 2^(bits-1), or (q + 1) / 2 of 1 bit; element i occupies bits [i*bits, (i+1)*bits). Values may straddle
    words (3 bits).
    """
    codes = codes_NK.to(torch.int32).flatten(0, -2)
    unsigned = (codes > 0).to(torch.int32) if bits == 1 else codes + 2 ** (bits - 1)
    if 32 % bits == 0:
        per_word = 32 // bits
        padded = _pad_columns(unsigned, per_word).unflatten(-1, (-1, per_word))
        shifts = torch.arange(per_word, dtype=torch.int32, device=padded.device) * bits
        words = (padded << shifts).sum(-1, dtype=torch.int32)
    else:
        positions = torch.arange(bits, dtype=torch.int32, device=unsigned.device)
        stream = ((unsigned.unsqueeze(-1) >> positions) & 1).flatten(-2)
        stream = _pad_columns(stream, 32).unflatten(-1, (-1, 32))
        shifts = torch.arange(32, dtype=torch.int32, device=stream.device)
        words = (stream << shifts).sum(-1, dtype=torch.int32)
    return words.unflatten(0, codes_NK.shape[:-1])


def unpack_rows(packed_NW: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_rows`: int8 codes [N, columns]."""
    words = packed_NW.to(torch.int64) & 0xFFFFFFFF
    if 32 % bits == 0:
        shifts = torch.arange(32 // bits, device=words.device) * bits
        unsigned = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :columns]
    else:
        stream = ((words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1).flatten(-2)
        stream = stream[..., : columns * bits].unflatten(-1, (columns, bits))
        unsigned = (stream << torch.arange(bits, device=words.device)).sum(-1)
    return (2 * unsigned - 1 if bits == 1 else unsigned - 2 ** (bits - 1)).to(torch.int8)


def _pad_columns(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % multiple))
