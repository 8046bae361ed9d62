"""Drop whole experts: what every `prune/...` method shares. A method only scores; higher scores stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import family_of, forecast_keep, keep_problem, one_group
from moecli.ops.select import keep_best
from moecli.ops.super_experts import super_experts

Scores = Mapping[int, Tensor]
"""{layer: float [E]}, higher is better."""


class Prune(Options):
    """Options of a pruning method."""

    keep: PositiveInt
    """Experts left per layer."""
    protect: Literal["super_experts", "none"] = "super_experts"
    """`super_experts` never drops the few experts that carry massive activations (arXiv 2507.23279); this default is
    ours, `none` is what the papers do."""
    groups: Literal["per_group", "flatten"] = "per_group"
    """Under group-limited routing: `per_group` keeps the best of each routing group; `flatten` ranks all together and
    ends the grouping, so the router picks among all that are left. EASY-EP's masked gate of all rows is not there."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.router_rows != model.experts:
            yield Problem(
                "",
                f"{model.router_rows} router rows share {model.experts} merged experts here, which cannot be pruned",
                hint="put `- run: router/row-drop` above this stage",
            )
        elif problem := keep_problem(self._grouped(model), self.keep):
            yield problem

    def forecast(self, model: ModelSketch) -> ModelSketch:
        if self.groups == "flatten":
            model = replace(model, config=one_group(model.config), facts=self._grouped(model.facts))
        return forecast_keep(model, self.keep)

    def _grouped(self, facts: ModelFacts) -> ModelFacts:
        """Facts under this policy of groups."""
        return replace(facts, groups=1, groups_used=1) if self.groups == "flatten" else facts


def reads(*names: str) -> Callable[[Prune], tuple[str, ...]]:
    """The statistics a method's score reads, and those its protection does."""
    return lambda opt: (*names, "absmax") if opt.protect == "super_experts" else names


def drop_experts(model: Checkpoint, stats: CalibrationStats, score: Scores, opt: Prune, ctx: Context) -> Checkpoint:
    """Keep the best experts of each layer and their router rows; nothing else changes.

    Under group-limited routing as `opt.groups` says. Raises StageFailed when a score is NaN, when more experts are
    protected than may stay, and for a layer without tokens, whose scores would all be alike.
    """
    family = family_of(model.config)
    config = one_group(model.config) if opt.groups == "flatten" else model.config
    blocks = family_of(config).facts.groups
    for layer in score:
        if not stats[layer].count_E.any():
            raise StageFailed(
                "no calibration token was routed to any expert", where=f"layer {layer}",
                hint="calibrate with text, and with more `samples`",
            )  # fmt: skip
    safe = protected(stats, model, opt, ctx)
    kept = {layer: _choose(scores, safe.get(layer, []), opt.keep, blocks, layer) for layer, scores in score.items()}
    with ctx.writer(model, config=family.shrink_config(config, opt.keep)) as out:
        for layer in ctx.track(model.facts.moe_layers, "dropping experts"):

            def write(part: PartWriter, layer: int = layer) -> None:
                family.keep_experts(part, model, layer, kept[layer])
                family.keep_router_rows(part, model, layer, kept[layer])

            out.part(f"layer-{layer:03d}", write)
        out.part("mtp", lambda part: family.drop_mtp(part, model))
    ctx.record("kept", {str(layer): experts for layer, experts in kept.items()})
    return out.checkpoint


def protected(stats: CalibrationStats, model: Checkpoint, opt: Prune, ctx: Context) -> dict[int, list[int]]:
    """{layer: Super Experts} that must stay; none with `protect: none`."""
    if opt.protect == "none":
        return {}
    found = super_experts({layer: s["absmax"] for layer, s in stats.items()}, model.facts.layers)
    ctx.record("protected", {str(layer): experts for layer, experts in found.items()})
    return found


def _choose(score_E: Tensor, safe: list[int], keep: int, blocks: int, layer: int) -> list[int]:
    raised_E = score_E.double()
    raised_E[safe] += torch.inf  # NaN stays NaN
    try:
        kept = keep_best(raised_E, keep, blocks)
    except ValueError as problem:
        raise StageFailed(str(problem), where=f"layer {layer}") from problem
    if lost := sorted(set(safe) - set(kept)):
        where = "of this layer" if blocks == 1 else "of one routing group"
        raise StageFailed(
            f"`keep: {keep}` leaves no room for all protected Super Experts {where} (expert {lost[0]} had to go)",
            where=f"layer {layer}",
            hint="raise `keep`, or write `protect: none`",
        )
    return kept
