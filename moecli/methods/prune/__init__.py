"""Drop whole experts: what every `prune/...` method shares. A method only scores; higher scores stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import family_of, forecast_keep, keep_problem
from moecli.ops.select import keep_best


class Prune(Options):
    """Options of a pruning method."""

    keep: PositiveInt
    """Experts left per layer."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.router_rows != model.experts:
            yield Problem(
                "",
                f"{model.router_rows} router rows share {model.experts} merged experts here, which cannot be pruned",
                hint="put `- run: router/row-drop` above this stage",
            )
        elif problem := keep_problem(model, self.keep):
            yield problem

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return forecast_keep(model, self.keep)


def drop_experts(model: Checkpoint, score: Mapping[int, Tensor], keep: int, ctx: Context) -> Checkpoint:
    """Keep the `keep` best experts of each layer and their router rows; nothing else changes.

    `score` is {layer: float [E]}. Under group-limited routing the best of each group stay (policy `per_group`).
    Raises StageFailed when a score is NaN.
    """
    family = family_of(model.config)
    groups = model.facts.groups
    kept = {layer: _choose(scores, keep, groups, layer) for layer, scores in score.items()}
    with ctx.writer(model, config=family.shrink_config(model.config, keep)) as out:
        for layer in ctx.track(model.facts.moe_layers, "dropping experts"):

            def write(part: PartWriter, layer: int = layer) -> None:
                family.keep_experts(part, model, layer, kept[layer])
                family.keep_router_rows(part, model, layer, kept[layer])

            out.part(f"layer-{layer:03d}", write)
        out.part("mtp", lambda part: family.drop_mtp(part, model))
    ctx.record("kept", {str(layer): experts for layer, experts in kept.items()})
    return out.checkpoint


def _choose(score_E: Tensor, keep: int, groups: int, layer: int) -> list[int]:
    try:
        return keep_best(score_E, keep, groups)
    except ValueError as problem:
        raise StageFailed(str(problem), where=f"layer {layer}") from problem
