"""Fit each merged expert's router row to the log-sum-exp of its members' logits, by ridge regression.

row_m = argmin sum_t (row_m x_t - log sum_{i in C_m} exp z_ti)^2 + lambda |row_m - mean of its members' rows|^2 on the
token reservoir: one D x D solve a layer. A softmax over such logits gives each group the sum of its members'
probabilities. Rows of experts that stand alone come out as they were. Correction biases are averaged by share.
lambda is `ridge` times the mean of x^2, summed over tokens.

Source: ours. The error counts all tokens alike, also where a group has next to no probability: `router/refit` does not.

- run: router/lse-ridge
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.router import (
    Router,
    Rows,
    StockRouter,
    mean_rows,
    replace_rows,
    sample,
    stacked,
    unstacked,
    with_ones,
)
from moecli.ops.leastsq import NormalEquations
from moecli.ops.rowfit import grouped_lse


class LseRidge(StockRouter):
    """Options of `router/lse-ridge`."""

    ridge: Annotated[float, Field(gt=0)] = 1e-2
    """Pull towards the mean of the members' rows, in units of the mean squared input."""


@stage("router/lse-ridge", version=1, needs=("tok_reservoir",))
def lse_ridge(opt: LseRidge, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats, ctx: Context) -> Checkpoint:
    def rows(router: Router, layer_plan: LayerPlan) -> Rows:
        x_TD = sample(stats, router.layer, ctx.device)
        start = mean_rows(router, layer_plan, layer_plan.share_E)
        features_TD, prior_KD = with_ones(x_TD, start), stacked(start)
        target_TK = grouped_lse(router.logits(x_TD), layer_plan.group_E.to(ctx.device), layer_plan.experts)
        equations = NormalEquations(1, features_TD.shape[1], layer_plan.experts, ctx.device)
        equations.add(features_TD[None], target_TK[None])
        return unstacked(equations.solve(prior_KD[None], opt.ridge)[0].float(), start)

    return replace_rows(model, plan, stats, rows, ctx)
