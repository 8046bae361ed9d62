"""Give each merged expert the mean of its members' router rows. The result loads everywhere.

row_m = sum_i share_i row_i, and the same for biases: `weights: uniform` is mode `row_mean`, `frequency` mode
`row_freq_mean` (shares as the plan has them). A softmax router gives a group of n rows at least n times the mass of
their mean row, so the logit bias also gets log n where the family has one (gpt_oss); elsewhere large groups get less
than they had.

Source: modes `row_mean` and `row_freq_mean`, as merged routers are usually written; the log n term is ours.

- run: router/row-mean
"""

from __future__ import annotations

from typing import Literal

import torch

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.router import Router, Rows, StockRouter, mean_rows, replace_rows
from moecli.ops.averaging import shares


class RowMean(StockRouter):
    """Options of `router/row-mean`."""

    weights: Literal["frequency", "uniform"] = "frequency"
    """Shares inside a group: routing frequency as the plan has it (`row_freq_mean`), or equal (`row_mean`)."""


@stage("router/row-mean", version=1, needs=("tok_reservoir",))
def row_mean(
    opt: RowMean, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats | None, ctx: Context
) -> Checkpoint:
    def rows(router: Router, layer_plan: LayerPlan) -> Rows:
        equal = shares(torch.ones(len(layer_plan.group_E)), layer_plan.group_E, layer_plan.experts)
        mean = mean_rows(router, layer_plan, layer_plan.share_E if opt.weights == "frequency" else equal)
        if "bias" not in mean or router.family.facts.score == "sigmoid":
            return mean
        return {**mean, "bias": mean["bias"] + torch.bincount(layer_plan.group_E).to(mean["bias"]).log()}

    return replace_rows(model, plan, stats, rows, ctx)
