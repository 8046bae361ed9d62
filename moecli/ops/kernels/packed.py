"""Triton twins of `moecli.ops.packed`: products with experts that stay packed, one launch for all of a projection.

A program has one expert and some of its rows (with gating: the same rows of gate and up), and goes along the columns.
One token alone needs no order: a program takes one visit and multiplies in float32, its time is that of reading the
words. With more tokens `_order` sorts the visits in one launch, without a word to the host; programs of experts without
visits end at once, the others run tensor cores over up to 16 or more visits at a time. All of it can be captured in a
CUDA graph. Codes become floats by bits set in a number whose last place is 1, exactly; their product with the scale is
taken in the scale's dtype before tensor cores, as in the twin, and in float32 after the sum where one token is alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecli.ops.packed import LANES, Packed, block_of


class Shape(NamedTuple):
    """How a product is cut: output rows and visits of a program, blocks of columns in one step, warps, stages."""

    rows: int
    visits: int
    blocks: int
    warps: int
    stages: int


# Neither these shapes nor any other were timed on a device yet: `scripts/bench_packed.py --tune` does.
ALONE = {"gated": Shape(16, 1, 4, 4, 2), "plain": Shape(16, 1, 2, 4, 2)}
TOGETHER = {"gated": Shape(32, 16, 1, 4, 3), "plain": Shape(64, 16, 1, 4, 3)}


@triton.jit
def _float(code, HALF: tl.constexpr, dtype: tl.constexpr):
    """code - HALF, exactly: the code's bits are the last of a number above all codes."""
    # one return at the end: Triton compiles what follows a return in a branch
    if dtype == tl.bfloat16:
        value = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128 + HALF)
    elif dtype == tl.float16:
        value = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024 + HALF)
    else:
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + HALF)
    return value


@triton.jit
def _codes(low, high, slot: tl.constexpr, BITS: tl.constexpr):
    if BITS == 4:
        code = (low >> (4 * slot)) & 15
    elif BITS == 3:
        code = ((low >> (2 * slot)) & 3) | (((high >> slot) & 1) << 2)
    else:
        code = (low >> (2 * slot)) & 3
    return code


@triton.jit
def _order(expert, order, start, S, E: tl.constexpr, VISITS: tl.constexpr, CHUNK: tl.constexpr):
    """The visits sorted by expert, and where each expert's begin: by counting what comes before."""
    mine = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)[:, None]
    other = tl.arange(0, VISITS)[None, :]
    own = tl.load(expert + mine, mask=mine < S, other=0)
    theirs = tl.load(expert + other, mask=other < S, other=E)
    before = (theirs < own) | ((theirs == own) & (other < mine))
    place = tl.sum(before.to(tl.int32), 1)
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    tl.store(order + place, slot, mask=slot < S)
    tl.store(start + slot, tl.sum((theirs < mine).to(tl.int32), 1), mask=slot <= E)


