"""Drop channels of routed experts: what every `slim/...` method shares. A method only scores; higher scores stay.

A channel is one row of gate and up with its column of down: without it the expert's output lacks exactly h_tk down_k.
Shared experts and dense layers are left alone. What is written:

* `widths: uniform`: every expert keeps its best channels, as many as all others, and the config says the new width:
  loads everywhere. Only choices inside an expert are possible (`scope: expert`).
* `widths: pad`: any number a layer or an expert; what goes is set to zero and the shapes stay: loads everywhere and
  computes exactly what the narrower experts would, but takes no byte less. To see what a scope is worth.

`repair: least_squares` then refits `down` on the calibration tokens, in closed form (`ops.channels.refit_down`): the
kept channels take over what the dropped ones contributed, as far as they are correlated. Its Gram counts each token by
the square of the weight that the model multiplies the expert's output with, so what is fitted is the layer's output.
The ridge pulls towards the plain `down`, so an expert with few tokens changes little; one with fewer than twice as many
tokens as kept channels is left alone, and the report counts these.

Source of the repair: MoDeGPT (arXiv 2408.09632), its type I, there for dense models and without the pull.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertWeights, LayerStats, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import family_of, forecast_width, width_config, width_problem
from moecli.ops.channels import Scope, keep_channels, refit_down, width_left
from moecli.ops.super_experts import super_experts

Scores = Mapping[int, Tensor]
"""{layer: float [E, F]}, higher is better."""
GRAM = "ph_cov"
REFIT_BYTES = 2 << 30
"""Memory of the experts whose `down` is refitted at a time."""


class Slim(Options):
    """Options of a method that drops channels."""

    ratio: Annotated[float, Field(gt=0, lt=1)]
    """Part of the routed experts' channels that goes."""
    widths: Literal["uniform", "pad"] = "uniform"
    """`uniform` leaves one width in all experts and writes smaller tensors; `pad` leaves any, and writes zeros."""
    scope: Scope = "expert"
    """Among which channels the lowest scores go: inside each `expert`, each `layer`, or all layers (`global`)."""
    align: PositiveInt = 128
    """Experts keep a multiple of so many channels: kernels and quantization groups ask for 64 or 128. `uniform` rounds
    up, other scopes hold the total and round down."""
    floor: NonNegativeInt = 0
    """Channels that every expert keeps at least, rounded up to `align`. Without, other scopes may empty experts."""
    protect: Literal["super_experts", "none"] = "none"
    """`super_experts` leaves the few experts whole that carry massive activations (arXiv 2507.23279)."""
    repair: Literal["least_squares", "none"] = "none"
    """`least_squares` refits `down`, so that the kept channels stand in for the others."""
    ridge: Annotated[float, Field(gt=0)] = 1e-2
    """Pull of the repair towards the plain `down`, in units of the mean squared activation."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        width = model.expert_width
        if width % self.align:
            fitting = max(n for n in (1 << p for p in range(self.align.bit_length())) if width % n == 0)
            yield Problem("align", f"`align: {self.align}` does not divide the experts' {width} channels",
                          hint=f"write `align: {fitting}`")  # fmt: skip
            return
        left = width_left(width, self.ratio, self.align)
        if self.widths == "pad":
            if model.quantized:  # `uniform` is told by its forecast
                yield Problem("", f"experts are quantized ({model.quantized}) and cannot be read",
                              hint="move this stage above the `quantize/...` stage")  # fmt: skip
            return
        if self.scope != "expert":
            yield Problem("scope", f"`scope: {self.scope}` leaves experts of different widths, `uniform` means one",
                          hint="write `widths: pad`")  # fmt: skip
        if self.protect != "none":
            yield Problem("protect", "one width for all experts leaves none whole", hint="write `widths: pad`")
        if left == width:
            yield Problem("ratio", f"`align: {self.align}` rounds what is left of {width} channels up to all of them",
                          hint=f"write `align: {_finer(width, self.ratio)}`")  # fmt: skip
        elif problem := width_problem(model, left):
            yield Problem("ratio", problem.message, hint=self._legal(model))

    def _legal(self, model: ModelFacts) -> str | None:
        """The nearest ratio that gives a legal width."""
        widths = [w for w in range(self.align, model.expert_width, self.align) if width_problem(model, w) is None]
        wanted = model.expert_width * (1 - self.ratio)
        nearest = min(widths, key=lambda w: abs(w - wanted), default=None)
        return None if nearest is None else f"write `ratio: {1 - nearest / model.expert_width:.4g}`"

    def forecast(self, model: ModelSketch) -> ModelSketch:
        if self.widths == "pad":
            return model
        return forecast_width(model, width_left(model.facts.expert_width, self.ratio, self.align))


def _finer(width: int, ratio: float) -> int:
    """The largest power of two that divides the width and leaves less than all of it."""
    return next((n for n in (64, 32, 16, 8, 4, 2) if width % n == 0 and width_left(width, ratio, n) < width), 1)


def reads(*names: str) -> Callable[[Slim], tuple[str, ...]]:
    """The statistics a method's score reads, and those its protection and repair do."""

    def needs(opt: Slim) -> tuple[str, ...]:
        protection = ("absmax",) if opt.protect == "super_experts" else ()
        return (*names, *protection, *((GRAM,) if opt.repair != "none" else ()))

    return needs


