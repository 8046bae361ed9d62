"""Triton twins of `moecli.ops.grouped`, one pass over memory each.

Bytes are all that counts here: each function reads its inputs once and writes its outputs once. Rows are whole in one
program (up to 16384 wide), so sums have one order whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Elements one program holds."""
_SPLITS = 32
"""Programs that share the tokens of one sum over tokens."""


def _tile(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that takes whole rows."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    return rows, columns, 4 if rows * columns <= 2048 else 8


@triton.jit
def _gated(gate, up):
    gate = gate.to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate))
    return value.to(up.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _silu_gate(source, target, S, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < S) & (column < F)
    gate = tl.load(source + row * (2 * F) + column, mask=inside, other=0.0)
    up = tl.load(source + row * (2 * F) + F + column, mask=inside, other=0.0)
    tl.store(target + row * F + column, _gated(gate, up).to(target.dtype.element_ty), mask=inside)


def silu_gate(gate_up_SF: Tensor) -> Tensor:
    source = gate_up_SF.contiguous()
    width = source.shape[-1] // 2
    target = source.new_empty(*source.shape[:-1], width)
    count = target.numel() // width
    rows, columns, warps = _tile(width)
    _silu_gate[(triton.cdiv(count, rows),)](source, target, count, width, rows, columns, num_warps=warps)
    return target


@triton.jit
def _silu_gate_sum(
    source, weight, target, T, E,
    F: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGH: tl.constexpr,
):  # fmt: skip
    expert, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = (tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    weighted = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        row = ((split * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < T) & (column < F)
        at = source + (row * E + expert) * (2 * F) + column
        gate = tl.load(at, mask=inside, other=0.0)
        up = tl.load(at + F, mask=inside, other=0.0)
        value = _gated(gate, up).to(source.dtype.element_ty).to(tl.float32)
        total += value
        if WEIGH:
            weighted += value * tl.load(weight + row * E + expert, mask=row < T, other=0.0)
    at = target + (split * E + expert) * F + column
    tl.store(at, tl.sum(total, 0)[None, :], mask=column < F)
    if WEIGH:
        splits = tl.num_programs(1)
        tl.store(at + splits * E * F, tl.sum(weighted, 0)[None, :], mask=column < F)


def silu_gate_sum(gate_up_TEF: Tensor, weight_TE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    source = gate_up_TEF.contiguous()
    tokens, experts, width = source.shape[0], source.shape[1], source.shape[2] // 2
    weigh = weight_TE is not None
    weight_TE = weight_TE.contiguous() if weigh else None
    target = torch.empty(1 + weigh, _SPLITS, experts, width, dtype=torch.float32, device=source.device)
    columns = min(256, triton.next_power_of_2(width))
    rows = _TILE // columns
    steps = triton.cdiv(tokens, _SPLITS * rows)
    grid = (experts, _SPLITS, triton.cdiv(width, columns))
    _silu_gate_sum[grid](source, weight_TE, target, tokens, experts, width, steps, rows, columns, weigh, num_warps=8)
    sums = target.sum(1)
    return sums[0], sums[1] if weigh else None


@triton.jit
def _moments(
    x, row, end, gate, target, stride, E,
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    first = tl.load(end + expert - 1, mask=expert > 0, other=0)
    last = tl.load(end + expert)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    absolute, square, gated = total, total, total
    largest, gated_largest = total, total
    for at in range(first, last, ROWS):
        s = (at + tl.arange(0, ROWS))[:, None]
        inside = s < last
        r = s.to(tl.int64)
        if GATHER:
            r = tl.load(row + s, mask=inside, other=0)
        v = tl.load(x + r * stride + column, mask=inside & (column < N), other=0.0).to(tl.float32)
        g = tl.load(gate + s, mask=inside, other=0.0)
        size = tl.abs(v)
        total += v
        absolute += size
        square += v * v
        gated += (g * v) * (g * v)
        largest = tl.maximum(largest, size)
        gated_largest = tl.maximum(gated_largest, tl.abs(g) * size)
    place = target + expert * N + column
    one = E * N
    mask = column < N
    tl.store(place, tl.sum(total, 0)[None, :], mask=mask)
    tl.store(place + one, tl.sum(absolute, 0)[None, :], mask=mask)
    tl.store(place + 2 * one, tl.sum(square, 0)[None, :], mask=mask)
    tl.store(place + 3 * one, tl.sum(gated, 0)[None, :], mask=mask)
    tl.store(place + 4 * one, tl.max(largest, 0)[None, :], mask=mask)
    tl.store(place + 5 * one, tl.max(gated_largest, 0)[None, :], mask=mask)


def moments(x: Tensor, row_S: Tensor | None, end_E: Tensor, gate_S: Tensor) -> Tensor:
    x = x.contiguous()
    width, experts = x.shape[1], len(end_E)
    target = torch.empty(6, experts, width, dtype=torch.float32, device=x.device)
    columns = min(128, triton.next_power_of_2(width))
    grid = (triton.cdiv(width, columns), experts)
    _moments[grid](
        x, row_S, end_E, gate_S, target, x.stride(0), experts, width, 16, columns, row_S is not None, num_warps=4
    )
    return target


@triton.jit
def _combine(
    y, place, weight, routed, square, largest,
    D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < D
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(K):
        visit = tl.load(place + token * K + slot)
        gate = tl.load(weight + token * K + slot).to(tl.float32)
        value = tl.load(y + visit * D + column, mask=inside, other=0.0).to(tl.float32)
        if READ:
            tl.store(square + visit, tl.sum(value * value))
            tl.store(largest + visit, tl.max(tl.abs(value)))
        total += (value * gate).to(PRODUCT).to(tl.float32)
    tl.store(routed + token * D + column, total.to(routed.dtype.element_ty), mask=inside)


_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def combine(
    y_SD: Tensor, place_Tk: Tensor, weight_Tk: Tensor, read: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    (tokens, slots), width = place_Tk.shape, y_SD.shape[1]
    routed = y_SD.new_empty(tokens, width)
    square, largest = (torch.empty(len(y_SD), dtype=torch.float32, device=y_SD.device) for _ in range(2))
    product = _TRITON[torch.promote_types(y_SD.dtype, weight_Tk.dtype)]
    columns = triton.next_power_of_2(width)
    _combine[(tokens,)](
        y_SD, place_Tk.contiguous(), weight_Tk.contiguous(), routed, square, largest,
        width, slots, columns, read, product, num_warps=4 if columns <= 2048 else 8,
    )  # fmt: skip
    return (routed, square, largest) if read else (routed, None, None)


@triton.jit
def _turn(before, added, target, D: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    first = tl.load(before + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    second = first + tl.load(added + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    lengths = tl.maximum(tl.sqrt(tl.sum(first * first)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(second * second)), 1e-8)
    tl.store(target + token, tl.maximum(1.0 - tl.sum(first * second) / lengths, 0.0))


def turn(before_TD: Tensor, added_TD: Tensor) -> Tensor:
    tokens, width = before_TD.shape
    target = torch.empty(tokens, dtype=torch.float32, device=before_TD.device)
    columns = triton.next_power_of_2(width)
    _turn[(tokens,)](
        before_TD.contiguous(), added_TD.contiguous(), target, width, columns, num_warps=4 if columns <= 2048 else 8
    )
    return target


@triton.jit
def _rms_norm(
    x, weight, target, S, eps, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < S) & (column < D)
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    value = value * scale[:, None]
    if EARLY:
        value = value.to(x.dtype.element_ty).to(tl.float32)
    by = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(target + row * D + column, (value * by).to(target.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, early: bool) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    dtype = torch.promote_types(x.dtype, weight_D.dtype) if early else x.dtype
    target = torch.empty(x.shape, dtype=dtype, device=x.device)
    count = x.numel() // width
    rows, columns, warps = _tile(width)
    grid = (triton.cdiv(count, rows),)
    _rms_norm[grid](x, weight_D, target, count, eps, width, rows, columns, early, num_warps=warps)
    return target
