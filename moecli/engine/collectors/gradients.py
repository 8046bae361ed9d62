"""Statistics of gradients, collected by a backward sweep (`engine.backward`) and by nothing else.

l is the next-token cross entropy in nats, summed over all tokens of the calibration text; h_tik the intermediate
activation of channel k of expert i for token t (the input of the down projection); dl/dh_tik its gradient, in which the
weight g_ti with which the model really multiplies the expert's output is contained. Sums run over X_i, the
tokens routed to expert i; on an alias checkpoint over tokens routed to a stored expert, with the sum of their weights.
Values are computed in the model's dtype, products in fp32 at least, sums end in fp64.
"""

from __future__ import annotations

from torch import Tensor

from moecli.engine.collectors.base import Collector, LayerShape, Total
from moecli.engine.pullback import Pulled


class _ChannelTotal(Total):
    """A sum for each channel of each expert, float64 [E, F]."""

    needs = frozenset({"gradients"})
    routed = True

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.width)

    def update(self, grouped: Pulled) -> None:
        if not isinstance(grouped, Pulled):
            raise TypeError(f"`{self.name}` is collected by a backward sweep")
        super().update(grouped)


class GradientSquare(_ChannelTotal):
    """Sum over X_i of (dl/dh)^2, the empirical Fisher information of a channel's activation. float64 [E, F], sum.
    HEAPr (2509.22299) in its vector form: with `h2`, s_k = 1/2 * h2_k/n * gh2_k/n.
    """

    name = "gh2"

    def of(self, pulled: Pulled) -> Tensor:
        return pulled.sums.slope_sq_EF


class ActivationGradient(_ChannelTotal):
    """Sum over X_i of h * dl/dh: what the loss changes by, to first order, when a channel grows by its own size.
    float64 [E, F], sum. Taylor scores (1611.06440).
    """

    name = "hgh"

    def of(self, pulled: Pulled) -> Tensor:
        return pulled.sums.product_EF


class ActivationGradientSquare(_ChannelTotal):
    """Sum over X_i of (h * dl/dh)^2, the empirical Fisher information of a mask on the channel, token by token.
    float64 [E, F], sum. Mask-Fisher scores (2204.09656).
    """

    name = "hgh2"

    def of(self, pulled: Pulled) -> Tensor:
        return pulled.sums.product_sq_EF


GRADIENTS: tuple[type[Collector], ...] = (GradientSquare, ActivationGradient, ActivationGradientSquare)
