"""Tensor work of a routed pass whose tokens are sorted by expert: group, gate, combine, and what is read in passing.

T tokens, k experts per token, S = T*k visits sorted by expert, E experts, D model width, F expert width. Every sum over
floats runs in a fixed order, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moecli.ops.kernels import kernels


class Groups(NamedTuple):
    """Visits sorted by expert."""

    expert_S: Tensor
    """int32, ascending"""
    slot_S: Tensor
    """int64, position of each visit in the flattened [T, k]"""
    end_E: Tensor
    """int32, visits of this expert and all before it"""
    place_Tk: Tensor
    """int64, the visit of each slot: the inverse of `slot_S`"""


class Combined(NamedTuple):
    """Routed sums, and what was read of each visit's output on the way when that was asked for."""

    routed_TD: Tensor
    square_S: Tensor | None
    """float32, sum of squares of y"""
    largest_S: Tensor | None
    """float32, largest |y|"""


class Moments(NamedTuple):
    """Channel statistics of each expert's visits, [E, N] each; float32 on CUDA, float64 elsewhere. v value, g gate."""

    total: Tensor
    """sum of v"""
    absolute: Tensor
    """sum of |v|"""
    square: Tensor
    """sum of v^2"""
    gated_square: Tensor
    """sum of (g v)^2"""
    largest: Tensor
    """max |v|, 0 without visits"""
    gated_largest: Tensor
    """max |g v|, 0 without visits"""


def group(index_Tk: Tensor, experts: int) -> Groups:
    """Sort visits by expert; the order of tokens is kept inside an expert."""
    flat = index_Tk.flatten().to(torch.int32)
    expert_S, slot_S = torch.sort(flat, stable=True)
    following = torch.arange(1, experts + 1, dtype=torch.int32, device=flat.device)
    end_E = torch.searchsorted(expert_S, following, out_int32=True)
    place_S = torch.empty_like(slot_S)
    place_S[slot_S] = torch.arange(len(slot_S), device=flat.device)
    return Groups(expert_S, slot_S, end_E, place_S.view(index_Tk.shape))


def linear(x_SD: Tensor, weight_END: Tensor, end_E: Tensor) -> Tensor:
    """x @ weight^T [S, N], each visit by its own expert's weight."""
    return functional.grouped_mm(x_SD, weight_END.transpose(-2, -1), offs=end_E)


def silu_gate(gate_up_SF: Tensor) -> Tensor:
    """silu(gate) * up of [S, 2F] (gate first) -> [S, F], rounded after silu as the stock module rounds."""
    if fast := kernels("grouped", gate_up_SF):
        return fast.silu_gate(gate_up_SF)
    gate_SF, up_SF = gate_up_SF.chunk(2, dim=-1)
    return functional.silu(gate_SF) * up_SF


def silu_gate_sum(gate_up_TEF: Tensor, weight_TE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sum over tokens of silu(gate) * up: [T, E, 2F] -> float32 [E, F]; and the sum weighted by token and expert."""
    if fast := kernels("grouped", gate_up_TEF):
        return fast.silu_gate_sum(gate_up_TEF, weight_TE)
    return sums_over_tokens(silu_gate(gate_up_TEF), weight_TE)


def sums_over_tokens(value_TEF: Tensor, weight_TE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sum over tokens, float32 [E, F], and the weighted one."""
    weighted = None if weight_TE is None else torch.einsum("te,tef->ef", weight_TE, value_TEF.float())
    return value_TEF.sum(0, dtype=torch.float32), weighted


def moments(x: Tensor, row_S: Tensor | None, end_E: Tensor, gate_S: Tensor) -> Moments:
    """Channel statistics of rows sorted by expert, read once. `row_S` says which row of `x` each visit is, None: its
    own; rows after the last expert's are ignored.
    """
    if fast := kernels("grouped", x):
        return Moments(*fast.moments(x, row_S, end_E, gate_S))
    parts, start = [], 0
    for end in end_E.tolist():
        v = x[slice(start, end) if row_S is None else row_S[start:end]].double()
        gv = v * gate_S[start:end, None].double()
        padded, padded_g = (torch.cat([m.abs(), m.new_zeros(1, m.shape[1])]) for m in (v, gv))
        parts.append(
            (v.sum(0), v.abs().sum(0), v.square().sum(0), gv.square().sum(0), padded.amax(0), padded_g.amax(0))
        )
        start = end
    return Moments(*(torch.stack(column) for column in zip(*parts, strict=True)))


def combine(y_SD: Tensor, place_Tk: Tensor, weight_Tk: Tensor, read: bool = False) -> Combined:
    """Weighted sum of each token's visits, in fp32 at least, slots in order; `read` also gives squares and maxima of y.

    Each product is rounded to the type of y times weight first, as the stock module rounds.
    """
    if fast := kernels("grouped", y_SD):
        return Combined(*fast.combine(y_SD, place_Tk, weight_Tk, read))
    products_TkD = y_SD[place_Tk] * weight_Tk[..., None]
    exact = torch.promote_types(products_TkD.dtype, torch.float32)
    routed_TD = products_TkD.sum(1, dtype=exact).to(y_SD.dtype)
    if not read:
        return Combined(routed_TD, None, None)
    values_SD = y_SD.float()
    return Combined(routed_TD, values_SD.square().sum(-1), values_SD.abs().amax(-1))


def turn(before_TD: Tensor, added_TD: Tensor) -> Tensor:
    """max(0, 1 - cos(h, h + r)) of each token, float32 [T]."""
    if fast := kernels("grouped", before_TD):
        return fast.turn(before_TD, added_TD)
    before, after = before_TD.float(), before_TD.float() + added_TD.float()
    return (1 - torch.cosine_similarity(before, after, dim=-1)).clamp(min=0)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, early: bool = True) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in fp32; `early` rounds to x's type before the weight
    is multiplied, as most families do, else only after it.
    """
    if fast := kernels("grouped", x):
        return fast.rms_norm(x, weight_D, eps, early)
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return weight_D * value.to(x.dtype) if early else (weight_D.float() * value).to(x.dtype)
