"""Group experts with similar mean outputs by hierarchical clustering (HC-SMoE).

D_ij = ||o_i - o_j||_2 with o_i the mean output of expert i over all calibration tokens, whether routed to it or not;
agglomerative clustering down to `keep` groups per layer. Shares inside a group are routing frequencies. The member
nearest to its cluster's mean leads the group (its router row survives `router/row-drop`).

Source: arXiv 2410.08589, section 3. `metric: cosine` is the distance REAP's paper (2510.13999, Eq. 16) writes. The
other metrics are those of the paper's ablation and of Sub-MoE's (2506.23266): Euclidean distances between vectors whose
inner products the metric gives; the most used member leads there. Unlike the shipped scripts, usage counts use the
model's real top-k, and `complete` joins the nearest pair.

- run: cluster/hc-smoe
  with: {keep: 64}
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.cluster import Cluster, Groups, Metric, busiest, gram, make_plan, reads
from moecli.ops.likeness import distances
from moecli.ops.linkage import Linkage, agglomerate, pairwise


class HcSmoe(Cluster):
    """Options of `cluster/hc-smoe`."""

    linkage: Linkage = "average"
    """How far two clusters are: mean, smallest or largest distance between their members."""
    metric: Literal["euclidean", "cosine"] | Metric = "euclidean"
    """Distance between mean outputs, or what else makes experts alike."""


def needs(opt: HcSmoe) -> tuple[str, ...]:
    return reads("y_mean")(opt) if opt.metric in ("euclidean", "cosine") else reads()(opt)


@stage("cluster/hc-smoe", version=2, needs=needs)
def hc_smoe(opt: HcSmoe, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> ExpertPlan:
    def grouping(layer: int, some: Tensor, keep: int) -> Groups:
        if opt.metric == "euclidean" or opt.metric == "cosine":
            mean_ND = (stats[layer]["y_mean"] / max(stats[layer].tokens, 1)).float()[some]
            group_N, tree = agglomerate(pairwise(mean_ND, opt.metric), keep, opt.linkage)
            return Groups(group_N, leads(mean_ND, group_N), {"linkage": tree})
        apart = distances(gram(opt.metric, layer, stats, model, ctx)[some][:, some])
        group_N, tree = agglomerate(apart, keep, opt.linkage)
        return Groups(group_N, busiest(group_N, stats[layer].count_E[some]), {"linkage": tree})

    return make_plan(opt, stats, model, ctx, grouping)


def leads(mean_ND: Tensor, group_N: Tensor) -> Tensor:
    """The member nearest to each group's mean, int64 [K]; ties go to the lower index."""
    chosen = []
    for group in range(int(group_N.max()) + 1):
        members = (group_N == group).nonzero().flatten()
        centre = mean_ND[members].double().mean(0)
        chosen.append(members[(mean_ND[members].double() - centre).norm(dim=-1).argmin()])
    return torch.stack(chosen)