def down_norms(model: Checkpoint, layer: int) -> Tensor:
    """||down_k||_2 of every channel, float64 [E, F]."""
    return family_of(model.config).read_experts(model, layer).down_DF.double().norm(dim=1)


def scored(
    stats: CalibrationStats,
    names: Sequence[str],
    model: Checkpoint,
    ctx: Context,
    score: Callable[[LayerStats, Tensor], Tensor],
) -> Scores:
    """`score(statistics of a layer, ||down_k|| [E, F])` of every layer; `names` are the channel statistics it reads.

    Channels of experts that no token reached come below all others, among themselves in the order of ||down_k||; the
    report counts these experts. StageFailed when the statistics are of another model.
    """
    found, family = {}, family_of(model.config)
    for layer in model.facts.moe_layers:
        for name in names:
            _check_fit(stats[layer][name], family.experts_in(layer), model.facts.expert_width, layer)
        norm_EF = down_norms(model, layer)
        found[layer] = unseen_last(score(stats[layer], norm_EF), stats[layer].count_E, norm_EF)
    if unseen := sum(int((s.count_E == 0).sum()) for s in stats.values()):
        experts = sum(len(s.count_E) for s in stats.values())
        ctx.note(f"{unseen} of {experts} experts saw no calibration token; their channels were ranked by their weights")
    return found


def unseen_last(score_EF: Tensor, count_E: Tensor, otherwise_EF: Tensor) -> Tensor:
    """Scores with channels of experts without a token below all others, among themselves in the order of
    `otherwise_EF` (at least 0).
    """
    seen_E = count_E > 0
    bottom = score_EF[seen_E].min().clamp(max=0) if bool(seen_E.any()) else 0
    return torch.where(seen_E[:, None], score_EF, bottom - 1 / (1 + otherwise_EF))


def _check_fit(values: Tensor, experts: int, width: int, layer: int) -> None:
    if tuple(values.shape) != (experts, width):
        raise StageFailed(
            f"the statistics are of {values.shape[0]} experts of {values.shape[1]} channels, the model has {experts} "
            f"of {width}",
            where=f"layer {layer}",
            hint="put a `calibrate/statistics` stage right above this one",
        )


