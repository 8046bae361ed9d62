"""Average each group's experts by saliency after matching their neurons to the centroid's (REAM).

For each member the order of neurons that minimises the sum over neurons of two distances to the centroid's: of
activations on the same calibration tokens, and of weight rows [gate | up | down^T], all of length 1. Then
W = sum_i share_i W_i, shares as `cluster/ream` gives them (saliency), fp32 and rounded once.

Source: arXiv 2604.04356, section 3. Its code samples other tokens for each expert and reduces weight rows to 64
principal components for speed; here tokens are the same and rows are whole. Follow it with `router/row-drop`, as the
paper does.

- run: merge/ream
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.methods.merge import Merge, aligned_to_leads, averaged, merge_experts


class Ream(Merge):
    """Options of `merge/ream`: none."""


@stage("merge/ream", version=1, needs=("tok_reservoir",))
def ream(opt: Ream, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats, ctx: Context) -> Checkpoint:
    family = family_of(model.config)

    def merge(layer: int, layer_plan: LayerPlan, experts: ExpertWeights) -> ExpertWeights:
        experts = aligned_to_leads("weights+acts", family, layer, layer_plan, experts, stats)
        return averaged(experts, layer_plan.share_E, layer_plan)

    return merge_experts(model, plan, merge, stats, ctx)
