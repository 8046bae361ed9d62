"""Triton twin of `moecli.ops.gptq.solve_block`: all experts and rows in one launch.

A program is one warp and holds all columns of the block for its rows, a thread whole rows of it, so that no thread
waits for another one. The loop over columns stays a loop: written out 32 times it takes half a minute to compile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 128
"""Rows one program holds; rows do not depend on each other, so any number is exact."""
_COLUMNS = 32
"""Columns a tile has at least, so that one compiled kernel serves all blocks."""


@triton.jit
def _solve_block(
    left, upper, scale, group, codes, R, width, low, high, left_e, upper_e, upper_b, scale_e, group_e, codes_e,
    SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < R
    left += expert * left_e
    upper += expert * upper_e
    scale += expert * scale_e
    group += expert * group_e
    codes += expert * codes_e
    within = column < width
    held = tl.load(left + column[:, None] * R + row[None, :], mask=within[:, None] & inside[None, :], other=0.0)
    for j in range(width):
        step = tl.load(scale + tl.load(group + j) * R + row, mask=inside, other=1.0)
        value = tl.sum(tl.where((column == j)[:, None], held, 0.0), axis=0)
        if SIGN:
            code = tl.where(_div(value, step) < 0, -1.0, 1.0)
        else:
            code = tl.minimum(tl.maximum(_round_half_even(_div(value, step)), low), high)
        error = _div(value - code * step, tl.load(upper + j * upper_b + j))
        # Columns up to j change too where `upper` is no zero there; nothing reads them again.
        u = tl.load(upper + j * upper_b + column, mask=within, other=0.0)
        held -= u[:, None] * error[None, :]
        tl.store(codes + j * R + row, code.to(tl.int8), mask=inside)
        tl.store(left + j * R + row, error, mask=inside)


@triton.jit
def _div(above, below):
    """Division rounded as IEEE 754 says, like the twin's; Triton's `/` is a few units off."""
    return tl.math.div_rn(above, below)


@triton.jit
def _round_half_even(value):
    """To the nearest integer, ties to even, for |value| < 2^22."""
    magic = 12582912.0  # 1.5 * 2^23: the sum has no bits left for a fraction
    return (value + magic) - magic


def solve_block(
    left_EBR: Tensor, upper_EBB: Tensor, scale_EGR: Tensor, group_EB: Tensor, codes_EBR: Tensor, bits: int
) -> None:
    experts, width, rows = left_EBR.shape
    _solve_block[(triton.cdiv(rows, _ROWS), experts)](
        left_EBR, upper_EBB, scale_EGR, group_EB, codes_EBR, rows, width, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1,
        left_EBR.stride(0), upper_EBB.stride(0), upper_EBB.stride(1), scale_EGR.stride(0), group_EB.stride(0),
        codes_EBR.stride(0), bits == 1, _ROWS, max(_COLUMNS, triton.next_power_of_2(width)), num_warps=1,
    )  # fmt: skip
