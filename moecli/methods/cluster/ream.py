"""Keep the most salient experts, let the least lead absorb the rest (REAM's pseudo-pruning).

Saliency s is REAP's: mean over routed tokens of g ||y||; experts without tokens get the smallest that is not 0, at
most 0.5. The `keep` most salient are centroids. Similarity is 1/2 (cos(o_i, o_j) + 1)/2 + 1/2 (1 - D_ij/max D),
o the mean over all tokens of softmax(z)_i y_i, D the distance between columns of router logits of length 1. Centroids
in falling order of s take up to `limit` - 1 of the most similar experts that are left, until none is left: most
centroids stay alone, few large groups form, of low saliency. Shares are saliencies.

Source: arXiv 2604.04356, section 3, and what its code computes (limit 16), with two slips of that code put right: g is
counted once, and it is the weight that the model really multiplies with. The paper goes layer by layer and
recomputes statistics after each merged layer, which `merge/ream-sequential` does; here all layers are planned from the
source's statistics.

- run: cluster/ream
  with: {keep: 96}
- run: merge/ream
- run: router/row-drop
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.methods.cluster import Cluster, Groups, make_plan, reads
from moecli.ops.likeness import pseudo_pruned, saliency, similarity


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
        alike_EE = similarity(stats[layer]["gy_mean"], stats[layer]["logit_gram"])
        return Groups(*pseudo_pruned(alike_EE[some][:, some], salient(layer)[some], keep, opt.limit))

    def salient(layer: int) -> Tensor:
        return saliency(stats[layer]["gean_sum"], stats[layer].count_E)

    return make_plan(opt, stats, model, ctx, grouping, weight=salient)
