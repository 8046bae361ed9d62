"""Apply a plan: experts of one group become one. What every `merge/...` method shares.

A merged checkpoint keeps all rows of the router and an alias map [E] from router row to merged expert, so that
routing is exactly the original's; `router/...` stages turn it into a plain, stock-loadable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from moecli.core.artifacts import (
    DROPPED,
    CalibrationStats,
    Checkpoint,
    ExpertPlan,
    ExpertWeights,
    LayerPlan,
    PartWriter,
)
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import Family, alias_config, family_of, forecast_alias
from moecli.ops.assignment import aligned
from moecli.ops.averaging import mixed, share_matrix, shares


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


MergeLayer = Callable[[int, LayerPlan, ExpertWeights], ExpertWeights]
"""(layer, its plan, its experts with a leading E on the device) -> the merged experts with a leading K, of any float"""


def merge_experts(
    model: Checkpoint, plan: ExpertPlan, merge: MergeLayer, stats: CalibrationStats | None, ctx: Context
) -> Checkpoint:
    """Replace the experts of every planned layer by one for each group, and write the alias map.

    Reports how many merged experts a token goes to, where statistics hold a sample of tokens.
    Raises StageFailed when the plan drops experts or does not fit the model.
    """
    family = family_of(model.config)
    counts = {layer: layer_plan.experts for layer, layer_plan in plan.items()}
    with ctx.writer(model, config=alias_config(model.config, counts)) as out:
        for layer in ctx.track(list(plan), "merging"):

            def write(part: PartWriter, layer: int = layer) -> None:
                layer_plan = plan[layer]
                _check(layer_plan, model.facts.experts, layer)
                experts = on_device(family.read_experts(model, layer), ctx.device)
                family.write_experts(part, model, layer, unstacked(merge(layer, layer_plan, experts)))
                part.put(family.alias_name(layer), layer_plan.group_E.to(torch.int64))

            out.part(f"layer-{layer:03d}", write)
        out.part("mtp", lambda part: family.drop_mtp(part, model))
    ctx.record("groups", {str(layer): p.group_E.tolist() for layer, p in plan.items()})
    ctx.record("leads", {str(layer): p.lead_K.tolist() for layer, p in plan.items()})
    if stats is not None and all("tok_reservoir" in stats[layer].extra for layer in plan):
        reached = {layer: spread(family, model, layer, p, reservoir(stats, layer)) for layer, p in plan.items()}
        ctx.record("experts_per_token", {str(layer): mean for layer, mean in reached.items()})
        ctx.note(
            f"a token goes to {sum(reached.values()) / len(reached):.2f} merged experts on average, "
            f"{model.facts.top_k} before merging: of one group it may have chosen several"
        )
    return out.checkpoint


def spread(family: Family, model: Checkpoint, layer: int, plan: LayerPlan, x_TD: Tensor) -> float:
    """How many groups a token of this sample goes to on average, each counted once: at most `top_k`."""
    group_Tk = plan.group_E[family.route_tokens(model, layer, x_TD).experts_Tk].sort(-1).values
    return float((group_Tk.diff(dim=-1) != 0).sum(-1).double().mean()) + 1


def averaged(experts: ExpertWeights, share_E: Tensor, plan: LayerPlan) -> ExpertWeights:
    """sum_i share_i W_i of every group and matrix, float32 with a leading K; exactly W where a group has one member."""
    share_KE = share_matrix(share_E, plan.group_E, plan.experts)
    return each(experts, lambda value_E: mixed(value_E, share_KE))


def group_shares(plan: LayerPlan, weights: Literal["frequency", "uniform"]) -> Tensor:
    """float32 [E]: the plan's shares, or equal ones."""
    return plan.share_E if weights == "frequency" else shares(torch.ones(len(plan.group_E)), plan.group_E, plan.experts)


Align = Literal["none", "weights", "weights+acts"]


def aligned_to_leads(
    align: Align, family: Family, layer: int, plan: LayerPlan, experts: ExpertWeights, stats: CalibrationStats | None
) -> ExpertWeights:
    """Experts [E] with their neurons in the order of their group's lead.

    `weights+acts` compares activations on the token reservoir. StageFailed when the statistics lack it.
    """
    if align == "none":
        return experts
    lead_E = plan.lead_K[plan.group_E]
    if align == "weights":
        return aligned(experts, lead_E)
    x_TD = reservoir(stats, layer).to(experts.gate_FD.device).float()
    return aligned(experts, lead_E, lambda some: family.inner(as_float(some), x_TD))


def reservoir(stats: CalibrationStats | None, layer: int) -> Tensor:
    """The layer's sample of expert inputs [T, D]. StageFailed without one."""
    if stats is None or layer not in stats:
        raise StageFailed(
            "calibration tokens are needed here", where=f"layer {layer}", hint="add a `calibrate/statistics` stage"
        )
    return stats[layer]["tok_reservoir"]


def as_float(experts: ExpertWeights) -> ExpertWeights:
    return each(experts, Tensor.float)


def each(experts: ExpertWeights, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
    """Every matrix and bias that is there, changed."""
    return ExpertWeights(*(None if value is None else change(value) for value in experts))


def on_device(experts: ExpertWeights, device: torch.device) -> ExpertWeights:
    return each(experts, lambda value: value.to(device))


def unstacked(experts: ExpertWeights) -> list[ExpertWeights]:
    """One ExpertWeights for each entry of the leading dimension, on the CPU."""
    singles = (tuple(None if v is None else v[i].cpu() for v in experts) for i in range(len(experts.gate_FD)))
    return [ExpertWeights(*single) for single in singles]


def grouped_members(plan: LayerPlan) -> Tensor:
    """Experts that share a group with others, ascending int64."""
    size_K = torch.bincount(plan.group_E, minlength=plan.experts)
    return (size_K[plan.group_E] > 1).nonzero().flatten()


def _check(plan: LayerPlan, experts: int, layer: int) -> None:
    if len(plan.group_E) != experts:
        raise StageFailed(
            f"the plan is for {len(plan.group_E)} experts, the model has {experts}", where=f"layer {layer}",
            hint="calibrate and cluster the model that stands here",
        )  # fmt: skip
    if (plan.group_E == DROPPED).any():
        raise StageFailed(
            "the plan drops experts; merging needs every expert in a group", where=f"layer {layer}",
            hint="use a `cluster/...` stage",
        )  # fmt: skip
