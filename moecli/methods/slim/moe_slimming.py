"""Leave each expert as many channels as its share of the layer's output asks for (MoE-Slimming, without fine-tuning).

A channel counts a_k = sqrt(sum_t h_tk^2) over the tokens routed to its expert. An expert counts
c_e = sqrt(max(0, share_e)), with share_e = sum_t g_te <y_te, r_t> / ||b_t||^2 its signed share of what the block adds
(r the routed sum, b with shared experts): the attribution of the paper's local loss, whose gradient at 0.9 of every
output is this but for a constant. Every expert keeps its smallest set of channels that holds min(1, c_e m) of its sum
of a; `scope: layer` finds the m that leaves (1 - ratio) of each layer, `global` first gives each layer as many
channels as hold min(1, lambda_l s) of the layer's sum of a, lambda_l the layer's routed share of its output, smoothed
four times by a square root and a clamp to mean plus or minus one standard deviation. `scope: expert` knows a_k alone.

Differs from the authors' code: sums over all tokens in the place of running averages, which depend on the order of
batches; no clipping of the gradient's coordinates at their 99th percentile; a_k is the norm of h alone, there the mean
of those of h, up and gate; experts that lose everything stay, with their router row. Their fine-tuning is not done.

Source: arXiv 2606.18304.

- run: slim/moe-slimming
  with: {ratio: 0.25, scope: layer, widths: pad}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.methods.slim import Slim, drop_channels, reads, scored
from moecli.ops.channels import budgeted, coverage_scores

SMOOTHINGS = 4


class MoeSlimming(Slim):
    """Options of `slim/moe-slimming`."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if self.widths == "per_layer":
            yield Problem("widths", "the scores are an order of channels, and `per_layer` adds amounts up over experts",
                          hint="write `widths: ragged`")  # fmt: skip


@stage("slim/moe-slimming", version=1, needs=reads("h2", "share"))
def moe_slimming(opt: MoeSlimming, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    def coverage(s: LayerStats, norm_EF: Tensor) -> Tensor:
        return coverage_scores(s["h2"].sqrt(), s["share"].clamp(min=0).sqrt())

    score = scored(stats, ("h2",), model, ctx, coverage)
    if opt.scope == "global":
        score = budgeted(score, {layer: stats[layer]["h2"].sqrt() for layer in score}, layer_weights(stats))
    return drop_channels(model, stats, score, opt, ctx)


def layer_weights(stats: Mapping[int, LayerStats]) -> dict[int, float]:
    """lambda of each layer, 1 on average; 1 everywhere when no expert gives anything."""
    loss_L = torch.stack([s["share"].sum().clamp(min=0) / max(s.tokens, 1) for s in stats.values()]).double()
    for _ in range(SMOOTHINGS):
        loss_L = loss_L.sqrt()
        mean, spread = loss_L.mean(), loss_L.std(correction=0)
        loss_L = loss_L.clamp(mean - spread, mean + spread)
    mean = loss_L.mean()
    weight_L = loss_L / mean if mean > 0 else torch.ones_like(loss_L)
    return dict(zip(stats, weight_L.tolist(), strict=True))
