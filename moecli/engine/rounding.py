"""What rounding one expert does to a layer's output, for every expert and several numbers of bits at once.

With expert e alone rounded to b bits, the routed sum of a token t changes by g_te (y_te - y_te(b)) where t is routed
to e, and not at all elsewhere: routing does not depend on experts. So all experts together cost one more pass of the
routed tokens for each number of bits, where a literal reading takes a forward pass for each expert and each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moecli.engine.collectors import Collector, Grouped, LayerShape
from moecli.engine.probe import run_experts

Rounding = Callable[[Tensor, int], Tensor]
"""(weight [..., N outputs, K inputs], bits) -> the values that are left of it, of the same shape"""


def rounded_experts(experts: nn.Module, bits: int, rounding: Rounding) -> nn.Module:
    """A copy of an experts module whose projections are rounded along their inputs; biases are shared with it.

    Rows keep their order whatever it is (gate and up joined or alternating), for rows are rounded one by one.
    """
    twin = copy.copy(experts)
    twin._parameters = dict(experts._parameters)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).detach()
        weight_ENK = weight.mT if experts.is_transposed else weight
        # Expert by expert: rounding takes several times its input in fp32.
        some = torch.stack([rounding(weight_NK, bits) for weight_NK in weight_ENK])
        twin._parameters[name] = nn.Parameter(some.mT if experts.is_transposed else some, requires_grad=False)
    return twin


class RoundingErrors(Collector):
    """Sum over X_e of ||g_te (y_te - y_te(b))||^2 for every expert e and number of bits b, by block of the text.
    `rounding_errors`, float64 [blocks, E, len(bits)], sum. Values are computed in the model's dtype, differences and
    squares in fp32. Rounded copies of the layer's experts are held while it is observed, one for each number of bits.
    """

    name = "rounding_errors"
    reduce = "sum"
    routed = True
    needs = frozenset({"outputs"})

    def __init__(self, experts: nn.Module, bits: Sequence[int], rounding: Rounding, ends_B: Tensor) -> None:
        """`ends_B`: int64 on the CPU, tokens up to the end of each block; chunks lie within one."""
        self._twins = [rounded_experts(experts, b, rounding) for b in bits]
        self._ends_B = ends_B

    def start(self, shape: LayerShape, device: torch.device) -> None:
        size = (len(self._ends_B), shape.experts, len(self._twins))
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, grouped: Grouped) -> None:
        if grouped.tokens == 0:
            return
        block = int(torch.searchsorted(self._ends_B, grouped.token_T[0], right=True))
        x_SD, exact_SD = grouped.hidden_TD[grouped.row_S], grouped.output_SD.float()
        for index, twin in enumerate(self._twins):
            error_SD = exact_SD - run_experts(twin, x_SD, grouped.expert_S).float()
            error_SD *= grouped.gate_S[:, None]
            self.total[block, :, index] += grouped.sum_E(self.weighed(error_SD, grouped).square().sum(-1))

    def weighed(self, error_SD: Tensor, grouped: Grouped) -> Tensor:
        return error_SD

    def result(self) -> dict[str, Tensor]:
        return {self.name: self.total}


class SlopedRoundingErrors(RoundingErrors):
    """The same with every channel's error times the loss's gradient at the layer's output, token by token: sum over
    X_e and channels of (dl/dh_t * g_te (y_te - y_te(b)))^2. Of a backward sweep. The loss is summed over all tokens.
    """

    needs = frozenset({"outputs", "slope"})

    def weighed(self, error_SD: Tensor, grouped: Grouped) -> Tensor:
        if grouped.slope_TD is None:
            raise TypeError(f"`{self.name}` weighed with gradients is collected by a backward sweep")
        return error_SD * grouped.slope_TD[grouped.row_S].float()
