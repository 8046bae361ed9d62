"""Decide which experts become one: what every `cluster/...` method shares. Nothing is merged here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import family_of
from moecli.ops.averaging import shares
from moecli.ops.likeness import unit_gram
from moecli.ops.super_experts import super_experts

Metric = Literal["out_cos", "out_l2", "logit_cos", "weight_cos"]
"""What makes two experts alike: the cosine of their outputs token by token, the distance of their outputs, the cosine
of their router logits over tokens (uncentred), or the cosine of their weights."""

NEEDS: Mapping[Metric, tuple[str, ...]] = {
    "out_cos": ("gram_cos",),
    "out_l2": ("tok_reservoir",),
    "logit_cos": ("logit_gram",),
    "weight_cos": (),
}
"""The statistics that each metric reads."""
_CHUNK_BYTES = 256 << 20


class Cluster(Options):
    """Options of a clustering method."""

    keep: PositiveInt
    """Experts left per layer, that is, clusters."""
    protect: Literal["super_experts", "none"] = "super_experts"
    """`super_experts` leaves the few experts that carry massive activations (arXiv 2507.23279) alone in their groups;
    this default is ours, `none` is what the papers do."""
    routing_groups: Literal["span", "keep"] = "span"
    """Under group-limited routing: clusters may `span` routing groups (then the merged model keeps all router rows), or
    `keep` within them, as many in each, so that `router/...` can give each one row."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.keep > model.experts:
            yield Problem(
                "keep",
                f"`keep` must be at most the model's {model.experts} experts, got {self.keep}",
                hint=f"`keep` counts the experts left per layer; `keep: {max(1, model.experts // 2)}` halves them",
            )
        elif self.routing_groups == "keep" and self.keep % model.groups:
            yield Problem(
                "keep",
                f"`keep` must be a multiple of the router's {model.groups} groups (`n_group`), got {self.keep}",
                hint=f"use `keep: {max(1, self.keep // model.groups) * model.groups}`",
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return replace(model, planned=self.keep, within_groups=self.routing_groups == "keep")


def reads(*names: str) -> Callable[[Cluster], tuple[str, ...]]:
    """The statistics a method reads: those named, those of its metric, and those of its protection."""

    def needs(opt: Cluster) -> tuple[str, ...]:
        metric = NEEDS.get(getattr(opt, "metric", ""), ())  # type: ignore[call-overload]
        return (*names, *metric, *(("absmax",) if opt.protect == "super_experts" else ()))

    return needs


class Groups(NamedTuple):
    """Some experts in groups, in whatever order."""

    group_N: Tensor
    """int64, group of each"""
    lead_K: Tensor
    """int64, which of them stands for each group"""
    extra: Mapping[str, Tensor] = {}
    """For the report (`LayerPlan.extra`); left out where experts are protected."""


Grouping = Callable[[int, Tensor, int], Groups]
"""(layer, experts that may be grouped, groups wanted) -> their groups"""


def make_plan(
    opt: Cluster, stats: CalibrationStats, model: Checkpoint, ctx: Context, grouping: Grouping, *,
    weight: Callable[[int], Tensor] | None = None, keep: Mapping[int, int] | None = None,
) -> ExpertPlan:  # fmt: skip
    """The plan of every layer that statistics know; protected experts stay alone.

    `weight` gives [E] values that become shares (routing counts without it), `keep` the groups of each layer where they
    differ. Raises StageFailed when protected experts leave no group for the others, and for a layer without tokens.
    """
    safe = protected(opt, stats, model, ctx)
    layers = {}
    for layer in ctx.track(list(stats), "clustering"):
        if not stats[layer].count_E.any():
            raise StageFailed(
                "no calibration token was routed to any expert", where=f"layer {layer}",
                hint="calibrate with text, and with more `samples`",
            )  # fmt: skip
        wanted = opt.keep if keep is None else keep[layer]
        weight_E = stats[layer].count_E if weight is None else weight(layer)
        blocks = model.facts.groups if opt.routing_groups == "keep" else 1
        layers[layer] = layer_plan(layer, weight_E, set(safe.get(layer, [])), wanted, blocks, grouping)
    return ExpertPlan(layers)


def protected(opt: Cluster, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> dict[int, list[int]]:
    """{layer: Super Experts} that stay alone; none with `protect: none`."""
    if opt.protect == "none":
        return {}
    found = super_experts({layer: s["absmax"] for layer, s in stats.items()}, model.facts.layers)
    ctx.record("protected", {str(layer): experts for layer, experts in found.items()})
    return found


def layer_plan(layer: int, weight_E: Tensor, safe: set[int], keep: int, blocks: int, grouping: Grouping) -> LayerPlan:
    """Groups of each block of consecutive experts, put together."""
    count = len(weight_E)
    group_E, leads, extra = torch.empty(count, dtype=torch.int64), [], {}
    for block in torch.arange(count).chunk(blocks):
        alone = torch.tensor([e for e in block.tolist() if e in safe], dtype=torch.int64)
        others = torch.tensor([e for e in block.tolist() if e not in safe], dtype=torch.int64)
        left = keep // blocks - len(alone)
        if left < 0 or (left == 0 and len(others)):
            raise StageFailed(
                f"`keep: {keep}` leaves {max(left, 0)} groups for {len(others)} experts beside {len(alone)} protected "
                "Super Experts",
                where=f"layer {layer}",
                hint=f"raise `keep` to {blocks * (len(alone) + 1)} or more, or write `protect: none`",
            )
        first = sum(len(some) for some in leads)
        group_N, lead_K, extra = grouping(layer, others, left) if left else (others, others, {})
        group_E[others] = first + group_N
        group_E[alone] = first + left + torch.arange(len(alone))
        leads.append(torch.cat((others[lead_K], alone)))
    group_E, lead_K = in_lead_order(group_E, torch.cat(leads))
    whole = blocks == 1 and not safe
    return LayerPlan(group_E, shares(weight_E, group_E, keep), lead_K, extra if whole else {})


def in_lead_order(group_E: Tensor, lead_K: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber groups so that leads ascend: kept router rows stay in the order of the original experts."""
    order = torch.argsort(lead_K)
    return torch.argsort(order)[group_E], lead_K[order]


def busiest(group_N: Tensor, weight_N: Tensor) -> Tensor:
    """The member of each group with the largest weight, int64 [K]; ties go to the lower index."""
    members = [(group_N == group).nonzero().flatten() for group in range(int(group_N.max()) + 1)]
    return torch.stack([some[weight_N[some].argmax()] for some in members])


# -- how alike experts are


def gram(metric: Metric, layer: int, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Tensor:
    """Inner products of experts under a metric, float64 [E, E]: they are vectors, whatever the metric.

    `out_l2` is taken on the token reservoir, mean over its tokens; the others on all tokens or on none.
    """
    found = stats[layer]
    match metric:
        case "out_cos":
            return found["gram_cos"] / max(found.tokens, 1)
        case "logit_cos":
            return unit_gram(found["logit_gram"])
        case "out_l2":
            return _output_gram(model, layer, found["tok_reservoir"], ctx)
        case "weight_cos":
            return unit_gram(_weight_gram(model, layer, ctx))


def _weight_gram(model: Checkpoint, layer: int, ctx: Context) -> Tensor:
    """Inner products of [gate | up | down] as they are stored, neurons unmatched."""
    experts = family_of(model.config).read_experts(model, layer)
    total_EE = torch.zeros(len(experts.gate_FD), len(experts.gate_FD), dtype=torch.float64)
    for matrix_E in (experts.gate_FD, experts.up_FD, experts.down_DF):
        flat_EX = matrix_E.flatten(1)
        for some in flat_EX.split(max(1, _CHUNK_BYTES // (8 * len(flat_EX))), dim=1):
            part = some.to(ctx.device).double()
            total_EE += (part @ part.T).cpu()
    return total_EE


def _output_gram(model: Checkpoint, layer: int, x_TD: Tensor, ctx: Context) -> Tensor:
    family = family_of(model.config)
    experts = _on_device(model, layer, torch.arange(model.facts.experts), ctx)
    count, width, hidden = experts.gate_FD.shape
    total_EE = torch.zeros(count, count, dtype=torch.float64)
    for x in x_TD.split(max(1, _CHUNK_BYTES // (4 * count * (2 * width + hidden)))):
        flat_EX = family.expert_forward(experts, x.to(ctx.device).float()).flatten(1)
        total_EE += (flat_EX @ flat_EX.T).double().cpu()
    return total_EE / max(len(x_TD), 1)


def pooled_gram(
    window: Sequence[int], others: Sequence[Tensor], stats: CalibrationStats, model: Checkpoint, ctx: Context
) -> Tensor:
    """Mean cosine of outputs of experts of several layers on the token reservoir, float64 [N, N], layer after layer.

    StageFailed when the layers' reservoirs hold other tokens.
    """
    keys = [stats[layer]["tok_reservoir_key"] for layer in window]
    if any(not torch.equal(keys[0], key) for key in keys):
        raise StageFailed(
            "the token reservoirs of these layers hold other tokens",
            where=f"layers {window[0]} to {window[-1]}",
            hint="calibrate again, or write `alloc: cost_curve`",
        )
    tokens = len(stats[window[0]]["tok_reservoir"])
    layers = [_on_device(model, layer, some, ctx) for layer, some in zip(window, others, strict=True)]
    family, size = family_of(model.config), sum(len(some) for some in others)
    width, hidden = layers[0].gate_FD.shape[1:]
    total_NN = torch.zeros(size, size, dtype=torch.float64)
    for at in torch.arange(tokens).split(max(1, _CHUNK_BYTES // (4 * size * (2 * width + hidden)))):
        outputs = [
            torch.nn.functional.normalize(
                family.expert_forward(w, stats[layer]["tok_reservoir"][at].to(ctx.device).float()), dim=-1
            ).flatten(1)
            for layer, w in zip(window, layers, strict=True)
        ]
        unit_NX = torch.cat(outputs)
        total_NN += (unit_NX @ unit_NX.T).double().cpu()
    return total_NN / max(tokens, 1)


def _on_device(model: Checkpoint, layer: int, some: Tensor, ctx: Context) -> ExpertWeights:
    """Some experts of a layer in fp32."""
    stored = family_of(model.config).read_experts(model, layer)
    return ExpertWeights(*(None if value is None else value[some].to(ctx.device).float() for value in stored))
