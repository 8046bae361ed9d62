"""Group experts around those that are used most (M-SMoE).

The `keep` most used experts of a layer lead a group each; every other expert joins the lead it is most like, by the
cosine of router logits over tokens: cos(z_:i, z_:j), uncentred. Shares inside a group are routing frequencies.

`uniform: false` is the paper's own budget: usage n_i / sum n is compared across layers, each layer's most used expert
counts as 1, and the keep x layers best lead, so layers keep different numbers (a `compact` model). Ties go to the
earlier layer and expert, so the budget is met exactly, where the authors' threshold can miss it. MergeMoE (2510.14436)
reports that budget to be much worse for decoders; `uniform: true` is its default and ours. `metric: weight_cos` is
close to MergeMoE's own clustering, which compares gate and up only.

Source: arXiv 2310.01334, section 3.2; router logits taken from the model's own forward pass.

- run: cluster/m-smoe
  with: {keep: 64}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import stage
from moecli.methods.cluster import Cluster, Groups, Metric, gram, make_plan, protected, reads
from moecli.ops.likeness import distances


class MSmoe(Cluster):
    """Options of `cluster/m-smoe`."""

    metric: Metric = "logit_cos"
    """What makes experts alike."""
    uniform: bool = True
    """Whether all layers keep `keep` experts, or `keep` on average, where usage is most even."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if self.routing_groups == "keep" and not self.uniform:
            yield Problem(
                "uniform", "`routing_groups: keep` needs the same number in every layer", "leave `uniform` out"
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return replace(super().forecast(model), uneven=not self.uniform)


@stage("cluster/m-smoe", version=1, needs=reads())
def m_smoe(opt: MSmoe, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> ExpertPlan:
    def grouping(layer: int, some: Tensor, keep: int) -> Groups:
        distance = distances(gram(opt.metric, layer, stats, model, ctx)[some][:, some])
        return around_busiest(distance, stats[layer].count_E[some], keep)

    keep = None if opt.uniform else budget(stats, opt.keep, protected(opt, stats, model, ctx))
    return make_plan(opt, stats, model, ctx, grouping, keep=keep)


def around_busiest(distance_NN: Tensor, count_N: Tensor, keep: int) -> Groups:
    """The `keep` most used lead; the others join the nearest lead. Ties go to the lower index."""
    lead_K = torch.argsort(count_N, descending=True, stable=True)[:keep]
    group_N = distance_NN[:, lead_K].argmin(1)
    group_N[lead_K] = torch.arange(keep)
    return Groups(group_N, lead_K)


def budget(stats: CalibrationStats, keep: int, safe: dict[int, list[int]]) -> dict[int, int]:
    """{layer: leads}, keep x layers in all: the most used experts of the whole model, at least one a layer beside those
    that stay alone.
    """
    usage = []
    for layer, found in stats.items():
        use_E = found.count_E.double() / found.count_E.sum().clamp(min=1)
        alone = torch.tensor(safe.get(layer, []), dtype=torch.int64)
        use_E[alone] = -1.0
        use_E[use_E.argmax()] = 1.0
        use_E[alone] = 2.0
        usage += [(-float(use), layer, expert) for expert, use in enumerate(use_E)]
    chosen = sorted(usage)[: keep * len(stats)]
    return {layer: sum(1 for _, at, _ in chosen if at == layer) for layer in stats}
