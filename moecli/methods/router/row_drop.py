"""Keep one router row for each merged expert: that of the group's lead. The result loads everywhere.

Rows of the leads stay in ascending original order, with their biases; the alias map goes. Routing changes: a group
gets the probability of its lead alone, where the alias form gives it the sum over its members.

Source: mode `row_drop` as REAM (arXiv 2604.04356) uses it after merging.

- run: router/row-drop
"""

from __future__ import annotations

from collections.abc import Iterator

from moecli.core.artifacts import Checkpoint, ExpertPlan, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options, stage
from moecli.families import family_of, forecast_row_drop


class RowDrop(Options):
    """Options of `router/row-drop`: none."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.router_rows == model.experts:
            yield Problem(
                "",
                f"the router has one row for each of its {model.experts} experts, so there is none to drop",
                hint="put it below a `merge/...` stage, or leave it out",
            )
        elif model.groups > 1:
            yield Problem(
                "",
                f"dropping rows would move experts across the router's {model.groups} groups",
                hint="leave `router/row-drop` out: the merged model keeps all rows and its groups",
            )
        elif model.experts < model.top_k:
            yield Problem(
                "",
                f"the router picks {model.top_k} experts per token, only {model.experts} are left",
                hint=f"cluster with `keep: {model.top_k}` or more",
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return forecast_row_drop(model)


@stage("router/row-drop", version=1)
def row_drop(opt: RowDrop, plan: ExpertPlan, model: Checkpoint, ctx: Context) -> Checkpoint:
    family = family_of(model.config)
    counts = {layer_plan.experts for layer_plan in plan.values()}
    if len(counts) > 1:
        raise StageFailed(
            f"layers keep different numbers of experts ({min(counts)} to {max(counts)}); one count is needed",
            hint="cluster with the same `keep` in every layer",
        )
    with ctx.writer(model, config=family.shrink_config(model.config, counts.pop())) as out:
        for layer in ctx.track(list(plan), "dropping router rows"):

            def write(part: PartWriter, layer: int = layer) -> None:
                family.keep_router_rows(part, model, layer, plan[layer].lead_K.tolist())
                part.drop(family.alias_name(layer), "router rows now match the experts")

            out.part(f"layer-{layer:03d}", write)
    return out.checkpoint
