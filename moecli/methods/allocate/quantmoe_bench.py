"""More bits where a simple score is high, without measuring what rounding does: the heuristics of QuantMoE-Bench.

A weight whose score is s costs s * (largest of `bits` - b) at b bits, so the highest scores get the most bits.

    outlier     max over input channels c of max_r|W_rc| / mean_r|W_rc|, weights only. Gate and up, which share their
                bits, get the higher of their scores, down its own.
    block       1 - mean over tokens of cos(input, output) of a layer's MoE block: layers that turn their input more
                get more bits, all experts of a layer the same.
    frequency   tokens routed to the expert.

The paper learns to predict the cosine from the input; it is used here as it is. Its further finding, that attention and
shared experts deserve more bits than routed experts, are `attention_bits` and `shared_bits` of the `quantize/...`
stage below. How the paper combines its scores is not published in a form that could be followed.

Source: arXiv 2406.08155 (linear scorer and block importance). Costs linear in bits are ours; with two numbers of bits
they are the paper's choice of the highest scores.

- run: allocate/quantmoe-bench
  with: {average: 2.5, bits: [2, 4]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moecli.core.artifacts import BitPlan, CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.model import TensorSpec
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.methods.allocate import Allocate, Share, report, solve, solved
from moecli.ops.budget import Item, Level, Problem
from moecli.ops.precision import outlier_score

SIZES = (2, 1)
"""Weights of gate and up beside those of down."""


class QuantMoeBench(Allocate):
    """Options of `allocate/quantmoe-bench`."""

    by: Literal["outlier", "block", "frequency"] = "outlier"
    """What scores a weight."""
    scope: Literal["model"] = "model"
    """Scores of all layers compare."""
    at_least: Literal["none"] = "none"
    """Not asked for here."""

    def share(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Share:
        share = super().share(config, specs)
        return "layer" if share == "expert" and self.by == "block" else share


@stage("allocate/quantmoe-bench", version=1, needs=lambda opt: ("block_cos",) if opt.by == "block" else ())
def quantmoe_bench(opt: QuantMoeBench, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> BitPlan:
    if opt.by == "outlier":
        return _by_matrices(opt, model, ctx)
    top = opt.levels()[-1]
    score = {layer: _score(opt, stats, layer) for layer in model.facts.moe_layers}
    cost = {layer: [{bits: s * (top - bits) for bits in opt.levels()} for s in some] for layer, some in score.items()}
    return solve(cost, opt, model, ctx)


def _score(opt: QuantMoeBench, stats: CalibrationStats, layer: int) -> list[float]:
    of_layer = stats[layer]
    if opt.by == "frequency":
        return [float(count) for count in of_layer.count_E.tolist()]
    return [1 - float(of_layer["block_cos"]) / of_layer.tokens] * len(of_layer.count_E)


def _by_matrices(opt: QuantMoeBench, model: Checkpoint, ctx: Context) -> BitPlan:
    """The plan that gives gate and up of an expert other bits than its down projection."""
    share = opt.share(model.config, {name: model.spec(name) for name in model.names()})
    layers = ctx.track(model.facts.moe_layers, "scoring")
    score = {layer: outlier_scores(model, layer, ctx.device).tolist() for layer in layers}
    experts = sum(map(len, score.values()))
    top = opt.levels()[-1]
    tie = {"expert": None, "layer": "{layer}.{part}", "model": "model"}[share]
    if opt.servable == "vllm":
        tie = "{layer}"
    items = tuple(
        Item(
            f"{layer}.{expert}.{part}",
            tuple(Level(bits, bits * SIZES[part], one * SIZES[part] * (top - bits)) for bits in opt.levels()),
            str(layer),
            tie and tie.format(layer=layer, part=part),
        )
        for layer, some in score.items()
        for expert, both in enumerate(some)
        for part, one in enumerate(both)
    )
    problem = Problem(items, math.floor(opt.average * sum(SIZES) * experts + 1e-9))
    choice = solved([problem], opt, ctx)
    plan = BitPlan({
        layer: torch.tensor([[choice[f"{layer}.{expert}.{part}"] for part in (0, 1)] for expert in range(len(some))])
        for layer, some in score.items()
    })  # fmt: skip
    report(plan, ctx)
    return plan


def outlier_scores(model: Checkpoint, layer: int, device: torch.device) -> Tensor:
    """float32 [E, 2]: the higher score of gate and up, and that of down."""
    experts = family_of(model.config).read_experts(model, layer)
    gate_E, up_E, down_E = (outlier_score(weight.to(device)) for weight in experts[:3])
    return torch.stack([torch.maximum(gate_E, up_E), down_E], -1).cpu()