@triton.jit
def _alone(
    x, expert, low, high, scale, out, SLOTS, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 if BITS == 4 else 16
    BLOCK: tl.constexpr = PER * 16
    PART: tl.constexpr = SPAN if SPAN < BLOCK else BLOCK
    F: tl.constexpr = N // 2 if GATED else N
    HALF: tl.constexpr = 2 ** (BITS - 1)
    visit = tl.program_id(1).to(tl.int64)
    e = tl.load(expert + visit).to(tl.int64)
    step = tl.arange(0, STEP)[:, None, None]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    token = x + (visit // SLOTS) * K
    total = tl.zeros([STEP, ROWS, 16], tl.float32)
    other = tl.zeros([STEP, ROWS, 16], tl.float32)
    for first in tl.range(0, B, STEP, num_stages=STAGES):
        block = first + step
        at = ((e * B + block) * N + row) * 16 + lane
        inside = (block < B) & (row < F)
        word = tl.load(low + at, mask=inside, other=0)
        third = tl.load(high + at, mask=inside, other=0).to(tl.int32) if BITS == 3 else word
        if GATED:
            word2 = tl.load(low + at + F * 16, mask=inside, other=0)
            third2 = tl.load(high + at + F * 16, mask=inside, other=0).to(tl.int32) if BITS == 3 else word2
        for part in tl.static_range(BLOCK // PART):
            group = tl.minimum((block * BLOCK + part * PART) // SPAN, G - 1)
            where = scale + (e * G + group) * N + row
            sums = tl.zeros([STEP, ROWS, 16], tl.float32)
            sums2 = tl.zeros([STEP, ROWS, 16], tl.float32)
            for i in tl.static_range(PART // 16):
                slot = part * (PART // 16) + i
                column = block * BLOCK + slot * 16 + lane
                value = tl.load(token + column, mask=column < K, other=0.0).to(tl.float32)
                sums += value * _float(_codes(word, third, slot, BITS), HALF, tl.float32)
                if GATED:
                    sums2 += value * _float(_codes(word2, third2, slot, BITS), HALF, tl.float32)
            total += sums * tl.load(where, mask=row < F, other=0.0).to(tl.float32)
            if GATED:
                other += sums2 * tl.load(where + F, mask=row < F, other=0.0).to(tl.float32)
    result = tl.sum(tl.sum(total, 2), 0)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * tl.sum(tl.sum(other, 2), 0)
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + visit * F + column, result.to(out.dtype.element_ty), mask=column < F)


@triton.jit
def _together(
    x, order, start, low, high, scale, out, SLOTS, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, VISITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 if BITS == 4 else 16
    BLOCK: tl.constexpr = PER * 16
    PART: tl.constexpr = SPAN if SPAN < BLOCK else BLOCK
    F: tl.constexpr = N // 2 if GATED else N
    HALF: tl.constexpr = 2 ** (BITS - 1)
    kind: tl.constexpr = x.dtype.element_ty
    exact: tl.constexpr = "ieee"
    e = tl.program_id(1).to(tl.int64)
    begin = tl.load(start + e)
    end = tl.load(start + e + 1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, 16)[None, :]
    for here in range(begin, end, VISITS):
        at_visit = here + tl.arange(0, VISITS)
        visit = tl.load(order + at_visit, mask=at_visit < end, other=0).to(tl.int64)[:, None]
        present = (at_visit < end)[:, None]
        token = x + (visit // SLOTS) * K
        total = tl.zeros([VISITS, ROWS], tl.float32)
        other = tl.zeros([VISITS, ROWS], tl.float32)
        for block in tl.range(0, B, num_stages=STAGES):
            at = ((e * B + block) * N + row) * 16 + lane
            word = tl.load(low + at, mask=row < F, other=0)
            third = tl.load(high + at, mask=row < F, other=0).to(tl.int32) if BITS == 3 else word
            if GATED:
                word2 = tl.load(low + at + F * 16, mask=row < F, other=0)
                third2 = tl.load(high + at + F * 16, mask=row < F, other=0).to(tl.int32) if BITS == 3 else word2
            for part in tl.static_range(BLOCK // PART):
                group = tl.minimum((block * BLOCK + part * PART) // SPAN, G - 1)
                where = scale + (e * G + group) * N + row
                factor = tl.load(where, mask=row < F, other=0.0)
                if GATED:
                    factor2 = tl.load(where + F, mask=row < F, other=0.0)
                for i in tl.static_range(PART // 16):
                    slot = part * (PART // 16) + i
                    column = block * BLOCK + slot * 16 + lane
                    value = tl.load(token + column, mask=present & (column < K), other=0.0)
                    weight = _float(_codes(word, third, slot, BITS), HALF, factor.dtype) * factor
                    total = tl.dot(value, weight.to(kind).T, total, input_precision=exact)
                    if GATED:
                        weight2 = _float(_codes(word2, third2, slot, BITS), HALF, factor.dtype) * factor2
                        other = tl.dot(value, weight2.to(kind).T, other, input_precision=exact)
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * other
        column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
        tl.store(out + visit * F + column, total.to(out.dtype.element_ty), mask=present & (column < F))


@triton.jit
def _dequantize(
    low, high, scale, out, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = 8 if BITS == 4 else 16
    BLOCK: tl.constexpr = PER * 16
    HALF: tl.constexpr = 2 ** (BITS - 1)
    e = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, 16)[None, :]
    at = ((e * B + block) * N + row) * 16 + lane
    word = tl.load(low + at, mask=row < N, other=0)
    third = tl.load(high + at, mask=row < N, other=0).to(tl.int32) if BITS == 3 else word
    for slot in tl.static_range(PER):
        group = tl.minimum((block * BLOCK + slot * 16) // SPAN, G - 1)
        factor = tl.load(scale + (e * G + group) * N + row, mask=row < N, other=0.0)
        weight = _float(_codes(word, third, slot, BITS), HALF, factor.dtype) * factor
        column = block * BLOCK + slot * 16 + lane
        tl.store(out + (e * N + row) * K + column, weight, mask=(row < N) & (column < K))


def dequantized(packed: Packed) -> Tensor:
    low, high, scale = packed.low, packed.high, packed.scale_EGN
    experts, blocks, rows = low.shape[:3]
    out = scale.new_empty(experts, rows, packed.columns)
    grid = (triton.cdiv(rows, 64), blocks, experts)
    _dequantize[grid](
        low, low if high is None else high, scale, out,
        packed.columns, rows, blocks, scale.shape[1], packed.span, packed.bits, 64, num_warps=4,
    )  # fmt: skip
    return out


class Visits(NamedTuple):
    """Visits sorted by expert."""

    order_S: Tensor
    """int32"""
    start_E: Tensor
    """int32 [E + 1]"""


FEW = 16
"""Visits up to which each reads its expert for itself: sorting them would take longer than what it spares."""
_MOST = 1024
"""Visits up to which they are sorted in one launch, whose work is the square of their number."""


def sort_visits(expert_S: Tensor, experts: int) -> Visits:
    """Without a word to the host. Visits of an expert below 0 are sorted too, but belong to none."""
    count = len(expert_S)
    if count > _MOST:
        ordered, order = expert_S.sort(stable=True)
        ends = torch.arange(experts + 1, device=expert_S.device)
        return Visits(order.int(), torch.searchsorted(ordered, ends).int())
    order, start = (torch.empty(n, dtype=torch.int32, device=expert_S.device) for n in (count, experts + 1))
    chunk = 8
    grid = (triton.cdiv(max(count, experts + 1), chunk),)
    _order[grid](expert_S, order, start, count, experts, triton.next_power_of_2(count), chunk, num_warps=4)
    return Visits(order, start)


def gated_product(
    x_TK: Tensor, packed: Packed, expert_S: Tensor, visits: Visits | None = None, out: Tensor | None = None
) -> Tensor:
    return _product(x_TK, packed, expert_S, visits, out, "gated")


def product(
    x_TK: Tensor, packed: Packed, expert_S: Tensor, visits: Visits | None = None, out: Tensor | None = None
) -> Tensor:
    return _product(x_TK, packed, expert_S, visits, out, "plain")


def _product(
    x: Tensor, packed: Packed, expert_S: Tensor, visits: Visits | None, out: Tensor | None, kind: str
) -> Tensor:
    """Without `visits` each visit reads its expert for itself; with them, what `out` has of visits that belong to none
    stays.
    """
    x, low, scale = x.contiguous(), packed.low, packed.scale_EGN
    high = low if packed.high is None else packed.high
    experts, blocks, rows = low.shape[:3]
    gated = kind == "gated"
    width = rows // 2 if gated else rows
    out = x.new_empty(len(expert_S), width) if out is None else out
    sizes = (len(expert_S) // len(x), packed.columns, rows, blocks, scale.shape[1], packed.span, packed.bits, gated)
    shape = (ALONE if visits is None else TOGETHER)[kind]
    tiles = triton.cdiv(width, shape.rows)
    if visits is None:
        step = min(shape.blocks, triton.next_power_of_2(blocks))
        _alone[(tiles, len(expert_S))](
            x, expert_S, low, high, scale, out, *sizes, shape.rows, step, shape.stages, num_warps=shape.warps
        )
    else:
        _together[(tiles, experts)](
            x, *visits, low, high, scale, out, *sizes, shape.rows, shape.visits, shape.stages, num_warps=shape.warps
        )
    return out


assert LANES == 16 and block_of(4) == 128, "the kernels have these numbers written into them"
