"""Statistics of what experts answer: of routed ones for their tokens, or of every expert for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from moecli.engine.collectors.base import LayerShape, Total
from moecli.engine.collectors.grouped import Grouped
from moecli.ops.gram import cosine_gram
from moecli.ops.grouped import turn


class _OfVisits(Total):
    routed = True
    needs = frozenset({"outputs"})


class EanSum(_OfVisits):
    """Expert activation norm: sum over X_i of ||y_ti||_2. float64 [E], sum. EAN (2504.05586)."""

    name = "ean_sum"

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.norm_S)


class EanSq(_OfVisits):
    """Sum over X_i of ||y_ti||_2^2. float64 [E], sum. MSAN (2606.15716)."""

    name = "ean_sq"

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.norm_S.double().square())


class GeanSum(_OfVisits):
    """Gated activation norm: sum over X_i of g_ti * ||y_ti||_2. float64 [E], sum. REAP (2510.13999)."""

    name = "gean_sum"

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.gate_S * grouped.norm_S)


class GeanSq(_OfVisits):
    """Sum over X_i of (g_ti * ||y_ti||_2)^2. float64 [E], sum."""

    name = "gean_sq"

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E((grouped.gate_S * grouped.norm_S).double().square())


class Easy(_OfVisits):
    """Sum over X_i of g_ti * ||y_ti||_2 * max(0, 1 - cos(h_t, h_t + r_t)), r_t the routed sum without
    shared experts. float64 [E], sum. EASY-EP (2504.06792). Where a family scales what it adds to the
    stream, so is r_t.
    """

    name = "easy"
    needs = frozenset({"outputs", "residual"})

    def of(self, grouped: Grouped) -> Tensor:
        change_T = turn(grouped.residual_TD, grouped.routed_TD)
        return grouped.sum_E(grouped.gate_S * grouped.norm_S * change_T[grouped.row_S])


class Share(_OfVisits):
    """Sum over X_i of g_ti <y_ti, r_t> / (||b_t||^2 + 1e-6), r_t the routed sum and b_t what the block adds to the
    stream, shared experts with it: an expert's signed part of the output. Over all experts it sums to that of
    ||r_t||^2. float64 [E], sum. MoE-Slimming (2606.18304): the gradient of its local loss times the output, but for
    a constant. Where a family scales what it adds to the stream, so are r_t and b_t.
    """

    name = "share"
    needs = frozenset({"outputs", "block"})

    def of(self, grouped: Grouped) -> Tensor:
        inverse_T = 1 / (grouped.block_TD.float().square().sum(-1) + 1e-6)
        along_S = (grouped.output_SD.float() * grouped.routed_TD[grouped.row_S].float()).sum(-1)
        return grouped.sum_E(grouped.gate_S * along_S * inverse_T[grouped.row_S])


class BlockCos(Total):
    """Sum over all tokens of cos(x_t, b_t), b_t what the block adds to the stream, shared experts with it; 0 where one
    of them is 0; divide by `tokens` for the mean. float64 [1], sum. Importance of blocks in QuantMoE-Bench
    (2406.08155), where a trained predictor stands for it.
    """

    name = "block_cos"
    routed = False
    needs = frozenset({"block"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (1,)

    def of(self, grouped: Grouped) -> Tensor:
        cos_T = torch.cosine_similarity(grouped.hidden_TD.float(), grouped.block_TD.float(), dim=-1, eps=1e-30)
        return cos_T.sum(dtype=torch.float64)[None]


class AbsMax(_OfVisits):
    """Largest |y| over X_i and all channels, un-gated. float32 [E], maximum. Super Experts (2507.23279)."""

    name = "absmax"
    reduce = "max"
    dtype = torch.float32

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.max_E(grouped.largest_S)


class YMean(Total):
    """Sum of y over *all* tokens for every expert, routed there or not; divide by `tokens` for the mean.
    float64 [E, D], sum. HC-SMoE (2410.08589, section 3). Costs E/k times the expert work of a forward pass.
    """

    name = "y_mean"
    routed = False
    needs = frozenset({"all_sums"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.hidden)

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.output_sum_ED


class GyMean(Total):
    """Sum over *all* tokens of softmax(z_t)_i * y_ti for every expert, softmax over all router rows whatever the
    router's own score; divide by `tokens` for the mean. float64 [E, D], sum. REAM. As costly as `y_mean`, and
    free beside it.
    """

    name = "gy_mean"
    routed = False
    needs = frozenset({"all_sums", "logits"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.hidden)

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.weighted_output_sum_ED


class GramCos(Total):
    """Sum over *all* tokens of cos(y_ti, y_tj) for every pair of experts, 0 where an output is 0; divide by `tokens`
    for the mean. float64 [E, E], sum. Sub-MoE. Costs E/k times the expert work of a forward pass, down projection and
    all, and E^2 products of outputs a token.
    """

    name = "gram_cos"
    routed = False
    needs = frozenset({"all_outputs"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.experts)

    def of(self, grouped: Grouped) -> Tensor:
        return cosine_gram(grouped.all_output_ETD)
