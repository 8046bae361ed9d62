"""What rounding one expert does to a layer's output, for every expert and several numbers of bits at once.

With expert e alone rounded to b bits, the routed sum of a token t changes by g_te (y_te - y_te(b)) where t is routed
to e, and not at all elsewhere: routing does not depend on experts. So all experts together cost one more pass of the
routed tokens for each number of bits, where a literal reading takes a forward pass for each expert and each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moecli.engine.collectors import Collector, Grouped, LayerShape, collectors
from moecli.engine.probe import run_experts
from moecli.ops.gptq import Factor, factor, solve
from moecli.ops.ladder import ladder
from moecli.ops.pack import dequantize, group_scale

if TYPE_CHECKING:
    from moecli.engine.backward import BackLayer
    from moecli.engine.sweep import SweptLayer

Rounding = Callable[[Tensor, int, str], Tensor]
"""(weights of a layer's experts [E, N outputs, K inputs], bits, `gate_up_proj` or `down_proj`) -> the values that are
left of them, of the same shape. Rows are rounded one by one, whatever their order: gate and up joined or alternating.
"""
COMPENSATED_BY = ("x_cov_pool", "x_cov", "h_cov")
"""Statistics that GPTQ takes here."""
COMPENSATED_EXPERTS = 16
"""Experts that GPTQ rounds together here: it takes several times their weights in fp32."""


def one_by_one(rounding: Callable[[Tensor, int], Tensor]) -> Rounding:
    """Of a rounding of matrices [N, K], which takes several times its input in fp32: expert by expert."""
    return lambda weight_ENK, bits, name: torch.stack([rounding(weight_NK, bits) for weight_NK in weight_ENK])


def compensated(layer: SweptLayer | BackLayer, group_size: int, shrink: bool) -> Rounding:
    """What GPTQ makes of the layer's experts, each calibrated on its own tokens of the text (`ops.ladder`), with
    columns by falling diagonal and a damping of 0.01: as `quantize/gptq` does it by default, but for what earlier
    layers lost. Takes one pass of the layer, and holds a factor of each expert's Hessians, float32 [E, D, D] and
    [E, F, F], as long as it lives. Experts whose Hessian has no factor are rounded to the nearest.

    Source: arXiv 2210.17323. Raises ValueError when `group_size` does not divide a projection's inputs.
    """
    stats = layer.observe(collectors(COMPENSATED_BY), on_device=True)
    x_ECC, h_EFF = stats["x_cov"], stats["h_cov"]
    count_E = stats.count_E.to(x_ECC.device)
    pools = {
        "gate_up_proj": (x_ECC, stats["x_cov_pool"][0] / stats.tokens),
        "down_proj": (h_EFF, h_EFF.sum(0) / count_E.sum().clamp(min=1)),
    }
    factors = {
        name: factor(ladder(total, count_E.float(), count_E, mean).value_E) for name, (total, mean) in pools.items()
    }

    def rounding(weight_ENK: Tensor, bits: int, name: str) -> Tensor:
        found = []
        for start in range(0, len(weight_ENK), COMPENSATED_EXPERTS):
            some = slice(start, start + COMPENSATED_EXPERTS)
            weight_eNK, use = weight_ENK[some], Factor(*(value[some] for value in factors[name]))
            scale_eNG = group_scale(weight_eNK, bits, group_size, shrink)
            found.append(dequantize(solve(weight_eNK, scale_eNG, use, bits).codes_ERC, scale_eNG))
        return torch.cat(found)

    return rounding


def rounded_experts(experts: nn.Module, bits: int, rounding: Rounding) -> nn.Module:
    """A copy of an experts module whose projections are rounded along their inputs; biases are shared with it."""
    twin = copy.copy(experts)
    twin._parameters = dict(experts._parameters)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).detach()
        some = rounding(weight.mT if experts.is_transposed else weight, bits, name)
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
