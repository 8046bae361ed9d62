"""Triton twin of `moecli.ops.gram.add`: one program a tile of the upper triangle of one group's matrix.

Rows are gathered while they are read, so no sorted copy is needed. Each program goes through its group's rows in order
and adds into its own tile, so runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128
_ROWS = 64


@triton.jit
def _add(
    total, x, row, end, weight, stride, N,
    TILE: tl.constexpr, ROWS: tl.constexpr, GATHER: tl.constexpr, WEIGH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    tile = tl.program_id(0)
    # tile = right * (right + 1) / 2 + left with left <= right
    right = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    right = tl.where(right * (right + 1) // 2 > tile, right - 1, right)
    right = tl.where((right + 1) * (right + 2) // 2 <= tile, right + 1, right)
    left = tile - right * (right + 1) // 2
    first = tl.load(end + group - 1, mask=group > 0, other=0)
    last = tl.load(end + group)
    column_left = left * TILE + tl.arange(0, TILE)
    column_right = right * TILE + tl.arange(0, TILE)
    found = tl.zeros([TILE, TILE], tl.float32)
    for at in range(first, last, ROWS):
        s = at + tl.arange(0, ROWS)
        inside = s < last
        r = s.to(tl.int64)
        if GATHER:
            r = tl.load(row + s, mask=inside, other=0)
        source = x + r[:, None] * stride
        a = tl.load(source + column_left[None, :], mask=inside[:, None] & (column_left[None, :] < N), other=0.0)
        b = tl.load(source + column_right[None, :], mask=inside[:, None] & (column_right[None, :] < N), other=0.0)
        if WEIGH:
            w = tl.load(weight + s, mask=inside, other=0.0)
            exact = b.to(tl.float32) * w[:, None]
            b = exact.to(x.dtype.element_ty)
            if SPLIT:
                rest = (exact - b.to(tl.float32)).to(x.dtype.element_ty)
                found = tl.dot(tl.trans(a), rest, found, input_precision="ieee")
        found = tl.dot(tl.trans(a), b, found, input_precision="ieee")
    place = total + group.to(tl.int64) * N * N + column_left[:, None] * N + column_right[None, :]
    mask = (column_left[:, None] < N) & (column_right[None, :] < N)
    if last > first:
        tl.store(place, tl.load(place, mask=mask, other=0.0) + found, mask=mask)


def add(total_ENN: Tensor, x: Tensor, row_S: Tensor | None, end_E: Tensor, weight_S: Tensor | None = None) -> None:
    x = x.contiguous()
    groups, width = total_ENN.shape[:2]
    tile, rows = (_TILE, _ROWS) if x.dtype != torch.float32 else (64, 32)
    tiles = triton.cdiv(width, tile)
    _add[(tiles * (tiles + 1) // 2, groups)](
        total_ENN, x, row_S, end_E, weight_S, x.stride(0), width,
        tile, rows, row_S is not None, weight_S is not None, x.dtype != torch.float32,
        num_warps=4, num_stages=3,
    )  # fmt: skip
