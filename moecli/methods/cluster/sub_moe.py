"""Group experts by K-means on what they answer, token by token (Sub-MoE, stage 1).

Sim(i, j) = mean over all tokens of cos(y_ti, y_tj), for every expert on every token. K-means (k-means++ seeds, best of
`restarts` by J = sum_m sum_{i in C_m} |Y_i - mean_m|^2) on outputs of length 1 needs their inner products only, so it
runs on Sim and is exact. Shares inside a group are routing frequencies; the most used member leads.

`alloc` says how many groups a layer gets. `uniform`: `keep`. `cost_curve` (default here): in windows of consecutive
layers, from one group an expert, the next group is taken from the layer where J rises least, until `keep` a layer are
left on average. `joint_pool`: experts of a window are clustered together on the token reservoir, whose tokens are
the same in all layers, and clusters are cut by layer; as few clusters fewer as needed to stay within the budget.
The paper clusters two layers jointly and does not say how; both ways are ours. Other than `uniform`, layers keep
different numbers (a `compact` model).

Source: arXiv 2506.23266, section 3.2 (Eqs. 2-3) and 3.3. Restarts, iterations and the allocation are not published;
`metric` holds the paper's ablations (`out_l2` is K-means on the outputs as they are).

- run: cluster/sub-moe
  with: {keep: 64}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import stage
from moecli.methods.cluster import Cluster, Groups, Metric, busiest, gram, make_plan, pooled_gram, protected, reads
from moecli.ops.kmeans import Clustering, CostCurve, kernel_kmeans, renumbered


class SubMoe(Cluster):
    """Options of `cluster/sub-moe`."""

    alloc: Literal["uniform", "cost_curve", "joint_pool"] = "cost_curve"
    """How many groups each layer gets: the same, by the cost of the next merge, or by clustering a window's layers
    together."""
    window: PositiveInt = 2
    """Consecutive MoE layers that share a budget of `window` x `keep` groups."""
    metric: Metric = "out_cos"
    """What makes experts alike; `joint_pool` always compares outputs of length 1."""
    restarts: PositiveInt = 10
    """Runs of K-means from other seeds; the best is kept."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if self.routing_groups == "keep" and self.alloc != "uniform":
            hint = "write `alloc: uniform`"
            yield Problem("alloc", "`routing_groups: keep` needs the same number in every layer", hint)

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return replace(super().forecast(model), uneven=self.alloc != "uniform" and self.window > 1)


def needs(opt: SubMoe) -> tuple[str, ...]:
    return ("tok_reservoir", *reads()(opt)) if opt.alloc == "joint_pool" else reads()(opt)


@stage("cluster/sub-moe", version=1, needs=needs)
def sub_moe(opt: SubMoe, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> ExpertPlan:
    def alike(layer: int, some: Tensor) -> Tensor:
        return gram(opt.metric, layer, stats, model, ctx)[some][:, some]

    def grouping(layer: int, some: Tensor, wanted: int) -> Groups:
        group_N = found.get(layer)
        if group_N is None:
            group_N = kernel_kmeans(alike(layer, some), wanted, ctx.rng, restarts=opt.restarts).group_N
        return Groups(group_N, busiest(group_N, stats[layer].count_E[some]))

    found: dict[int, Tensor] = {}
    if opt.alloc == "uniform":
        return make_plan(opt, stats, model, ctx, grouping)
    safe, every = protected(opt, stats, model, ctx), list(stats)
    for window in ctx.track([every[i : i + opt.window] for i in range(0, len(every), opt.window)], "sharing groups"):
        others = [free(layer, stats, safe) for layer in window]
        left = sum(opt.keep - len(safe.get(layer, [])) for layer in window)
        if left < len(window):
            raise StageFailed(
                f"`keep: {opt.keep}` leaves {max(left, 0)} groups for {sum(map(len, others))} experts beside protected "
                "Super Experts",
                where=f"layers {window[0]} to {window[-1]}",
                hint="raise `keep`, or write `protect: none`",
            )
        if opt.alloc == "joint_pool":
            groups = pooled(pooled_gram(window, others, stats, model, ctx), others, left, opt, ctx)
        else:
            grams = [alike(layer, some) for layer, some in zip(window, others, strict=True)]
            groups = by_cost(grams, left, opt.restarts, ctx.rng)
        found |= dict(zip(window, groups, strict=True))
    keep = {layer: int(group_N.max()) + 1 + len(safe.get(layer, [])) for layer, group_N in found.items()}
    if short := opt.keep * len(found) - sum(keep.values()):
        ctx.note(f"{short} groups fewer than `keep` asks for: clusters that span layers are cut by layer")
    return make_plan(opt, stats, model, ctx, grouping, keep=keep)


def free(layer: int, stats: CalibrationStats, safe: dict[int, list[int]]) -> Tensor:
    """Experts that may be grouped, int64."""
    alone = set(safe.get(layer, []))
    return torch.tensor([e for e in range(len(stats[layer].count_E)) if e not in alone], dtype=torch.int64)


def by_cost(grams: Sequence[Tensor], left: int, restarts: int, rng: torch.Generator) -> list[Tensor]:
    """Groups of the layers of a window, `left` in all: each time the layer whose cost rises least loses one."""
    curves = [CostCurve(some, lambda g, k: kernel_kmeans(g, k, rng, restarts=restarts)) for some in grams]
    sizes = [len(some) for some in grams]
    while sum(sizes) > left:
        rises = [c.cost(k - 1) - c.cost(k) if k > 1 else float("inf") for c, k in zip(curves, sizes, strict=True)]
        sizes[rises.index(min(rises))] -= 1
    return [curve.clustering(k).group_N for curve, k in zip(curves, sizes, strict=True)]


def pooled(gram_NN: Tensor, others: Sequence[Tensor], left: int, opt: SubMoe, ctx: Context) -> list[Tensor]:
    """Groups of each layer from one clustering of all, at most `left` in all: the largest pooled number of clusters
    that stays within, found by bisection.
    """
    sizes = [len(some) for some in others]

    def cut(clusters: int) -> list[Tensor]:
        found: Clustering = kernel_kmeans(gram_NN, clusters, ctx.rng, restarts=opt.restarts)
        return [renumbered(part) for part in found.group_N.split(sizes)]

    def count(parts: Sequence[Tensor]) -> int:
        return sum(int(part.max()) + 1 for part in parts)

    best = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    low, high = 1, min(left, sum(sizes))
    while low <= high:
        middle = (low + high) // 2
        parts = cut(middle)
        if count(parts) > left:
            high = middle - 1
        else:
            low, best = middle + 1, max(best, parts, key=count)
    return best
