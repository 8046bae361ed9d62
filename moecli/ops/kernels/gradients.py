"""Triton twins of `moecli.ops.gradients`, one pass over memory each.

Sums over an expert's visits: each of `_SPLITS` programs takes every `_SPLITS`-th block of its rows, and the partial
sums are added in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecli.ops.kernels.grouped import _tile

_SPLITS = 8
_ROWS, _COLUMNS = 32, 128


@triton.jit
def _silu_gate_back(
    source, slope, weight, back, inner, inner_grad, weight_grad, S,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    line = row[:, None]
    inside = (line < S) & (column < F)
    gate = tl.load(source + line * (2 * F) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + line * (2 * F) + F + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(slope + line * F + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(weight + row, mask=row < S, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    active = (gate * sigmoid).to(source.dtype.element_ty).to(tl.float32)
    h = (active * up).to(source.dtype.element_ty)
    grad = u * by[:, None]
    gate_grad = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(back + line * (2 * F) + column, gate_grad.to(back.dtype.element_ty), mask=inside)
    tl.store(back + line * (2 * F) + F + column, (grad * active).to(back.dtype.element_ty), mask=inside)
    tl.store(inner + line * F + column, h, mask=inside)
    tl.store(inner_grad + line * F + column, grad.to(inner_grad.dtype.element_ty), mask=inside)
    tl.store(weight_grad + row, tl.sum(h.to(tl.float32) * u, 1), mask=row < S)


def silu_gate_back(gate_up_SF: Tensor, slope_SF: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source, slope = gate_up_SF.contiguous(), slope_SF.contiguous()
    count, width = slope.shape
    back, inner, inner_grad = torch.empty_like(source), torch.empty_like(slope), torch.empty_like(slope)
    weight_grad = torch.empty(count, dtype=torch.float32, device=source.device)
    rows, columns, warps = _tile(width)
    _silu_gate_back[(triton.cdiv(count, rows),)](
        source, slope, weight_S.contiguous(), back, inner, inner_grad, weight_grad, count, width, rows, columns,
        num_warps=warps,
    )  # fmt: skip
    return back, inner, inner_grad, weight_grad


@triton.jit
def _channel_sums(
    inner, slope, end, target, E,
    F: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert, split = tl.program_id(0), tl.program_id(1)
    column = (tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    first = tl.load(end + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    last = tl.load(end + expert).to(tl.int64)
    a = tl.zeros([ROWS, COLUMNS], tl.float32)
    b = tl.zeros([ROWS, COLUMNS], tl.float32)
    c = tl.zeros([ROWS, COLUMNS], tl.float32)
    d = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first + split * ROWS, last, SPLITS * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < last) & (column < F)
        h = tl.load(inner + row * F + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(slope + row * F + column, mask=inside, other=0.0).to(tl.float32)
        product = h * g
        a += h * h
        b += g * g
        c += product
        d += product * product
    step = SPLITS * E * F
    at = target + (split * E + expert).to(tl.int64) * F + column
    tl.store(at, tl.sum(a, 0)[None, :], mask=column < F)
    tl.store(at + step, tl.sum(b, 0)[None, :], mask=column < F)
    tl.store(at + 2 * step, tl.sum(c, 0)[None, :], mask=column < F)
    tl.store(at + 3 * step, tl.sum(d, 0)[None, :], mask=column < F)


def channel_sums(inner_SF: Tensor, slope_SF: Tensor, end_E: Tensor) -> Tensor:
    """float64 [4, E, F]"""
    experts, width = len(end_E), inner_SF.shape[1]
    target = torch.empty(4, _SPLITS, experts, width, dtype=torch.float32, device=inner_SF.device)
    grid = (experts, _SPLITS, triton.cdiv(width, _COLUMNS))
    _channel_sums[grid](
        inner_SF.contiguous(), slope_SF.contiguous(), end_E.contiguous(), target, experts, width, _SPLITS, _ROWS,
        _COLUMNS, num_warps=8,
    )  # fmt: skip
    return target.sum(1, dtype=torch.float64)


@triton.jit
def _rms_norm_back(x, weight, grad, target, S, eps, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < S) & (column < D)
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    scaled = tl.load(grad + row * D + column, mask=inside, other=0.0).to(tl.float32) * by
    inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    turned = (tl.sum(scaled * value, 1) / D)[:, None]
    found = inverse * (scaled - value * inverse * inverse * turned)
    tl.store(target + row * D + column, found.to(target.dtype.element_ty), mask=inside)


def rms_norm_back(x: Tensor, weight_D: Tensor, grad: Tensor, eps: float) -> Tensor:
    x, grad = x.contiguous(), grad.contiguous()
    width = x.shape[-1]
    target = torch.empty_like(x)
    count = x.numel() // width
    rows, columns, warps = _tile(width)
    _rms_norm_back[(triton.cdiv(count, rows),)](
        x, weight_D, grad, target, count, eps, width, rows, columns, num_warps=warps
    )
    return target
