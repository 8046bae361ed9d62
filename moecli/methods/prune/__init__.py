"""Drop whole experts: what every `prune/...` method shares. A method only scores; higher scores stay."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options, RunSetting
from moecli.families import Family, alias_config, family_of, forecast_alias, forecast_keep, keep_problem, one_group
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
    groups: Literal["per_group", "flatten", "mask"] = "per_group"
    """Under group-limited routing: `per_group` keeps the best of each routing group; `flatten` ranks all together and
    ends the grouping, so the router picks among all that are left; `mask` ranks all together and keeps the grouping and
    every router row, those of dropped experts with a correction bias of -inf (EASY-EP's way; a `compact` model)."""
    keep_multiple_of: Annotated[PositiveInt, RunSetting()] = 1
    """Refuse a `keep` that is no multiple of this: expert-parallel serving divides experts evenly over its devices."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        least = masked_floor(model) * model.groups
        if model.router_rows != model.experts:
            yield Problem(
                "",
                f"{model.router_rows} router rows share {model.experts} merged experts here, which cannot be pruned",
                hint="put `- run: router/row-drop` above this stage",
            )
        elif problem := keep_problem(self._grouped(model), self.keep):
            yield problem
        elif self.groups == "mask" and self.keep < least:
            yield Problem(
                "keep",
                f"the router picks {model.top_k} experts per token from {model.groups_used} of {model.groups} groups, "
                f"so `mask` keeps {masked_floor(model)} in each: `keep` must be at least {least}, got {self.keep}",
                hint=f"use `keep: {least}`",
            )
        elif self.keep % self.keep_multiple_of:
            above = -(-self.keep // self.keep_multiple_of) * self.keep_multiple_of
            yield Problem(
                "keep",
                f"`keep` must be a multiple of {self.keep_multiple_of} (`keep_multiple_of`), got {self.keep}",
                hint=f"use `keep: {above}`" if above <= model.experts else None,
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        if self.groups == "mask":
            if model.specs and correction_name(family_of(model.config), model.specs, model.facts.moe_layers[0]) is None:
                raise _no_correction(model.facts.model_type)
            return forecast_alias(model, self.keep)
        if self.groups == "flatten":
            model = replace(model, config=one_group(model.config), facts=self._grouped(model.facts))
        return forecast_keep(model, self.keep)

    def _grouped(self, facts: ModelFacts) -> ModelFacts:
        """Facts that say how many experts must be left: only `per_group` keeps the groups equal."""
        return facts if self.groups == "per_group" else replace(facts, groups=1, groups_used=1)


def reads(*names: str) -> Callable[[Prune], tuple[str, ...]]:
    """The statistics a method's score reads, and those its protection does."""
    return lambda opt: (*names, "absmax") if opt.protect == "super_experts" else names


def drop_experts(model: Checkpoint, stats: CalibrationStats, score: Scores, opt: Prune, ctx: Context) -> Checkpoint:
    """Keep the best experts of each layer and their router rows; nothing else changes.

    Under group-limited routing as `opt.groups` says. Raises StageFailed when a score is NaN, when more experts are
    protected than may stay, and for a layer without tokens, whose scores would all be alike.
    """
    family = family_of(model.config)
    for layer in score:
        if not stats[layer].count_E.any():
            raise StageFailed(
                "no calibration token was routed to any expert", where=f"layer {layer}",
                hint="calibrate with text, and with more `samples`",
            )  # fmt: skip
    safe = protected(stats, model, opt, ctx)
    floor, kept, forced = masked_floor(model.facts) if opt.groups == "mask" else 0, {}, 0
    for layer, score_E in score.items():
        chosen = partial(_choose, score_E, safe.get(layer, []), opt, model.facts, layer)
        kept[layer] = chosen(floor)
        forced += len(set(kept[layer]) - set(chosen(0)))
    if forced:
        ctx.note(f"{forced} experts stay although others score more: each routing group keeps {floor} or more")
    with ctx.writer(model, config=_config(model, opt)) as out:
        for layer in ctx.track(model.facts.moe_layers, "dropping experts"):

            def write(part: PartWriter, layer: int = layer) -> None:
                family.keep_experts(part, model, layer, kept[layer])
                if opt.groups == "mask":
                    mask_rows(part, family, model, layer, kept[layer])
                else:
                    family.keep_router_rows(part, model, layer, kept[layer])

            out.part(f"layer-{layer:03d}", write)
        out.part("mtp", lambda part: family.drop_mtp(part, model))
    ctx.record("kept", {str(layer): experts for layer, experts in kept.items()})
    return out.checkpoint


def _config(model: Checkpoint, opt: Prune) -> Mapping[str, Any]:
    if opt.groups == "mask":
        return alias_config(model.config, dict.fromkeys(model.facts.moe_layers, opt.keep))
    config = one_group(model.config) if opt.groups == "flatten" else model.config
    return family_of(model.config).shrink_config(config, opt.keep)


def mask_rows(part: PartWriter, family: Family, model: Checkpoint, layer: int, kept: list[int]) -> None:
    """Keep all router rows: an alias map for `kept`, and a correction bias of -inf for the others, which no selection
    can choose (their entries of the map are never read). Raises StageFailed where the router has no such bias.
    """
    name = correction_name(family, model, layer)
    if name is None:
        raise _no_correction(family.model_type)
    bias_E = model.get(name).clone()
    dropped_E = torch.ones(bias_E.numel(), dtype=torch.bool).index_fill_(0, torch.tensor(kept), False)
    part.put(name, bias_E.masked_fill(dropped_E.view(bias_E.shape), float("-inf")))
    alias_E = torch.zeros(bias_E.numel(), dtype=torch.int64)
    alias_E[kept] = torch.arange(len(kept))
    part.put(family.alias_name(layer), alias_E)


def correction_name(family: Family, names: Container[str], layer: int) -> str | None:
    """On-disk name of the bias that moves the router's selection and not its weights; None without one."""
    return next((n for n, tensor in family.router_names(layer, names).items() if tensor.role == "correction"), None)


def _no_correction(model_type: str) -> StageFailed:
    return StageFailed(
        f"`mask` needs a router with a correction bias, `{model_type}` has none", hint="leave `groups` out"
    )


def masked_floor(facts: ModelFacts) -> int:
    """Experts that `mask` leaves in each routing group at least: whichever groups a token uses, it finds all it picks
    (ours: EASY-EP's own code lets a group run empty, and its router then picks dropped experts). Two, because groups
    are ranked by their best two.
    """
    return 1 if facts.groups == 1 else max(2, -(-facts.top_k // facts.groups_used))


def protected(stats: CalibrationStats, model: Checkpoint, opt: Prune, ctx: Context) -> dict[int, list[int]]:
    """{layer: Super Experts} that must stay; none with `protect: none`."""
    if opt.protect == "none":
        return {}
    found = super_experts({layer: s["absmax"] for layer, s in stats.items()}, model.facts.layers)
    ctx.record("protected", {str(layer): experts for layer, experts in found.items()})
    return found


def _choose(
    score_E: Tensor, safe: list[int], opt: Prune, facts: ModelFacts, layer: int, floor: int
) -> list[int]:  # fmt: skip
    """Experts that stay, ascending: those that must, the best `floor` of each routing group, and the best of all."""
    blocks = facts.groups if opt.groups == "per_group" else 1
    raised_E, must = score_E.double().clone(), set(safe)
    try:
        raised_E[safe] += torch.inf  # NaN stays NaN
        if floor:
            must |= set(keep_best(raised_E, floor * facts.groups, facts.groups))
            raised_E[sorted(must)] += torch.inf
        kept = keep_best(raised_E, opt.keep, blocks)
    except ValueError as problem:
        hint = "calibrate again: statistics must be finite numbers"
        raise StageFailed(str(problem), where=f"layer {layer}", hint=hint) from problem
    if lost := sorted(must - set(kept)):
        where = "of this layer" if blocks == 1 else "of one routing group"
        beside = f" beside {floor} experts of each routing group" if floor else ""
        raise StageFailed(
            f"`keep: {opt.keep}` leaves no room for all protected Super Experts {where}{beside} "
            f"(expert {lost[0]} had to go)",
            where=f"layer {layer}",
            hint="raise `keep`, or write `protect: none`",
        )
    return kept
