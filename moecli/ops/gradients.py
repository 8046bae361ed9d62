"""The way back through a routed pass whose tokens are sorted by expert, and sums over each expert's visits.

T tokens, k experts per token, S = T*k visits sorted by expert, E experts, D model width, F expert width. Gradients are
those of activations, never of weights. Every sum over floats runs in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moecli.ops.kernels import kernels


class GateBack(NamedTuple):
    """What the way back through silu(gate) * up gives; in the dtype of its inputs where nothing else is said."""

    gate_up_SF: Tensor
    """gradient of [gate, up], [S, 2F]"""
    inner_SF: Tensor
    """h = silu(gate) * up again, rounded as on the way there"""
    inner_grad_SF: Tensor
    """gradient of h"""
    weight_S: Tensor
    """float32 (float64 for float64), sum over F of h * slope: gradient of the visit's weight, but for an output bias"""


class ChannelSums(NamedTuple):
    """Sums over each expert's visits, float64 [E, F]."""

    value_sq_EF: Tensor
    """sum of h^2"""
    slope_sq_EF: Tensor
    """sum of g^2"""
    product_EF: Tensor
    """sum of h * g"""
    product_sq_EF: Tensor
    """sum of (h * g)^2"""


def silu_gate_back(gate_up_SF: Tensor, slope_SF: Tensor, weight_S: Tensor) -> GateBack:
    """Back through h = silu(gate) * up, [S, 2F] (gate first), for visits that are weighted after the down projection.

    `slope_SF` is the gradient of the weighted sum times the down projection, `weight_S` the visit's weight: the
    gradient of h is weight * slope. Arithmetic in float32 at least, each result rounded once, silu rounded as the
    forward pass rounds it.
    """
    if fast := kernels("gradients", gate_up_SF):
        return GateBack(*fast.silu_gate_back(gate_up_SF, slope_SF, weight_S))
    dtype, exact = gate_up_SF.dtype, torch.promote_types(gate_up_SF.dtype, torch.float32)
    gate_SF, up_SF = (x.to(exact) for x in gate_up_SF.chunk(2, dim=-1))
    sigmoid_SF = gate_SF.sigmoid()
    active_SF = (gate_SF * sigmoid_SF).to(dtype).to(exact)
    inner_SF = (active_SF * up_SF).to(dtype)
    grad_SF = slope_SF.to(exact) * weight_S[:, None].to(exact)
    gate_grad_SF = grad_SF * up_SF * sigmoid_SF * (1 + gate_SF * (1 - sigmoid_SF))
    both_SF = torch.cat((gate_grad_SF, grad_SF * active_SF), dim=-1).to(dtype)
    return GateBack(both_SF, inner_SF, grad_SF.to(dtype), (inner_SF.to(exact) * slope_SF.to(exact)).sum(-1))


def channel_sums(inner_SF: Tensor, slope_SF: Tensor, end_E: Tensor) -> ChannelSums:
    """h^2, g^2, h*g and (h*g)^2 summed over the visits of each expert; `end_E` int32, visits up to and with it."""
    if fast := kernels("gradients", inner_SF):
        return ChannelSums(*fast.channel_sums(inner_SF, slope_SF, end_E).double().unbind())
    value_SF, grad_SF = inner_SF.double(), slope_SF.double()
    product_SF = value_SF * grad_SF
    lengths = torch.diff(end_E, prepend=end_E.new_zeros(1)).long()
    terms = (value_SF.square(), grad_SF.square(), product_SF, product_SF.square())
    return ChannelSums(*(torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True, initial=0) for x in terms))


def linear_back(grad_SN: Tensor, weight_END: Tensor, end_E: Tensor) -> Tensor:
    """grad @ weight [S, D]: back through `ops.grouped.linear`, each visit by its own expert's weight."""
    return functional.grouped_mm(grad_SN, weight_END, offs=end_E)


def rms_norm_back(x: Tensor, weight_D: Tensor, grad: Tensor, eps: float) -> Tensor:
    """Gradient of x for weight * x / sqrt(mean(x^2) + eps) over the last dimension; roundings count as none."""
    if fast := kernels("gradients", x):
        return fast.rms_norm_back(x, weight_D, grad, eps)
    exact = torch.promote_types(x.dtype, torch.float32)
    value, scaled = x.to(exact), grad.to(exact) * weight_D.to(exact)
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (inverse * (scaled - value * inverse.square() * (scaled * value).mean(-1, keepdim=True))).to(x.dtype)
