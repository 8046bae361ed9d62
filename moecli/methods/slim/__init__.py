"""Drop channels of routed experts: what every `slim/...` method shares. A method only scores; higher scores stay.

A channel is one row of gate and up with its column of down: without it the expert's output lacks exactly h_tk down_k.
Shared experts and dense layers are left alone. What is written:

* `widths: uniform`: every expert keeps its best channels, as many as all others, and the config says the new width:
  loads everywhere. Only choices inside an expert are possible (`scope: expert`).
* `widths: per_layer`: one width in each layer, chosen by `ops.channels.layer_widths` so that the largest sum of scores
  stays. A compact model: it loads with `import moecli` or the file beside it, its layers are stock modules.
* `widths: ragged`: any width in any expert. A compact model; once loaded it takes what its channels take, and runs the
  experts of each width together (`families.ragged`). Not for families whose files stack the experts of a layer.
* `widths: pad`: any number a layer or an expert; what goes is set to zero and the shapes stay: loads everywhere and
  computes exactly what the narrower experts would, but takes no byte less.

Which channels stay is decided here and not by a stage of its own: it needs every channel's score and nothing else, and
`ops.channels.keep_channels` makes it the best choice under `align`, `floor`, `ceiling`, `layer_floor` and `protect`.

`repair: least_squares` then refits `down` on the calibration tokens, in closed form (`ops.channels.refit_down`): the
kept channels take over what the dropped ones contributed, as far as they are correlated. Its Gram counts each token by
the square of the weight that the model multiplies the expert's output with, so what is fitted is the layer's output.
The ridge pulls towards the plain `down`, so an expert with few tokens changes little; one with fewer than twice as many
tokens as kept channels is left alone, and the report counts these.

Source of the repair: MoDeGPT (arXiv 2408.09632), its type I, there for dense models and without the pull.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertWeights, LayerStats, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import DTYPE_BYTES, ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import (
    FACTORED,
    FACTORED_HINT,
    family_of,
    forecast_width,
    forecast_widths,
    width_config,
    width_problem,
    widths_config,
    widths_problem,
)
from moecli.ops.channels import Bounds, Scope, keep_channels, refit_down, total_left, width_left
from moecli.ops.super_experts import super_experts

Scores = Mapping[int, Tensor]
"""{layer: float [E, F]}, higher is better."""
GRAM = "ph_cov"
CUDA_ALIGN = 8
"""Channels of 2 bytes in the 16 that rows of `torch.nn.functional.grouped_mm` must be multiples of on CUDA."""
REFIT_BYTES = 2 << 30
"""Memory of the experts whose `down` is refitted at a time."""


class Slim(Options):
    """Options of a method that drops channels."""

    ratio: Annotated[float, Field(gt=0, lt=1)]
    """Part of the routed experts' channels that goes."""
    widths: Literal["uniform", "per_layer", "ragged", "pad"] = "uniform"
    """One width for all experts (`uniform`), one for those of each layer (`per_layer`), or any: as narrow tensors
    (`ragged`) or with zeros in tensors of the old shapes (`pad`). `per_layer` and `ragged` make a compact model."""
    scope: Scope = "expert"
    """Among which channels the lowest scores go: inside each `expert`, each `layer`, or all layers (`global`)."""
    align: PositiveInt = 128
    """Experts keep a multiple of so many channels: kernels and quantization groups ask for 64 or 128. `uniform` rounds
    up, other scopes hold the total and round down."""
    floor: NonNegativeInt = 0
    """Channels that every expert keeps at least, rounded up to `align`. Without, other scopes may empty experts."""
    ceiling: PositiveInt | None = None
    """Channels that every expert keeps at most, rounded down to `align`. Super Experts that are protected keep all."""
    layer_floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of its channels that each layer keeps at least under `scope: global`."""
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
        yield from self._bound_problems(model)
        if self.widths == "uniform":
            yield from self._uniform_problems(model)
            return
        if self.widths == "pad" and model.quantized:  # others are told by their forecasts
            hint = FACTORED_HINT if model.quantized == FACTORED else "move this stage above the `quantize/...` stage"
            yield Problem("", f"experts are quantized ({model.quantized}) and cannot be read", hint=hint)
        if self.widths == "per_layer" and self.scope != "global":
            yield Problem("scope", f"`scope: {self.scope}` leaves all layers as wide, `per_layer` lets them differ",
                          hint="write `scope: global`")  # fmt: skip
        if self.widths == "ragged" and (problem := widths_problem(model)):
            yield Problem("widths", problem.message, hint="write `widths: per_layer` and `scope: global`")

    def _bound_problems(self, model: ModelFacts) -> Iterator[Problem]:
        """Bounds that no choice can keep, whatever the scores."""
        width, left = model.expert_width, width_left(model.expert_width, self.ratio, self.align)
        least = math.ceil(self.floor / self.align) * self.align
        most = width if self.ceiling is None else min(width, self.ceiling // self.align * self.align)
        mean = left if self.scope == "expert" else width * (1 - self.ratio)
        if least > width or (self.scope != "expert" and least > mean):
            yield Problem("floor", f"`ratio` leaves an expert {mean:.4g} of {width} channels on average, the floor is "
                          f"{least}", hint="lower `ratio` or `floor`")  # fmt: skip
        if most < (needed := max(least, mean)):
            yield Problem("ceiling", f"experts may keep {most} channels, and {needed:.4g} on average must stay",
                          hint="raise `ceiling`")  # fmt: skip
        if self.layer_floor and self.scope != "global":
            yield Problem("layer_floor", f"`scope: {self.scope}` leaves every layer its share already",
                          hint="leave it out, or write `scope: global`")  # fmt: skip
        elif self.layer_floor > 1 - self.ratio:
            yield Problem("layer_floor", f"layers would keep {self.layer_floor:.4g} of their channels, `ratio` leaves "
                          f"{1 - self.ratio:.4g}", hint="lower `ratio` or `layer_floor`")  # fmt: skip
        if self.scope != "expert" and not self._blocks(model):
            yield Problem("align", f"`align: {self.align}` leaves no block of the channels that stay",
                          hint="lower `ratio` or `align`")  # fmt: skip

    def _uniform_problems(self, model: ModelFacts) -> Iterator[Problem]:
        left = width_left(model.expert_width, self.ratio, self.align)
        free = f"write `widths: {'pad' if widths_problem(model) else 'ragged'}`"
        if self.scope != "expert":
            yield Problem("scope", f"`scope: {self.scope}` leaves experts of different widths, `uniform` means one",
                          hint=free)  # fmt: skip
        if self.protect != "none":
            yield Problem("protect", "one width for all experts leaves none whole", hint=free)
        if self.floor > left:
            yield Problem("floor", f"`uniform` leaves {left} channels in each expert, fewer than the floor",
                          hint=f"lower `ratio`, or write `floor: {left}` or less")  # fmt: skip
        if left == model.expert_width:
            yield Problem("ratio", f"`align: {self.align}` rounds what is left of {left} channels up to all of them",
                          hint=f"write `align: {_finer(left, self.ratio)}`")  # fmt: skip
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
        if self.widths == "uniform":
            return forecast_width(model, width_left(model.facts.expert_width, self.ratio, self.align))
        return forecast_widths(model, self._even_widths(model))

    def _even_widths(self, model: ModelSketch) -> dict[int, list[int]]:
        """Some widths that this stage may choose, as even as they come: those it chooses have the same bytes, but for
        experts that stay beside the ratio (`protect` under `scope: expert`).
        """
        family, facts = family_of(model.config), model.facts
        experts = {layer: family.experts_in(layer) for layer in facts.moe_layers}
        if self.scope == "expert":
            return {layer: [width_left(facts.expert_width, self.ratio, self.align)] * e for layer, e in experts.items()}
        blocks = self._blocks(facts)
        if self.widths == "per_layer":
            heights = _spread(blocks // facts.experts, len(experts))
            return {layer: [h * self.align] * e for (layer, e), h in zip(experts.items(), heights, strict=True)}
        if self.scope == "layer":
            counts = {e: total_left(e * facts.expert_width, self.ratio, self.align) for e in experts.values()}
            heights = [height for e in experts.values() for height in _spread(counts[e], e)]
        else:
            heights = _spread(blocks, sum(experts.values()))
        parts = iter(heights)
        return {layer: [next(parts) * self.align for _ in range(e)] for layer, e in experts.items()}

    def _blocks(self, facts: ModelFacts) -> int:
        """Blocks that stay in the largest part among which this scope chooses."""
        layers = len(facts.moe_layers) if self.scope == "global" else 1
        return total_left(layers * facts.experts * facts.expert_width, self.ratio, self.align)

    def bounds(self, safe: Mapping[int, Sequence[int]]) -> Bounds:
        return Bounds(self.align, self.floor, self.ceiling, self.layer_floor, safe)


def _spread(total: int, parts: int) -> list[int]:
    """A total in nearly equal parts."""
    return [total // parts + (part < total % parts) for part in range(parts)]


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
            _check_numbers(stats[layer][name], name, layer)
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


def _check_numbers(values: Tensor, name: str, layer: int) -> None:
    finite_E = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite_E.all()):
        raise StageFailed(
            f"`{name}` of expert {int((~finite_E).nonzero()[0])} holds values that are not numbers",
            where=f"layer {layer}",
            hint="write `dtype: float32` in the calibrate stage",
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
        kept = keep_channels(score, opt.ratio, opt.scope, opt.bounds(safe), one_width=opt.widths == "per_layer")
    except ValueError as problem:
        raise StageFailed(str(problem), hint=_hint(str(problem))) from problem
    family = family_of(model.config)
    config, cut = _form(model, kept, opt)
    repaired = _Repair(stats, opt, ctx.device)
    with ctx.writer(model, config=config) as out:
        for layer in ctx.track(model.facts.moe_layers, "dropping channels"):

            def write(part: PartWriter, layer: int = layer) -> None:
                kept_EF = kept[layer]
                experts = family.read_experts(model, layer)
                if mean is not None and opt.repair == "none":
                    experts = _with_mean(experts, kept_EF, mean[layer])
                experts = experts._replace(down_DF=repaired.down(layer, experts.down_DF, kept_EF))
                family.write_experts(part, model, layer, cut(experts, kept_EF))

            out.part(f"layer-{layer:03d}", write)
        if opt.widths != "pad":
            out.part("mtp", lambda part: family.drop_mtp(part, model))
    _report(kept, stats, opt, ctx)
    if opt.widths in ("per_layer", "ragged"):
        ctx.note(loaded_words(kept, model.facts))
    return out.checkpoint


def loaded_words(kept: Mapping[int, Tensor], facts: ModelFacts) -> str:
    """What the routed experts take in memory, beside what other forms of the same widths would."""
    channel = 3 * facts.hidden * DTYPE_BYTES[facts.dtype]
    own = sum(int(kept_EF.sum()) for kept_EF in kept.values())
    widest = sum(int(kept_EF.sum(1).max()) * len(kept_EF) for kept_EF in kept.values())
    whole = sum(kept_EF.numel() for kept_EF in kept.values())
    sizes = [f"{count * channel / 2**20:,.1f} MiB" for count in (own, widest, whole)]
    return (
        f"the routed experts take {sizes[0]} once loaded; padded to the widest of each layer they would take "
        f"{sizes[1]}, to the old width {sizes[2]}"
    )


def _form(
    model: Checkpoint, kept: Mapping[int, Tensor], opt: Slim
) -> tuple[Mapping[str, Any], Callable[[ExpertWeights, Tensor], list[ExpertWeights]]]:
    """The config of what is written, and how the experts of a layer [E, ...] become those that are written."""
    if opt.widths == "pad":
        return model.config, _zeroed
    if opt.widths == "uniform":
        return width_config(model.config, width_left(model.facts.expert_width, opt.ratio, opt.align)), _taken
    return widths_config(model.config, {layer: kept_EF.sum(1).tolist() for layer, kept_EF in kept.items()}), _taken


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
        _check_numbers(gram_EFF, GRAM, layer)
        return gram_EFF

    def _fitted(self, down_EDF: Tensor, gram_EFF: Tensor, kept_EF: Tensor) -> Tensor:
        on = self.device
        return refit_down(down_EDF.to(on), gram_EFF.to(on), kept_EF.to(on), self.opt.ridge)


def _enough(count_E: Tensor, kept_EF: Tensor) -> Tensor:
    """Experts with at least twice as many tokens as kept channels, and something to refit."""
    left_E = kept_EF.sum(1)
    return (count_E >= 2 * left_E) & (left_E < kept_EF.shape[1])


def _taken(experts: ExpertWeights, kept_EF: Tensor) -> list[ExpertWeights]:
    """The kept channels of each expert in their old order."""

    def one(expert: int) -> ExpertWeights:
        kept = kept_EF[expert].nonzero()[:, 0]
        w = _one(experts, expert)
        rows = (None if value is None else value[kept] for value in (w.gate_bias_F, w.up_bias_F))
        return ExpertWeights(w.gate_FD[kept], w.up_FD[kept], w.down_DF[:, kept], *rows, w.down_bias_D)

    return [one(expert) for expert in range(len(kept_EF))]


def _zeroed(experts: ExpertWeights, kept_EF: Tensor) -> list[ExpertWeights]:
    """All channels in their places, those that go with zeros for weights and biases."""
    gone_EF = ~kept_EF

    def rows(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return value.masked_fill(gone_EF if value.dim() == 2 else gone_EF[..., None], 0)

    zeroed = ExpertWeights(
        rows(experts.gate_FD), rows(experts.up_FD), experts.down_DF.masked_fill(gone_EF[:, None], 0),
        rows(experts.gate_bias_F), rows(experts.up_bias_F), experts.down_bias_D,
    )  # fmt: skip
    return [_one(zeroed, expert) for expert in range(len(kept_EF))]


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
    shapes = "; they are zeros in tensors of the old shapes" if opt.widths == "pad" else ""
    ctx.note(f"{total - left} of {total} channels ({1 - left / total:.1%}) dropped{shapes}")
    if odd := 0 if opt.widths == "pad" else sum(int((c % CUDA_ALIGN != 0).sum()) for c in counts.values()):
        ctx.note(
            f"{odd} of {experts} experts have a width that is no multiple of {CUDA_ALIGN}: grouped products on CUDA "
            f"refuse rows that are no whole 16 bytes. Write `align: {CUDA_ALIGN}` or more to run there"
        )
    if emptied := sum(int((c == 0).sum()) for c in counts.values()):
        ctx.note(f"{emptied} of {experts} experts lost all channels: what is routed to them gives nothing")
    if opt.repair != "none" and stats is not None:
        cut = {layer: kept_EF.sum(1) < kept_EF.shape[1] for layer, kept_EF in kept.items()}
        few = sum(int((cut_E & ~_enough(stats[layer].count_E, kept[layer])).sum()) for layer, cut_E in cut.items())
        done = sum(int(cut_E.sum()) for cut_E in cut.values()) - few
        ctx.note(f"`down` of {done} of {experts} experts was refitted, {few} had too few tokens for that")
