"""Products of rounded experts that stay packed: the layout, and what the kernels compute (pure twins).

Letters: E experts, N output rows, K input columns, B blocks of columns, P slices of a block, G scales along K, S visits
(token, slot), T tokens, k slots a token.

The layout is made for products, not for files (those keep dense rows, `ops.pack`). Columns come in blocks of
16 * c, where c is what one word holds: 8 codes of 4 bits, 16 of 2. A block is cut into slices of 32 columns, and word j
holds columns 2 j and 2 j + 1 of every slice: the code of the first in the word's lower half, that of the second in its
upper half. So one shift and one mask bring down two neighbours where a pair of 16-bit floats has them, and the
words of a block stand together for all rows:

    low    int32 [E, B, N, 16]    slice p at bit 4 p of each half, or 2 p of it
    high   int16 [E, B, N, 16]    with 3 bits a code only: the third bits, at bit p of each half
    scale  [E, G, N]              weight = (code - 2^(bits-1)) * scale, a product taken in the scale's dtype

Three bits are 2 + 1 so that no code straddles words and none is lost: 3.0 bits, where ten in a word are 3.2. The last
block is padded; what stands there is multiplied by no input. Symmetric grids only, as `ops.pack` has them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PACKED_BITS = (2, 3, 4)
LANES = 16
"""Words of a block's row."""
SLICE = 2 * LANES
"""Columns of which one word holds two."""


class Packed(NamedTuple):
    """One projection of experts that have the same number of bits."""

    low: Tensor
    high: Tensor | None
    scale_EGN: Tensor
    bits: int
    columns: int
    span: int
    """Columns that a scale covers: all, or blocks, or what divides a block."""

    @property
    def rows(self) -> int:
        return self.low.shape[2]

    def bytes(self) -> int:
        """Of one expert."""
        return sum(t[0].numel() * t.element_size() for t in (self.low, self.high, self.scale_EGN) if t is not None)


def block_of(bits: int) -> int:
    """Columns of a block."""
    return LANES * (8 if bits == 4 else 16)


def span_of(bits: int, columns: int, group: int) -> int:
    """Columns that each scale covers in the layout: `group`, or what divides it and a block as well.

    ValueError where that is no multiple of 32 columns.
    """
    block = block_of(bits)
    if group >= columns:
        return -(-columns // block) * block
    span = group if group % block == 0 else math.gcd(group, block)
    if span % SLICE:
        raise ValueError(f"groups of {group} columns cannot stay packed, their size must be a multiple of {SLICE}")
    return span


def arrange(codes_ENK: Tensor, scale_ENG: Tensor, bits: int) -> Packed:
    """The layout of int8 codes in [-2^(bits-1), 2^(bits-1) - 1], a scale for each K / G columns.

    ValueError: other bits than 2, 3, 4; an odd K; G does not divide K; groups that `span_of` refuses.
    """
    if bits not in PACKED_BITS:
        raise ValueError(f"experts of {bits} bits cannot stay packed, only of {', '.join(map(str, PACKED_BITS))}")
    columns, groups, block = codes_ENK.shape[-1], scale_ENG.shape[-1], block_of(bits)
    if columns % 2:
        raise ValueError(f"experts of {columns} columns cannot stay packed, their number must be even")
    if columns % groups:
        raise ValueError(f"{groups} scales do not divide {columns} columns")
    span = span_of(bits, columns, columns // groups)
    unsigned = codes_ENK.to(torch.int32) + 2 ** (bits - 1)
    padded = torch.nn.functional.pad(unsigned, (0, -columns % block))
    pairs_EBNPj2 = padded.unflatten(-1, (-1, block // SLICE, LANES, 2)).movedim(2, 1)
    if bits == 4:
        low, high = _words(pairs_EBNPj2, 4, 16), None
    else:
        low = _words(pairs_EBNPj2 & 3, 2, 16)
        high = _words(pairs_EBNPj2 >> 2, 1, 8).to(torch.int16) if bits == 3 else None
    scale_EGN = scale_ENG.repeat_interleave(max(1, columns // groups // span), -1).mT.contiguous()
    return Packed(low, high, scale_EGN, bits, columns, span)


def _words(pairs_EBNPj2: Tensor, bits: int, half: int) -> Tensor:
    shifts = _shifts(pairs_EBNPj2.shape[-3], bits, half, pairs_EBNPj2.device)
    return (pairs_EBNPj2 << shifts).sum((-3, -1), dtype=torch.int32)


def _shifts(slices: int, bits: int, half: int, device: torch.device) -> Tensor:
    """[P, 1, 2]: where the codes of a slice lie in a word whose upper half begins at bit `half`."""
    starts = torch.arange(slices, dtype=torch.int32, device=device) * bits
    return torch.stack([starts, starts + half], -1)[:, None]


def codes(packed: Packed) -> Tensor:
    """int8 [E, N, K]: what `arrange` was given."""
    slices, low = block_of(packed.bits) // SLICE, packed.low[..., None, :, None]
    width = 4 if packed.bits == 4 else 2
    unsigned = (low >> _shifts(slices, width, 16, low.device)) & (2**width - 1)
    if packed.high is not None:
        third = packed.high[..., None, :, None].to(torch.int32) >> _shifts(slices, 1, 8, low.device)
        unsigned |= (third & 1) << 2
    signed = (unsigned - 2 ** (packed.bits - 1)).to(torch.int8)
    return signed.movedim(1, 2).flatten(2)[..., : packed.columns]


def dequantized(packed: Packed) -> Tensor:
    """[E, N, K] in the scale's dtype."""
    spread = packed.scale_EGN.mT.repeat_interleave(packed.span, -1)[..., : packed.columns]
    return codes(packed).to(spread.dtype) * spread


def gated_product(x_TK: Tensor, packed: Packed, expert_S: Tensor) -> Tensor:
    """SiLU(gate x) * (up x) of each visit's expert: [S, N/2]; the first half of the rows are gates.

    Visit s is of token s // (S / T). Sums and gating in float32, rounded once. `expert_S` int64.
    """
    gate, up = _sums(x_TK, packed, expert_S).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x_TK.dtype)


def product(x_TK: Tensor, packed: Packed, expert_S: Tensor) -> Tensor:
    """W_e x of each visit's expert: [S, N], summed in float32. Visits as in `gated_product`; T may be S."""
    return _sums(x_TK, packed, expert_S).to(x_TK.dtype)


def combined_product(x_SK: Tensor, packed: Packed, expert_S: Tensor, weight_Tk: Tensor) -> Tensor:
    """The weighted sum of W_e x over the slots of each token: [T, N], in float32 and rounded once. S = T k."""
    weighted = _sums(x_SK, packed, expert_S).unflatten(0, weight_Tk.shape) * weight_Tk.float()[..., None]
    return weighted.sum(1).to(x_SK.dtype)


def _sums(x_TK: Tensor, packed: Packed, expert_S: Tensor) -> Tensor:
    x_SK = x_TK.repeat_interleave(len(expert_S) // len(x_TK), 0).float()
    out = x_SK.new_empty(len(expert_S), packed.rows)
    weights = dequantized(packed)
    for expert in expert_S.unique().tolist():
        visits = expert_S == expert
        out[visits] = x_SK[visits] @ weights[expert].float().mT
    return out
