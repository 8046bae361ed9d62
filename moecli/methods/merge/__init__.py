"""Apply a plan: experts of one group become one. What every `merge/...` method shares.

A merged checkpoint keeps all rows of the router and an alias map [E] from router row to merged expert, so that
routing is exactly the original's; `router/...` stages turn it into a plain, stock-loadable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from moecli.core.artifacts import DROPPED, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import alias_config, family_of, forecast_alias


class Merge(Options):
    """Options of a merging method."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.router_rows != model.experts:
            yield Problem(
                "",
                "the experts of this model are merged already",
                hint="put `- run: router/row-drop` between the two merges, or raise the first one's compression",
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return forecast_alias(model, model.planned or model.facts.experts)


MergeGroup = Callable[[int, LayerPlan, int], ExpertWeights]
"""(layer, its plan, group) -> the merged expert"""


def merge_experts(model: Checkpoint, plan: ExpertPlan, merge: MergeGroup, ctx: Context) -> Checkpoint:
    """Replace the experts of every planned layer by one for each group, and write the alias map.

    Raises StageFailed when the plan drops experts or does not fit the model.
    """
    family = family_of(model.config)
    counts = {layer: layer_plan.experts for layer, layer_plan in plan.items()}
    with ctx.writer(model, config=alias_config(model.config, counts)) as out:
        for layer in ctx.track(list(plan), "merging"):

            def write(part: PartWriter, layer: int = layer) -> None:
                layer_plan = plan[layer]
                _check(layer_plan, model.facts.experts, layer)
                groups = range(layer_plan.experts)
                family.write_experts(part, model, layer, [merge(layer, layer_plan, g) for g in groups])
                part.put(family.alias_name(layer), layer_plan.group_E.to(torch.int64))

            out.part(f"layer-{layer:03d}", write)
        out.part("mtp", lambda part: family.drop_mtp(part, model))
    ctx.record("groups", {str(layer): p.group_E.tolist() for layer, p in plan.items()})
    ctx.record("leads", {str(layer): p.lead_K.tolist() for layer, p in plan.items()})
    return out.checkpoint


def _check(plan: LayerPlan, experts: int, layer: int) -> None:
    if len(plan.group_E) != experts:
        raise StageFailed(
            f"the plan is for {len(plan.group_E)} experts, the model has {experts}", where=f"layer {layer}"
        )
    if (plan.group_E == DROPPED).any():
        raise StageFailed("the plan drops experts; merging needs every expert in a group", where=f"layer {layer}")
