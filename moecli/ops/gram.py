"""Gram matrices of rows sorted by group, added into totals of which only the upper triangle is kept until the end.

S rows sorted by group, E groups, N width. Every sum runs in a fixed order, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecli.ops.kernels import kernels

_MIRRORED = 256
"""Columns that `whole` mirrors at a time."""
_PAIR_BYTES = 256 << 20
"""Gram matrices of single tokens held at a time."""


def add(total_ENN: Tensor, x: Tensor, row_S: Tensor | None, end_E: Tensor, weight_S: Tensor | None = None) -> None:
    """total[e] += sum over the rows s of group e of w_s x_s x_s^T; at least the upper triangle is right afterwards.

    `row_S` (int64) says which row of `x` each s is, None: its own; `end_E` (int32) counts the rows of this group and
    all before it; rows after the last group are ignored. fp32 products and sums within one call; bf16 values with
    weights are multiplied in two bf16 parts on CUDA (relative error 2^-16).
    """
    if fast := kernels("gram", x):
        fast.add(total_ENN, x, row_S, end_E, weight_S)
        return
    start = 0
    for total_NN, end in zip(total_ENN, end_E.tolist(), strict=True):
        rows = slice(start, end) if row_S is None else row_S[start:end]
        values = x[rows].float()
        weighted = values if weight_S is None else values * weight_S[start:end, None]
        total_NN += values.T @ weighted
        start = end


def add_cross(
    total_ENN: Tensor, left_SN: Tensor, right_SN: Tensor, end_E: Tensor, weight_S: Tensor | None = None
) -> None:
    """total[e] += sum over the rows s of group e of w_s l_s r_s^T, whole matrices; groups as for `add`. fp32 products
    and sums within one call, one product a group: the device is waited for once.
    """
    start = 0
    for total_NN, end in zip(total_ENN, end_E.tolist(), strict=True):
        left = left_SN[start:end].float()
        total_NN += (left if weight_S is None else left * weight_S[start:end, None]).T @ right_SN[start:end].float()
        start = end


def whole(total_ENN: Tensor) -> Tensor:
    """The full matrices, the lower triangle copied from the upper; in place."""
    for start in range(0, total_ENN.shape[-1], _MIRRORED):
        end = start + _MIRRORED
        total_ENN[:, end:, start:end] = total_ENN[:, start:end, end:].mT
        on_diagonal = total_ENN[:, start:end, start:end]
        on_diagonal.copy_(on_diagonal.triu() + on_diagonal.triu(1).mT)
    return total_ENN


def cosine_gram(y_ETD: Tensor) -> Tensor:
    """Sum over tokens of cos(y_ti, y_tj) for every pair, float32 [E, E]; 0 where a vector is 0.

    Outputs are multiplied as they are and scaled afterwards, so that bf16 loses nothing.
    """
    experts = len(y_ETD)
    total_EE = torch.zeros(experts, experts, dtype=torch.float32, device=y_ETD.device)
    for y_TED in y_ETD.transpose(0, 1).split(max(1, _PAIR_BYTES // (4 * experts * experts))):
        product_TEE = _products(y_TED)
        norm_TE = product_TEE.diagonal(dim1=1, dim2=2).sqrt()
        scale_TE = torch.where(norm_TE > 0, 1 / norm_TE, 0)
        total_EE += (product_TEE * scale_TE[:, :, None] * scale_TE[:, None, :]).sum(0)
    return total_EE


def _products(y_TED: Tensor) -> Tensor:
    """y y^T of each token in fp32."""
    if y_TED.is_cuda and y_TED.dtype == torch.bfloat16:
        return torch.bmm(y_TED, y_TED.mT, out_dtype=torch.float32)
    values = y_TED.float()
    return torch.bmm(values, values.mT)