def drop_channels(
    model: Checkpoint, stats: CalibrationStats | None, score: Scores, opt: Slim, ctx: Context,
    mean: Mapping[int, Tensor] | None = None,
) -> Checkpoint:  # fmt: skip
    """Write the model without its channels of lowest score, as `opt` says.

    `mean` [E, F] of each layer is what the channels give on average: where the family's experts have an output bias and
    nothing is refitted, the dropped channels' share of the output goes there. `stats` may be None where neither
    protection nor repair is asked for. StageFailed: a score is NaN, statistics are missing, or what must stay is more
    than the ratio leaves.
    """
    if stats is None and (opt.protect != "none" or opt.repair != "none"):
        raise StageFailed(
            "`protect` and `repair` read calibration statistics, and there are none",
            hint="put a `calibrate/statistics` stage above this one",
        )
    safe = _protected(stats, model, opt, ctx)
    try:
        kept = keep_channels(score, opt.ratio, opt.scope, block=opt.align, floor=opt.floor, safe=safe)
    except ValueError as problem:
        raise StageFailed(str(problem), hint=_hint(str(problem))) from problem
    family, uniform = family_of(model.config), opt.widths == "uniform"
    width = width_left(model.facts.expert_width, opt.ratio, opt.align)
    config = width_config(model.config, width) if uniform else model.config
    repaired = _Repair(stats, opt, ctx.device)
    with ctx.writer(model, config=config) as out:
        for layer in ctx.track(model.facts.moe_layers, "dropping channels"):

            def write(part: PartWriter, layer: int = layer) -> None:
                kept_EF = kept[layer]
                experts = family.read_experts(model, layer)
                if mean is not None and opt.repair == "none":
                    experts = _with_mean(experts, kept_EF, mean[layer])
                experts = experts._replace(down_DF=repaired.down(layer, experts.down_DF, kept_EF))
                cut = _taken if uniform else _zeroed
                family.write_experts(part, model, layer, [_one(cut(experts, kept_EF), e) for e in range(len(kept_EF))])

            out.part(f"layer-{layer:03d}", write)
        if uniform:
            out.part("mtp", lambda part: family.drop_mtp(part, model))
    _report(kept, stats, opt, ctx)
    return out.checkpoint


def _protected(stats: CalibrationStats | None, model: Checkpoint, opt: Slim, ctx: Context) -> dict[int, list[int]]:
    if opt.protect == "none" or stats is None:
        return {}
    found = super_experts({layer: s["absmax"] for layer, s in stats.items()}, model.facts.layers)
    ctx.record("protected", {str(layer): experts for layer, experts in found.items()})
    return found


def _hint(said: str) -> str | None:
    return "lower `ratio` or `floor`, or write `protect: none`" if "must stay" in said else None


