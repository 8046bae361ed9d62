"""Keep the most salient experts, let the least lead absorb the rest (REAM's pseudo-pruning).

Saliency s is REAP's: mean over routed tokens of g ||y||; experts without tokens get the smallest that is not 0, at
most 0.5. The `keep` most salient are centroids. Similarity is 1/2 (cos(o_i, o_j) + 1)/2 + 1/2 (1 - D_ij/max D),
o the mean over all tokens of softmax(z)_i y_i, D the distance between columns of router logits of length 1. Centroids
in falling order of s take up to `limit` - 1 of the most similar experts that are left, until none is left: most
centroids stay alone, few large groups form, of low saliency. Shares are saliencies.

Source: arXiv 2604.04356, section 3, and what its code computes (limit 16), with two slips of that code put right: g is
counted once, and it is the weight that the model really multiplies with. The paper goes layer by layer and
recomputes statistics after each merged layer; here all layers are planned from the source's statistics.

- run: cluster/ream
  with: {keep: 96}
- run: merge/ream
- run: router/row-drop
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, LayerStats
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.methods.cluster import Cluster, Groups, distances, make_plan, reads, unit_gram


class Ream(Cluster):
    """Options of `cluster/ream`."""

    limit: PositiveInt = 16
    """Largest group."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if self.keep * self.limit < model.experts:
            yield Problem(
                "limit",
                f"{self.keep} groups of at most {self.limit} cannot hold {model.experts} experts",
                hint=f"write `limit: {-(-model.experts // self.keep)}` or more",
            )


@stage("cluster/ream", version=1, needs=reads("gean_sum", "gy_mean", "logit_gram"))
def ream(opt: Ream, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> ExpertPlan:
    def grouping(layer: int, some: Tensor, keep: int) -> Groups:
        if keep * opt.limit < len(some):
            raise StageFailed(
                f"{keep} groups of at most {opt.limit} cannot hold {len(some)} experts",
                where=f"layer {layer}",
                hint="raise `limit`, or write `protect: none`",
            )
        return pseudo_pruned(similarity(stats[layer])[some][:, some], saliency(stats[layer])[some], keep, opt.limit)

    return make_plan(opt, stats, model, ctx, grouping, weight=lambda layer: saliency(stats[layer]))


def saliency(stats: LayerStats) -> Tensor:
    """float64 [E], positive unless no expert has any."""
    mean_E = stats["gean_sum"] / stats.count_E.clamp(min=1)
    seen = mean_E[mean_E > 0]
    least = min(0.5, float(seen.min())) if len(seen) else 0.0
    return torch.where(mean_E > 0, mean_E, least)


def similarity(stats: LayerStats) -> Tensor:
    """float64 [E, E] in [0, 1]."""
    output_EE = unit_gram(stats["gy_mean"] @ stats["gy_mean"].T)
    distance_EE = distances(unit_gram(stats["logit_gram"]))
    return 0.5 * (output_EE + 1) / 2 + 0.5 * (1 - distance_EE / distance_EE.max().clamp(min=1e-30))


def pseudo_pruned(similarity_NN: Tensor, saliency_N: Tensor, keep: int, limit: int) -> Groups:
    """Groups around the `keep` most salient; ties go to the lower index."""
    lead_K = torch.argsort(saliency_N, descending=True, stable=True)[:keep]
    group_N = torch.full((len(saliency_N),), -1, dtype=torch.int64)
    group_N[lead_K] = torch.arange(keep)
    for group, lead in enumerate(lead_K.tolist()):
        left = (group_N < 0).nonzero().flatten()
        taken = torch.argsort(similarity_NN[lead, left], descending=True, stable=True)[: limit - 1]
        group_N[left[taken]] = group
    return Groups(group_N, lead_K)
