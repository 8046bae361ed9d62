"""Fit the router of the merged experts to the routing of the source: a regularised multinomial regression.

Target of token t for group m, from the source's full router scores p (softmax over all rows): the largest p_ti of its
members (`mass: max`) or their sum (`mass: sum`), over their total. Rows W minimise

  mean_t KL(target_t || softmax(W x_t)) + lambda/2 |W - start|^2

on the token reservoir, where start is the mean of the members' rows; rows of experts that stand alone are exact as they
are and stay. Convex, no gradient through the model, seconds a layer; the result loads everywhere. Sigmoid routers: each
row is a logistic regression on the largest score of its members (or their sum, at most 1), correction biases are
averaged by share. lambda is `ridge` times the mean of x^2.

`max` is the default: a group then competes for a token as its best member did. With `sum` large groups are chosen for
tokens that none of their members would have been chosen for, which costs more than the exact mass is worth.

Source: ours; the bound of Newton's matrix is Boehning's (1992).

- run: router/refit
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

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
from moecli.ops.rowfit import fit_rows, grouped_max, grouped_total


class Refit(StockRouter):
    """Options of `router/refit`."""

    mass: Literal["max", "sum"] = "max"
    """What a group's share of routing should be: that of its best member, or of all its members."""
    ridge: Annotated[float, Field(gt=0)] = 0.03
    """Pull towards the mean of the members' rows, in units of the mean squared input."""


@stage("router/refit", version=1, needs=("tok_reservoir",))
def refit(opt: Refit, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats, ctx: Context) -> Checkpoint:
    def rows(router: Router, layer_plan: LayerPlan) -> Rows:
        x_TD, group_E = sample(stats, router.layer, ctx.device), layer_plan.group_E.to(ctx.device)
        start = mean_rows(router, layer_plan, layer_plan.share_E)
        softmax = router.family.facts.score != "sigmoid"
        fitted_KD = fit_rows(
            with_ones(x_TD, start),
            target(opt.mass, softmax, router.logits(x_TD), group_E, layer_plan.experts),
            stacked(start),
            softmax=softmax,
            ridge=opt.ridge,
            free_K=torch.bincount(group_E) > 1,
        )
        return unstacked(fitted_KD, start)

    return replace_rows(model, plan, stats, rows, ctx)


def target(mass: Literal["max", "sum"], softmax: bool, logits_TE: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """What the new router should give each group, float32 [T, K]; a distribution for softmax routers."""
    score_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
    score_TK = (grouped_max if mass == "max" else grouped_total)(score_TE, group_E, groups)
    return score_TK / score_TK.sum(-1, keepdim=True) if softmax else score_TK.clamp(max=1)
