"""Triton twins of `moecli.ops.packed`: products with experts that stay packed, one launch for all of a projection.

A program has some of the output rows (with gating: the same rows of gate and up) and goes along the columns; its warps
dequantize in registers and multiply on tensor cores. Few visits read their experts each for itself (`_alone`): the
warps of a program share the columns between them, or the slots of a token whose weighted sum it makes. More are sorted
by expert in one launch, without a word to the host, and a program takes the visits of one expert, some at a time
(`_together`); programs of experts without visits end at once. All of it can be captured in a CUDA graph.

A shift and a mask bring down the codes of two neighbouring columns, the first bits of two floats behind a leading 1:
code + 2^bits, exactly. Where visits are sorted, 1.5 * 2^bits is taken off the codes; where they are not, off the sum
over the columns that share a scale: a product of the inputs with ones more, and an operation on each weight less. The
scale is applied to that sum, in float32. The twin's weights are rounded to the scale's dtype, so the results differ by
that rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecli.ops.packed import LANES, SLICE, Packed, block_of


class Shape(NamedTuple):
    """How a product is cut."""

    rows: int
    """Output rows of a program; where visits are sorted and gated, half of its rows are gates"""
    visits: int
    """Of an expert that a program takes at a time; 8 for one that stands alone, the fewest that tensor cores take"""
    parts: int
    """Blocks of columns that the warps of a program share between them, with gating twice as many, or slots; 1 where
    visits are sorted"""
    warps: int
    stages: int


EARLY = torch.cuda.is_available()
"""Whether a product begins while the one that it reads from ends."""
ALONE = {"gated": Shape(16, 8, 4, 4, 3), "plain": Shape(16, 8, 2, 2, 3), "combined": Shape(16, 8, 8, 8, 3)}
TOGETHER = {
    kind: {8: Shape(32, 8, 1, 1, 3), 24: Shape(64, 32, 1, 4, 3), 1 << 30: Shape(128, 64, 1, 4, 3)}
    for kind in ("gated", "plain")
}
"""Of each kind, by how many visits an expert has at most, on average."""


@triton.jit
def _words(low, high, at, inside, BITS: tl.constexpr):
    """Words of codes, and of third bits: those of a word's halves 16 bits apart."""
    word = tl.load(low + at, mask=inside, other=0)
    third = word
    if BITS == 3:
        third = tl.load(high + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
        third = third | (third << 8)
    return word, third


@triton.jit
def _leading(zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """Twice the bits of 2^BITS in 16-bit floats. `zero` is 0, and nothing that the compiler knows: a number of its own
    spares an operation for each pair of weights.
    """
    exponent: tl.constexpr = (127 + BITS) << 7 if dtype == tl.bfloat16 else (15 + BITS) << 10
    return zero | (exponent * 0x10001)


@triton.jit
def _pairs(word, third, leading, slice: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """[..., 16, 2]: the unsigned codes of a slice plus 2^BITS, exactly."""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PLACE: tl.constexpr = 0 if dtype == tl.float32 else (7 if dtype == tl.bfloat16 else 10) - BITS
    # one return at the end: Triton compiles what follows a return in a branch
    both = _shifted(word, WIDTH * slice - PLACE) & ((2**WIDTH - 1 << PLACE) * 0x10001)
    if dtype != tl.float32:
        both ^= leading  # not |, which compilers would put after the next one, where it takes an operation of its own
    if BITS == 3:
        both |= _shifted(third, slice - PLACE - 2) & ((4 << PLACE) * 0x10001)
    first, second = both & 0xFFFF, both >> 16
    if dtype == tl.float32:
        pair = tl.join(first, second).to(tl.float32) + 2**BITS
    else:
        first, second = first.to(tl.int16), second.to(tl.int16)
        pair = tl.join(first.to(dtype, bitcast=True), second.to(dtype, bitcast=True))
    return pair


@triton.jit
def _shifted(word, right: tl.constexpr):
    if right > 0:
        word = word >> right
    elif right < 0:
        word = word << -right
    return word


@triton.jit
def _inputs(x, at, inside, dtype: tl.constexpr):
    """[PARTS, 32, 1]: pairs of inputs. Read as one number each where they are 16 bits: fewer than there are threads,
    so that the compiler reads them where tensor cores want them, and not by way of shared memory.
    """
    if dtype == tl.float32:
        pair = tl.join(tl.load(x + 2 * at, mask=inside, other=0.0), tl.load(x + 2 * at + 1, mask=inside, other=0.0))
    else:
        both = tl.load(x + at, mask=inside, other=0)
        first, second = (both & 0xFFFF).to(tl.int16), (both >> 16).to(tl.int16)
        pair = tl.join(first.to(dtype, bitcast=True), second.to(dtype, bitcast=True))
    return tl.reshape(tl.permute(pair, (0, 1, 3, 2)), [at.shape[0], 32, 1])


@triton.jit
def _factor(
    scale, e, block, group: tl.constexpr, row, inside, N: tl.constexpr, G: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Scales of the columns of a block that share them."""
    at = tl.minimum((block * BLOCK + group * SHARED) // SPAN, G - 1)
    return tl.load(scale + (e * G + at) * N + row, mask=inside, other=0.0)


@triton.jit
def _alone(
    x, expert, weight, low, high, scale, out, SLOTS, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
    G: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = KIND == "gated"
    COMBINED: tl.constexpr = KIND == "combined"
    BLOCK: tl.constexpr = 128 if BITS == 4 else 256
    SHARED: tl.constexpr = SPAN if SPAN < BLOCK else BLOCK
    GROUPS: tl.constexpr = BLOCK // SHARED
    F: tl.constexpr = N // 2 if GATED else N
    STEP: tl.constexpr = 1 if COMBINED else (PARTS // 2 if GATED else PARTS)
    kind: tl.constexpr = out.dtype.element_ty
    part = tl.arange(0, PARTS)
    if EARLY and not COMBINED:
        gdc_wait()
        gdc_launch_dependents()
    if COMBINED:  # a program for a token, a part for each of its slots
        visit = (tl.program_id(1) * SLOTS + part).to(tl.int64)
        e = tl.load(expert + visit, mask=part < SLOTS, other=-1)[:, None, None]
        token = (visit * (K // 2))[:, None, None]
        at_block = tl.zeros([PARTS, 1, 1], tl.int32)
    else:  # a program for a visit, a part for some of its columns, with gating of the gates or of what they gate
        visit = tl.program_id(1).to(tl.int64) + tl.zeros([1], tl.int64)
        e = tl.load(expert + visit)[:, None, None]
        token = (visit // SLOTS * (K // 2))[:, None, None]
        at_block = (part // 2 if GATED else part)[:, None, None]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None]
    present = (e >= 0) & (row < F)
    if GATED:
        row += (part % 2 * F)[:, None, None]
    lane = tl.arange(0, 16)[None, None, :]
    pair = tl.arange(0, 16)[None, :, None]
    leading = _leading((tl.maximum(e, 0) >> 40).to(tl.int32), BITS, kind)
    ones = tl.full([PARTS, ROWS, 32], 1.0, kind)
    # Scales are read one step ahead, when those before are used up; for words and inputs the compiler does that.
    near = _factor(scale, e, at_block, 0, row, present, N, G, SPAN, BLOCK, SHARED)
    far = _factor(scale, e, at_block, GROUPS - 1, row, present, N, G, SPAN, BLOCK, SHARED)
    if EARLY and COMBINED:
        gdc_wait()
    total = tl.zeros([PARTS, ROWS, WIDE], tl.float32)
    for first in tl.range(0, B, STEP, num_stages=STAGES):
        block = at_block + first
        word, third = _words(low, high, ((e * B + block) * N + row) * 16 + lane, present & (block < B), BITS)
        for group in tl.static_range(GROUPS):
            sums = tl.zeros([PARTS, ROWS, WIDE], tl.float32)
            inputs = tl.zeros([PARTS, ROWS, WIDE], tl.float32)
            for slice in tl.static_range(group * SHARED // 32, (group + 1) * SHARED // 32):
                at_pair = block * (BLOCK // 2) + slice * 16 + pair
                value = _inputs(x, token + at_pair, (e >= 0) & (2 * at_pair < K), kind)
                value = tl.broadcast_to(value, [PARTS, 32, WIDE])
                inputs = tl.dot(ones, value, inputs, input_precision="ieee")
                codes = tl.reshape(_pairs(word, third, leading, slice, BITS, kind), [PARTS, ROWS, 32])
                sums = tl.dot(codes, value, sums, input_precision="ieee")
            if group == 0:
                factor = near
            elif group == GROUPS - 1:
                factor = far
            else:
                factor = _factor(scale, e, block, group, row, present, N, G, SPAN, BLOCK, SHARED)
            total += (sums - inputs * (1.5 * 2**BITS)) * factor.to(tl.float32)
        near = _factor(scale, e, block + STEP, 0, row, present, N, G, SPAN, BLOCK, SHARED)
        if GROUPS > 1:
            far = _factor(scale, e, block + STEP, GROUPS - 1, row, present, N, G, SPAN, BLOCK, SHARED)
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if COMBINED:
        total *= tl.load(weight + visit, mask=part < SLOTS, other=0.0).to(tl.float32)[:, None, None]
        target = out + tl.program_id(1).to(tl.int64) * F + column
        known = column < F
    else:
        target = out + visit * F + column
        known = (column < F) & (tl.load(expert + visit) >= 0)
    # the columns of `total` are all alike
    result = tl.sum(tl.where(tl.arange(0, WIDE)[None, None, :] == 0, total, 0.0), 2)
    if GATED:
        both = tl.sum(tl.reshape(result, [PARTS // 2, 2, ROWS]), 0)
        gate, up = tl.split(tl.permute(both, (1, 0)))
        tl.store(target, (gate / (1.0 + tl.exp(-gate)) * up).to(kind), mask=known)
    else:
        tl.store(target, tl.sum(result, 0).to(kind), mask=known)


@triton.jit
def _together(
    x, order, start, low, high, scale, out, SLOTS, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, VISITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = KIND == "gated"
    BLOCK: tl.constexpr = 128 if BITS == 4 else 256
    SHARED: tl.constexpr = SPAN if SPAN < BLOCK else BLOCK
    GROUPS: tl.constexpr = BLOCK // SHARED
    F: tl.constexpr = N // 2 if GATED else N
    WRITTEN: tl.constexpr = ROWS // 2 if GATED else ROWS  # with gating half of a program's rows are gates
    kind: tl.constexpr = x.dtype.element_ty
    e = tl.program_id(1).to(tl.int64)
    begin = tl.load(start + e)
    end = tl.load(start + e + 1)
    at_row = tl.arange(0, ROWS)
    row = (tl.program_id(0) * WRITTEN + at_row % WRITTEN)[:, None]
    known = row < F
    if GATED:
        row += (at_row // WRITTEN * F)[:, None]
    lane = tl.arange(0, 16)[None, :]
    inner = tl.arange(0, 32)[:, None]
    leading = _leading(tl.load(start + e + tl.zeros([1, 1], tl.int32)) >> 31, BITS, kind)
    for here in range(begin, end, VISITS):
        at_visit = (here + tl.arange(0, VISITS))[None, :]
        present = at_visit < end
        visit = tl.load(order + at_visit, mask=present, other=0).to(tl.int64)
        token = x + (visit // SLOTS) * K
        total = tl.zeros([ROWS, VISITS], tl.float32)
        near = _factor(scale, e, 0, 0, row, known, N, G, SPAN, BLOCK, SHARED)
        far = _factor(scale, e, 0, GROUPS - 1, row, known, N, G, SPAN, BLOCK, SHARED)
        for block in tl.range(0, B, num_stages=STAGES):
            word, third = _words(low, high, ((e * B + block) * N + row) * 16 + lane, known, BITS)
            for group in tl.static_range(GROUPS):
                sums = tl.zeros([ROWS, VISITS], tl.float32)
                for slice in tl.static_range(group * SHARED // 32, (group + 1) * SHARED // 32):
                    column = block * BLOCK + slice * 32 + inner
                    value = tl.load(token + column, mask=present & (column < K), other=0.0)
                    codes = tl.reshape(_pairs(word, third, leading, slice, BITS, kind), [ROWS, 32])
                    sums = tl.dot(codes - 1.5 * 2**BITS, value, sums, input_precision="ieee")
                if group == 0:
                    factor = near
                elif group == GROUPS - 1:
                    factor = far
                else:
                    factor = _factor(scale, e, block, group, row, known, N, G, SPAN, BLOCK, SHARED)
                total += sums * factor.to(tl.float32)
            near = _factor(scale, e, block + 1, 0, row, known, N, G, SPAN, BLOCK, SHARED)
            if GROUPS > 1:
                far = _factor(scale, e, block + 1, GROUPS - 1, row, known, N, G, SPAN, BLOCK, SHARED)
        column = (tl.program_id(0) * WRITTEN + tl.arange(0, WRITTEN))[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(total, [2, WRITTEN, VISITS]), (1, 2, 0)))
            result = gate / (1.0 + tl.exp(-gate)) * up
        else:
            result = total
        tl.store(out + visit * F + column, result.to(kind), mask=present & (column < F))


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
def _weigh(y, weight, out, SLOTS, N, COLUMNS: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for visit in range(token * SLOTS, (token + 1) * SLOTS):
        value = tl.load(y + visit * N + column, mask=column < N, other=0.0).to(tl.float32)
        total += value * tl.load(weight + visit).to(tl.float32)
    tl.store(out + token * N + column, total.to(out.dtype.element_ty), mask=column < N)


@triton.jit
def _dequantize(
    low, high, scale, out, K: tl.constexpr, N: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 128 if BITS == 4 else 256
    e = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    word, third = _words(low, high, ((e * B + block) * N + row) * 16 + tl.arange(0, 16)[None, :], row < N, BITS)
    inner = tl.arange(0, 32)[None, :]
    leading = _leading(0, BITS, scale.dtype.element_ty)
    for slice in tl.static_range(BLOCK // 32):
        group = tl.minimum((block * BLOCK + slice * 32) // SPAN, G - 1)
        factor = tl.load(scale + (e * G + group) * N + row, mask=row < N, other=0.0)
        codes = tl.reshape(_pairs(word, third, leading, slice, BITS, factor.dtype), [ROWS, 32]) - 1.5 * 2**BITS
        column = block * BLOCK + slice * 32 + inner
        tl.store(out + (e * N + row) * K + column, codes * factor, mask=(row < N) & (column < K))


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


FEW = 32
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


def combined_product(
    x_SK: Tensor, packed: Packed, expert_S: Tensor, weight_Tk: Tensor, visits: Visits | None = None
) -> Tensor:
    if visits is not None:
        return combined(_product(x_SK, packed, expert_S, visits, None, "plain"), weight_Tk)
    return _product(x_SK, packed, expert_S, None, None, "combined", weight_Tk)


def combined(y_SN: Tensor, weight_Tk: Tensor) -> Tensor:
    """The weighted sum over the slots of each token: [T, N], in float32 and rounded once."""
    (tokens, slots), width = weight_Tk.shape, y_SN.shape[1]
    out = y_SN.new_empty(tokens, width)
    columns = min(512, triton.next_power_of_2(width))
    grid = (triton.cdiv(width, columns), tokens)
    _weigh[grid](y_SN, weight_Tk.contiguous(), out, slots, width, columns, num_warps=2)
    return out


def _product(
    x: Tensor, packed: Packed, expert_S: Tensor, visits: Visits | None, out: Tensor | None, kind: str,
    weight_Tk: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Without `visits` each visit reads its expert for itself. Visits of an expert below 0 belong to none: what `out`
    has of them stays.
    """
    x, low, scale = x.contiguous(), packed.low, packed.scale_EGN
    high = low if packed.high is None else packed.high
    experts, blocks, rows = low.shape[:3]
    gated = kind == "gated"
    width = rows // 2 if gated else rows
    count = len(expert_S) if weight_Tk is None else len(weight_Tk)
    out = x.new_empty(count, width) if out is None else out
    slots = len(expert_S) // (len(x) if weight_Tk is None else count)
    sizes = (slots, packed.columns, rows, blocks, scale.shape[1], packed.span, packed.bits, kind)
    if visits is None:
        shape = ALONE[kind]
        parts = triton.next_power_of_2(slots if kind == "combined" else min(shape.parts, (1 + gated) * blocks))
        grid = (triton.cdiv(width, shape.rows), count)
        weight = expert_S if weight_Tk is None else weight_Tk.contiguous()
        pairs = x if x.dtype == torch.float32 else x.view(torch.int32)
        early = EARLY and torch.cuda.get_device_capability(x.device) >= (9, 0)
        cut = (shape.rows, shape.visits, parts, shape.stages, early)
        begun = {"launch_pdl": True} if early else {}
        _alone[grid](
            pairs, expert_S, weight, low, high, scale, out, *sizes, *cut, num_warps=min(shape.warps, parts), **begun
        )
    else:
        shape = next(shape for most, shape in TOGETHER[kind].items() if len(expert_S) <= most * experts)
        grid = (triton.cdiv(width, shape.rows // (1 + gated)), experts)
        _together[grid](
            x, *visits, low, high, scale, out, *sizes, shape.rows, shape.visits, shape.stages, num_warps=shape.warps
        )
    return out


assert (LANES, SLICE, block_of(4)) == (16, 32, 128), "the kernels have these numbers written into them"
