"""Scales of inputs that make rounding cheaper where inputs are large (AWQ), as powers of two.

Letters: E matrices, R outputs, C inputs, g inputs that share a scale of the grid.

W diag(s) is rounded, and its inputs come divided by s. Scales that are powers of two change no mantissa: whatever takes
them up (a norm's weight, the rows of another matrix) computes the same bits as before, in every floating-point type.

Source: AWQ (arXiv 2306.00978). Its code takes s as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moecli.ops.pack import dequantize, group_scale, rounded_again

GRID = 20
"""Ratios that are tried: 0, 1/20, ... 19/20."""
LEAST = 1e-4


def weight_sizes(weight_ERC: Tensor, group_size: int) -> Tensor:
    """Mean over outputs of |w| / max |w| of its group, [E, C] in fp32: how much of its group's range an input uses."""
    grouped = weight_ERC.float().abs().unflatten(-1, (-1, group_size))
    relative = grouped / grouped.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return relative.flatten(-2).mean(-2)


def candidates(input_EC: Tensor, weight_EC: Tensor) -> Iterator[Tensor]:
    """Scales [E, C] to try: none, then for each ratio r of the grid s = x^r / (w^(1-r) + 1e-4), divided by
    sqrt(min s max s) and rounded to a power of two. `input_EC`: mean |x|.
    """
    x_EC = input_EC.float().clamp(min=LEAST)
    yield torch.ones_like(x_EC)
    for step in range(GRID):
        r = step / GRID
        scale_EC = x_EC**r / (weight_EC ** (1 - r) + LEAST)
        middle_E = (scale_EC.amin(-1, keepdim=True) * scale_EC.amax(-1, keepdim=True)).sqrt()
        yield power_of_two(scale_EC / middle_E)


def power_of_two(value: Tensor) -> Tensor:
    """The nearest power of two by ratio."""
    return torch.exp2(value.log2().round())


def rounded(weight_ERC: Tensor, scale_EC: Tensor, bits: int, group_size: int) -> Tensor:
    """Q(W diag(s)) diag(1/s): what is left of the weights when they are rounded with these scales of their inputs."""
    scaled = (weight_ERC * scale_EC[:, None]).to(weight_ERC.dtype)
    grid = group_scale(scaled, bits, group_size)
    return dequantize(rounded_again(scaled.float(), grid, bits), grid) / scale_EC[:, None]
