"""Triton twin of `moecli.ops.gptq.solve_block`: all experts and row tiles in one launch, a tile held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
"""Rows one program holds; rows do not depend on each other, so any number is exact."""


@triton.jit
def _solve_block(
    weight, upper, scale, codes, errors, R,
    width: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < R)[:, None] & (column < width)[None, :]
    place = expert * R * width + row[:, None] * width + column[None, :]
    left = tl.load(weight + place, mask=inside, other=0.0)
    scales = tl.load(scale + place, mask=inside, other=1.0)
    found = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    wrong = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for j in range(width):
        here = (column == j)[None, :]
        u = tl.load(upper + expert * width * width + j * width + column, mask=column < width, other=0.0)
        step = tl.sum(tl.where(here, scales, 0.0), axis=1)
        value = tl.sum(tl.where(here, left, 0.0), axis=1)
        code = tl.minimum(tl.maximum(_round_half_even(_div(value, step)), LOW), HIGH)
        pivot = tl.sum(tl.where(column == j, u, 0.0), axis=0)
        error = _div(value - code * step, pivot)
        left -= error[:, None] * tl.where(column > j, u, 0.0)[None, :]
        found = tl.where(here, code[:, None], found)
        wrong = tl.where(here, error[:, None], wrong)
    tl.store(codes + place, found.to(tl.int8), mask=inside)
    tl.store(errors + place, wrong, mask=inside)


@triton.jit
def _div(above, below):
    """Division rounded as IEEE 754 says, like the twin's; Triton's `/` is a few units off."""
    return tl.math.div_rn(above, below)


@triton.jit
def _round_half_even(value):
    """To the nearest integer, ties to even, for |value| < 2^22."""
    magic = 12582912.0  # 1.5 * 2^23: the sum has no bits left for a fraction
    return (value + magic) - magic


def solve_block(weight_ERB: Tensor, upper_EBB: Tensor, scale_ERB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    experts, rows, width = weight_ERB.shape
    weight, upper, scale = (t.contiguous() for t in (weight_ERB, upper_EBB, scale_ERB))
    codes, errors = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    grid = (triton.cdiv(rows, _ROWS), experts)
    columns = triton.next_power_of_2(width)
    _solve_block[grid](
        weight, upper, scale, codes, errors, rows,
        width, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, _ROWS, columns, num_warps=4,
    )  # fmt: skip
    return codes, errors