@dataclass(frozen=True)
class _Repair:
    """Refits `down` where that is asked for."""

    stats: CalibrationStats | None
    opt: Slim
    device: torch.device

    def down(self, layer: int, down_EDF: Tensor, kept_EF: Tensor) -> Tensor:
        if self.opt.repair == "none" or self.stats is None:
            return down_EDF
        fit_E = _enough(self.stats[layer].count_E, kept_EF)
        per_call = max(1, REFIT_BYTES // (8 * (4 * down_EDF[0].numel() + 4 * down_EDF.shape[2] ** 2)))
        pieces = zip(*(x.split(per_call) for x in (down_EDF, self._gram(layer), kept_EF)), strict=True)
        fitted = [self._fitted(*piece).to(down_EDF) for piece in pieces]
        return torch.where(fit_E[:, None, None], torch.cat(fitted), down_EDF)

    def _gram(self, layer: int) -> Tensor:
        gram_EFF = self.stats[layer][GRAM]
        if not bool(torch.isfinite(gram_EFF).all()):
            expert = int((~torch.isfinite(gram_EFF)).flatten(1).any(1).nonzero()[0])
            raise StageFailed(f"`{GRAM}` of expert {expert} holds values that are not numbers", where=f"layer {layer}")
        return gram_EFF

    def _fitted(self, down_EDF: Tensor, gram_EFF: Tensor, kept_EF: Tensor) -> Tensor:
        on = self.device
        return refit_down(down_EDF.to(on), gram_EFF.to(on), kept_EF.to(on), self.opt.ridge)


def _enough(count_E: Tensor, kept_EF: Tensor) -> Tensor:
    """Experts with at least twice as many tokens as kept channels, and something to refit."""
    left_E = kept_EF.sum(1)
    return (count_E >= 2 * left_E) & (left_E < kept_EF.shape[1])


def _taken(experts: ExpertWeights, kept_EF: Tensor) -> ExpertWeights:
    """The kept channels in their old order; every expert keeps as many."""
    width = int(kept_EF[0].sum())
    index_EK = kept_EF.nonzero()[:, 1].view(len(kept_EF), width)

    def rows(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        index = index_EK if value.dim() == 2 else index_EK[..., None].expand(-1, -1, value.shape[2])
        return value.gather(1, index)

    down = experts.down_DF.gather(2, index_EK[:, None].expand(-1, experts.down_DF.shape[1], -1))
    return ExpertWeights(
        rows(experts.gate_FD), rows(experts.up_FD), down,
        rows(experts.gate_bias_F), rows(experts.up_bias_F), experts.down_bias_D,
    )  # fmt: skip


def _zeroed(experts: ExpertWeights, kept_EF: Tensor) -> ExpertWeights:
    """All channels in their places, those that go with zeros for weights and biases."""
    gone_EF = ~kept_EF

    def rows(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return value.masked_fill(gone_EF if value.dim() == 2 else gone_EF[..., None], 0)

    return ExpertWeights(
        rows(experts.gate_FD), rows(experts.up_FD), experts.down_DF.masked_fill(gone_EF[:, None], 0),
        rows(experts.gate_bias_F), rows(experts.up_bias_F), experts.down_bias_D,
    )  # fmt: skip


def _with_mean(experts: ExpertWeights, kept_EF: Tensor, mean_EF: Tensor) -> ExpertWeights:
    """What the dropped channels give on average, in the output's bias; unchanged without one."""
    if experts.down_bias_D is None:
        return experts
    lost_ED = (experts.down_DF.double() @ (mean_EF * ~kept_EF)[..., None])[..., 0]
    return experts._replace(down_bias_D=(experts.down_bias_D + lost_ED).to(experts.down_bias_D.dtype))


def _one(experts: ExpertWeights, expert: int) -> ExpertWeights:
    return ExpertWeights(*(None if value is None else value[expert] for value in experts))


def _report(kept: Mapping[int, Tensor], stats: CalibrationStats | None, opt: Slim, ctx: Context) -> None:
    counts = {layer: kept_EF.sum(1) for layer, kept_EF in kept.items()}
    ctx.record("kept_channels", {str(layer): left_E.tolist() for layer, left_E in counts.items()})
    total, left = sum(k.numel() for k in kept.values()), sum(int(c.sum()) for c in counts.values())
    experts = sum(len(c) for c in counts.values())
    shapes = "" if opt.widths == "uniform" else "; they are zeros in tensors of the old shapes"
    ctx.note(f"{total - left} of {total} channels ({1 - left / total:.1%}) dropped{shapes}")
    if emptied := sum(int((c == 0).sum()) for c in counts.values()):
        ctx.note(f"{emptied} of {experts} experts lost all channels: what is routed to them gives nothing")
    if opt.repair != "none" and stats is not None:
        cut = {layer: kept_EF.sum(1) < kept_EF.shape[1] for layer, kept_EF in kept.items()}
        few = sum(int((cut_E & ~_enough(stats[layer].count_E, kept[layer])).sum()) for layer, cut_E in cut.items())
        done = sum(int(cut_E.sum()) for cut_E in cut.values()) - few
        ctx.note(f"`down` of {done} of {experts} experts was refitted, {few} had too few tokens for that")
