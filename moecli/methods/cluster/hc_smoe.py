"""Group experts with similar mean outputs by hierarchical clustering (HC-SMoE).

D_ij = ||o_i - o_j||_2 with o_i the mean output of expert i over all calibration tokens, whether routed to it or not;
agglomerative clustering down to `keep` groups per layer. Shares inside a group are routing frequencies. The member
nearest to its cluster's mean leads the group (its router row survives `router/row-drop`).

Source: arXiv 2410.08589, section 3. `metric: cosine` is the distance REAP's paper (2510.13999, Eq. 16) writes.
Unlike the shipped scripts, usage counts use the model's real top-k.

- run: cluster/hc-smoe
  with: {keep: 64}
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, ExpertPlan, LayerPlan, LayerStats
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.cluster import Cluster
from moecli.ops.averaging import shares
from moecli.ops.linkage import Linkage, Metric, agglomerate, pairwise


class HcSmoe(Cluster):
    """Options of `cluster/hc-smoe`."""

    linkage: Linkage = "average"
    """How far two clusters are: mean, smallest or largest distance between their members."""
    metric: Metric = "euclidean"
    """Distance between mean outputs."""


@stage("cluster/hc-smoe", version=1, needs=("y_mean",))
def hc_smoe(opt: HcSmoe, stats: CalibrationStats, ctx: Context) -> ExpertPlan:
    return ExpertPlan({layer: plan_layer(opt, stats[layer]) for layer in ctx.track(list(stats), "clustering")})


def plan_layer(opt: HcSmoe, stats: LayerStats) -> LayerPlan:
    """Groups, shares and leads of one layer."""
    mean_ED = (stats["y_mean"] / max(stats.tokens, 1)).float()
    group_E, tree = agglomerate(pairwise(mean_ED, opt.metric), opt.keep, opt.linkage)
    group_E, lead_K = in_lead_order(group_E, leads(mean_ED, group_E))
    return LayerPlan(group_E, shares(stats.count_E, group_E, opt.keep), lead_K, {"linkage": tree})


def leads(mean_ED: Tensor, group_E: Tensor) -> Tensor:
    """The member nearest to each group's mean, int64 [K]; ties go to the lower index."""
    chosen = []
    for group in range(int(group_E.max()) + 1):
        members = (group_E == group).nonzero().flatten()
        centre = mean_ED[members].double().mean(0)
        chosen.append(members[(mean_ED[members].double() - centre).norm(dim=-1).argmin()])
    return torch.stack(chosen)


def in_lead_order(group_E: Tensor, lead_K: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber groups so that leads ascend: kept router rows stay in the order of the original experts."""
    order = torch.argsort(lead_K)
    return torch.argsort(order)[group_E], lead_K[order]
