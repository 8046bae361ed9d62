"""Energies of channels: of an expert's inputs x (D of them) and of what its down projection takes, h (F).

p is the weight g that the model multiplies the expert's output with. The variance of a channel needs no statistic of
its own: h2/n - (h1/n)^2 in float64 (`engine.stats.channel_variance`), which adds up over runs where a running variance
does not.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from moecli.engine.collectors.base import LayerShape, Total
from moecli.engine.collectors.grouped import Grouped


class _Channel(Total):
    routed = True
    moment: ClassVar[Literal["total", "absolute", "square", "gated_square", "largest", "gated_largest"]]


class _OfInput(_Channel):
    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.hidden)

    def of(self, grouped: Grouped) -> Tensor:
        return getattr(grouped.input_moments, self.moment)


class _OfInner(_Channel):
    needs = frozenset({"inner"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.width)

    def of(self, grouped: Grouped) -> Tensor:
        return getattr(grouped.inner_moments, self.moment)


class X2(_OfInput):
    """Sum over X_i of x_tj^2. float64 [E, D], sum. Wanda (2306.11695), MoE-Pruner, SLiM (`sqmean`)."""

    name = "x2"
    moment = "square"


class Px2(_OfInput):
    """Sum over X_i of p_ti^2 x_tj^2. float64 [E, D], sum. MoE-Pruner (2410.12013)."""

    name = "px2"
    moment = "gated_square"


class XAbs(_OfInput):
    """Sum over X_i of |x_tj|. float64 [E, D], sum. AWQ, LQER (`absmean`)."""

    name = "x_abs"
    moment = "absolute"


class XMax(_OfInput):
    """Largest |x_tj| over X_i. float32 [E, D], maximum. EAQuant (2506.13329), SmoothQuant."""

    name = "x_max"
    moment = "largest"
    reduce = "max"
    dtype = torch.float32


class H1(_OfInner):
    """Sum over X_i of h_tk. float64 [E, F], sum. FLAP's mean, which becomes a bias of what is pruned (2312.11983)."""

    name = "h1"
    moment = "total"


class H2(_OfInner):
    """Sum over X_i of h_tk^2. float64 [E, F], sum. HEAPr (2509.22299), slimming; x2 of the down projection."""

    name = "h2"
    moment = "square"


class HAbs(_OfInner):
    """Sum over X_i of |h_tk|. float64 [E, F], sum. `x_abs` of the down projection."""

    name = "h_abs"
    moment = "absolute"


class HMax(_OfInner):
    """Largest |h_tk| over X_i. float32 [E, F], maximum. `x_max` of the down projection."""

    name = "h_max"
    moment = "largest"
    reduce = "max"
    dtype = torch.float32


class Ph2(_OfInner):
    """Sum over X_i of (p_ti h_tk)^2. float64 [E, F], sum. CAMERA (2508.02322); px2 of the down projection."""

    name = "ph2"
    moment = "gated_square"


class PhMax(_OfInner):
    """Largest |p_ti h_tk| over X_i. float32 [E, F], maximum. CAMERA (2508.02322)."""

    name = "phmax"
    moment = "gated_largest"
    reduce = "max"
    dtype = torch.float32
