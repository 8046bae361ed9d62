"""Average the experts of each group, weighted by how often each was used.

W = sum_i share_i W_i for gate, up and down, accumulated in fp32 and cast once. A group that no token reached is
averaged uniformly. With `align` the neurons of each member are put in the order of the group's lead first: the member
computes the same as before, and neurons that do alike are averaged with each other. `weights` matches neurons by the
products of their weights, `weights+acts` by weight and activation distances on calibration tokens.

Source: HC-SMoE (arXiv 2410.08589, section 3.3) without alignment, M-SMoE (2310.01334, section 3.2) with `weights`;
its authors align to expert 0, here to the group's lead, and all three matrices count. The router keeps all its
rows, as in the papers; add `router/...` for a model that loads everywhere.

- run: merge/weighted
  with: {align: weights}
"""

from __future__ import annotations

from typing import Literal

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.methods.merge import Align, Merge, aligned_to_leads, averaged, group_shares, merge_experts


class Weighted(Merge):
    """Options of `merge/weighted`."""

    weights: Literal["frequency", "uniform"] = "frequency"
    """Shares inside a group: as the plan has them (routing frequency for most clusterings), or equal."""
    align: Align = "none"
    """How neurons are matched before they are averaged."""


def needs(opt: Weighted) -> tuple[str, ...]:
    return ("tok_reservoir",) if opt.align == "weights+acts" else ()


@stage("merge/weighted", version=2, needs=needs)
def weighted(
    opt: Weighted, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats | None, ctx: Context
) -> Checkpoint:
    family = family_of(model.config)

    def merge(layer: int, layer_plan: LayerPlan, experts: ExpertWeights) -> ExpertWeights:
        experts = aligned_to_leads(opt.align, family, layer, layer_plan, experts, stats)
        return averaged(experts, group_shares(layer_plan, opt.weights), layer_plan)

    return merge_experts(model, plan, merge, stats, ctx)
