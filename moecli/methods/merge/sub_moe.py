"""Merge each group in the common output space of its members (Sub-MoE, stages 2 and 3).

Stage 2 factors [W_1 ... W_n] = U Sigma [V_1 ... V_n]^T, averages V_i by frequency and multiplies out. Since
U Sigma V_i^T = W_i exactly, that is the frequency-weighted average of the weights, for every matrix: without `ratio`
this stage computes it so. Whatever the paper gains over plain averaging comes from clustering.

Stage 3 (`ratio`, the paper's dagger) keeps r = floor(ratio O I / (O + I)) directions of each matrix, those in which the
members' outputs on their own routed tokens lie: W~ = U_r U_r^T W_average, U_r the leading eigenvectors of
sum_i W_i C_i W_i^T, C_i the sum (`cov: sum`) or mean (`cov: mean`) of x x^T over tokens routed to i; the paper does not
say which. It applies to every expert, also to those alone in their group. Groups that no token reached take C = I.
The product of the two factors is stored, not the factors: same bytes as without `ratio`, and it loads everywhere.
The compression that the paper counts is not realised here; what it costs in quality is.

Source: arXiv 2506.23266, sections 3.3 (Eqs. 7-8) and 3.4 (Eqs. 9-12); the identities behind this form are tested.

- run: merge/sub-moe
  with: {ratio: 0.9}
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan
from moecli.core.context import Context
from moecli.core.errors import StageFailed
from moecli.core.stage import stage
from moecli.methods.merge import Merge, averaged, merge_experts
from moecli.ops.averaging import share_matrix
from moecli.ops.lowrank import output_gram, projected, rank_at

CHUNK_BYTES = 512 << 20
DAMP = 1e-5
"""Added to C_i in units of its mean diagonal (the paper's eps I): few tokens leave directions open."""


class SubMoe(Merge):
    """Options of `merge/sub-moe`."""

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each matrix's numbers that its two factors would hold; nothing is truncated without it."""
    cov: Literal["sum", "mean"] = "sum"
    """Whether members count by their tokens, or all alike."""


def needs(opt: SubMoe) -> tuple[str, ...]:
    return () if opt.ratio is None else ("x_cov", "h_cov")


@stage("merge/sub-moe", version=1, needs=needs)
def sub_moe(
    opt: SubMoe, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats | None, ctx: Context
) -> Checkpoint:
    unseen: dict[str, int] = {}

    def merge(layer: int, layer_plan: LayerPlan, experts: ExpertWeights) -> ExpertWeights:
        average = averaged(experts, layer_plan.share_E, layer_plan)
        if opt.ratio is None:
            return average
        if stats is None:
            raise StageFailed(
                "`ratio` needs calibration statistics", where=f"layer {layer}",
                hint="add a `calibrate/statistics` stage, or leave `ratio` out",
            )  # fmt: skip
        found, ratio = stats[layer], opt.ratio
        weight_E = torch.ones(len(found.count_E)) if opt.cov == "sum" else 1 / found.count_E.clamp(min=1)
        member_KE = share_matrix(weight_E, layer_plan.group_E, layer_plan.experts)
        seen_K = share_matrix(found.count_E, layer_plan.group_E, layer_plan.experts).sum(1) > 0
        unseen[str(layer)] = int((~seen_K).sum())

        def truncated(mean_KOI: Tensor, weight_EOI: Tensor, moment: str) -> Tensor:
            gram_KOO = grouped_gram(weight_EOI, found[moment], member_KE, seen_K)
            return projected(mean_KOI, gram_KOO, rank_at(ratio, *mean_KOI.shape[1:])).float()

        return average._replace(
            gate_FD=truncated(average.gate_FD, experts.gate_FD, "x_cov"),
            up_FD=truncated(average.up_FD, experts.up_FD, "x_cov"),
            down_DF=truncated(average.down_DF, experts.down_DF, "h_cov"),
        )

    merged = merge_experts(model, plan, merge, stats, ctx)
    if opt.ratio is not None:
        ctx.note(f"matrices have rank {opt.ratio:g} O I / (O + I) but are stored whole: truncation saves no bytes here")
    if total := sum(unseen.values()):
        ctx.note(f"{total} groups saw no calibration token: directions are those of their weights alone")
    return merged


def grouped_gram(weight_EOI: Tensor, moment_EII: Tensor, member_KE: Tensor, seen_K: Tensor) -> Tensor:
    """sum over each group's members of W_i C_i W_i^T, damped, float64 [K, O, O]; C = I where no member saw a token."""
    outputs, inputs = weight_EOI.shape[1:]
    member_KE = member_KE.to(weight_EOI.device, torch.float64)
    total_KOO = torch.zeros(len(member_KE), outputs, outputs, dtype=torch.float64, device=weight_EOI.device)
    per_call = max(1, CHUNK_BYTES // (8 * (outputs + inputs) * (outputs + inputs)))
    unseen_E = (member_KE[~seen_K.to(member_KE.device)] > 0).any(0)
    eye_II = torch.eye(inputs, dtype=torch.float64, device=weight_EOI.device)
    for some in torch.arange(len(weight_EOI), device=weight_EOI.device).split(per_call):
        moment = moment_EII[some.to(moment_EII.device)].to(weight_EOI.device, torch.float64)
        moment = moment + DAMP * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye_II
        moment = torch.where(unseen_E[some, None, None], eye_II, moment)
        gram_eOO = output_gram(weight_EOI[some], moment)
        total_KOO += (member_KE[:, some] @ gram_eOO.flatten(1)).view_as(total_KOO)
    return total_KOO
