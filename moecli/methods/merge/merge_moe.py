"""Average gate and up, then fit `down` so that each merged expert gives what its members gave (MergeMoE).

gate~ = sum_j b_j gate_j, up~ = sum_j b_j up_j, P = act(gate~ X) * (up~ X) on calibration tokens X,
down~ = argmin sum_t |down~ P_t - Y_t|^2 + lambda |down~ - sum_j b_j down_j|^2, one F x F solve a group.

`tokens: routed` (default, ours): Y_t is the sum of what the members really add to a token, sum over chosen members of
g_tj y_tj, with P_t scaled by sum_j g_tj as the merged expert's output will be; shares matter for gate and up only.
`tokens: all` is the paper's: Y = sum_j b_j y_j over every token, b_j the plan's shares. The ridge pulls towards
the averaged `down` (the paper's pseudo-inverse has none), so groups with few tokens stay plain averages. Biases
are fitted along where a family has them. Tokens are the layer's reservoir of expert inputs in the source model: what
merged layers below change is not seen.

`align: weights` (default, ours) first puts members' neurons in the order of their lead's: O(F^3) an expert, under a
second at F = 768, minutes at F = 14,336. The paper's form is `{tokens: all, align: none, ridge: 1.0e-4}`.

Source: arXiv 2510.14436, Eqs. 2-6 and Theorem 1. lambda = `ridge` x the mean diagonal of P P^T is ours.

- run: merge/merge-moe
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.families import Family, family_of
from moecli.methods.merge import (
    Align,
    Merge,
    aligned_to_leads,
    as_float,
    averaged,
    each,
    grouped_members,
    merge_experts,
    reservoir,
)
from moecli.ops.averaging import share_matrix
from moecli.ops.leastsq import NormalEquations

CHUNK_BYTES = 512 << 20
"""Largest activations of all experts held at a time, in fp32."""


class MergeMoe(Merge):
    """Options of `merge/merge-moe`."""

    tokens: Literal["routed", "all"] = "routed"
    """What `down` is fitted on: what the members add to tokens routed to them, or their mean output on all tokens."""
    ridge: Annotated[float, Field(gt=0)] = 0.1
    """Pull towards the averaged `down`, in units of the mean squared activation."""
    align: Align = "weights"
    """How neurons are matched before gate and up are averaged."""


@stage("merge/merge-moe", version=1, needs=("tok_reservoir",))
def merge_moe(opt: MergeMoe, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats, ctx: Context) -> Checkpoint:
    family = family_of(model.config)

    def merge(layer: int, layer_plan: LayerPlan, experts: ExpertWeights) -> ExpertWeights:
        x_TD = reservoir(stats, layer).to(ctx.device).float()
        experts = aligned_to_leads(opt.align, family, layer, layer_plan, experts, stats)
        start = averaged(experts, layer_plan.share_E, layer_plan)
        if opt.tokens == "all":
            weight_TE = layer_plan.share_E.to(x_TD).expand(len(x_TD), -1)
        else:
            routing = family.route_tokens(model, layer, x_TD)
            weight_TE = x_TD.new_zeros(len(x_TD), len(layer_plan.group_E))
            weight_TE.scatter_(1, routing.experts_Tk, routing.weights_Tk)
        return fit_down(family, experts, start, layer_plan, x_TD, weight_TE, opt.ridge)

    return merge_experts(model, plan, merge, stats, ctx)


def fit_down(
    family: Family, experts: ExpertWeights, start: ExpertWeights, plan: LayerPlan, x_TD: Tensor, weight_TE: Tensor,
    ridge: float,
) -> ExpertWeights:  # fmt: skip
    """`start` [K] with `down` (and its bias) refitted, so that group m gives sum_{j in m} w_tj y_j(x_t) when its output
    is multiplied by sum_{j in m} w_tj. Groups of one member are left alone.
    """
    members = grouped_members(plan)
    if len(members) == 0:
        return start
    groups, index = plan.group_E[members].unique(return_inverse=True)
    member_KE = share_matrix(torch.ones(len(members)), index, len(groups)).to(x_TD)
    some = as_float(each(experts, lambda value: value[members.to(value.device)]))
    merged = as_float(each(start, lambda value: value[groups.to(value.device)]))
    prior_KDF = _with_bias(merged)
    equations = NormalEquations(len(groups), prior_KDF.shape[-1], x_TD.shape[1], x_TD.device)
    per_call = max(1, CHUNK_BYTES // (4 * len(members) * (x_TD.shape[1] + 2 * merged.gate_FD.shape[1])))
    for x, w in zip(x_TD.split(per_call), weight_TE[:, members.to(x_TD.device)].split(per_call), strict=True):
        given_ETD = w.T[..., None] * family.expert_forward(some, x)
        target_KTD = (member_KE @ given_ETD.flatten(1)).view(len(groups), *given_ETD.shape[1:])
        feature_KTF = family.inner(merged, x)
        if merged.down_bias_D is not None:
            feature_KTF = torch.cat((feature_KTF, torch.ones_like(feature_KTF[..., :1])), -1)
        equations.add(feature_KTF * (member_KE @ w.T)[..., None], target_KTD)
    return _put(start, groups, equations.solve(prior_KDF, ridge).float())


def _with_bias(merged: ExpertWeights) -> Tensor:
    """[K, D, F], or [K, D, F + 1] with the bias as a last column."""
    if merged.down_bias_D is None:
        return merged.down_DF
    return torch.cat((merged.down_DF, merged.down_bias_D[..., None]), -1)


def _put(start: ExpertWeights, groups: Tensor, down_KDF: Tensor) -> ExpertWeights:
    width = start.gate_FD.shape[1]
    groups = groups.to(down_KDF.device)
    down = start.down_DF.index_copy(0, groups, down_KDF[..., :width])
    if start.down_bias_D is None:
        return start._replace(down_DF=down)
    return start._replace(down_DF=down, down_bias_D=start.down_bias_D.index_copy(0, groups, down_KDF[..., width]))
