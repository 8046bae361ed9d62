"""Channels of an expert rounded to bits of their own (CAMERA-Q).

Letters: E experts, F channels, D model width, R rows. Channel k is row k of gate and up and column k of down. The order
of an expert's channels changes nothing that it computes, so channels of one tier may lie side by side: groups of down's
columns that share a scale are then of one tier. A row of gate or up has its tier's bits as a whole.

Source: arXiv 2508.02322.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecli.ops.pack import dequantize, quantize_rtn


def rounded_rows(
    weight_ERC: Tensor, tier_ER: Tensor, bits: Sequence[int], group_size: int, shrink: bool = False
) -> Tensor:
    """What is left of each row at the bits of its tier, in the weights' dtype; groups of columns share a scale."""
    left_ERC = weight_ERC
    for tier, width in enumerate(bits):
        rounded_ERC = dequantize(*quantize_rtn(weight_ERC, width, group_size, shrink))
        left_ERC = torch.where((tier_ER == tier)[..., None], rounded_ERC, left_ERC)
    return left_ERC


def rounded_columns(
    weight_ERC: Tensor, order_EC: Tensor, tier_EC: Tensor, bits: Sequence[int], group_size: int, shrink: bool = False
) -> Tensor:
    """The same for columns, which stay where they are: sorted by `order_EC` (int64) each run of `group_size` of them
    has one tier and, in each row, one scale. ValueError where a run has several tiers.
    """
    sorted_EC = tier_EC.gather(1, order_EC)
    if bool((sorted_EC.unflatten(1, (-1, group_size)) != sorted_EC[:, ::group_size, None]).any()):
        raise ValueError(f"{group_size} columns that share a scale are of different tiers")
    index_ERC = order_EC[:, None].expand_as(weight_ERC)
    sorted_ERC, left_ERC = weight_ERC.gather(2, index_ERC), torch.empty_like(weight_ERC)
    rounded_ERC = sorted_ERC
    for tier, width in enumerate(bits):
        some_ERC = dequantize(*quantize_rtn(sorted_ERC, width, group_size, shrink))
        rounded_ERC = torch.where((sorted_EC == tier)[:, None], some_ERC, rounded_ERC)
    return left_ERC.scatter_(2, index_ERC, rounded_ERC)
