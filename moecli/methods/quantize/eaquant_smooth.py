"""Move large inputs of experts into the norm that feeds them, one vector of scales for router and experts (EAQuant).

Each expert e, with its gate and up together, and with `router: true` the router asks for its own scales

    s_e[c] = max|x_e[c]|^alpha / max|w_e[c]|^(1 - alpha), at least 1e-5

x_e over the tokens routed to it, and all of them read the output of one norm, so that there can be one vector only: the
largest s_e of each column (`merge: max`) or their mean by routing frequency (`merge: sum1`). The norm's weight is
divided by it; columns of the router, of gate and up of all experts, and of all else that the norm feeds (shared experts
and their gate), are multiplied. Attention and what goes into down stay as they are.

Weights stay dense, for a `quantize/...` stage below. The stage stands among those, like `quantize/awq` with
`form: scaled`, because it is worth nothing without one: it belongs to no kind that makes a model smaller, corrects what
was lost or changes what a router chooses. It refuses what `quantize/awq` takes back: scales are rounded to powers of
two, and a layer must compute the same bits with them. Where none does (norms that add 1 to their weight) the stage
fails.

EAQuant rounds inputs too (W4A4), for which an even range of inputs is the gain, and it does not round s. Here weights
alone are rounded, in groups along the inputs: all that s can do for them is to give columns with large inputs more of
their group's range, at the expense of the others. Not there: the merges `sum2` and `sum3`, the scales of attention, the
outlier scales between up and down.

Source: arXiv 2506.13329, its expert-aware smoothing; defaults are those of its code.

- run: quantize/eaquant-smooth
- run: quantize/gptq
  with: {bits: 3, group_size: 128}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import Artifact, CalibrationText, Checkpoint, LayerStats, Packed, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, RunSetting, stage
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of
from moecli.engine.linears import EXPERTS, Feeds
from moecli.engine.sweep import SweptLayer, sweep
from moecli.families import FACTORED, FACTORED_HINT, family_of
from moecli.methods.scaling import ScaledLayer, Scales, Stack
from moecli.ops.awq import power_of_two
from moecli.ops.smoothing import merged, smoothing

STATISTICS = ("x_max",)


class EaquantSmooth(Options):
    """Options of `quantize/eaquant-smooth`."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Part of the range that goes from inputs to weights."""
    merge: Literal["max", "sum1"] = "max"
    """One vector from those of all experts: the largest of each column, or the mean by routing frequency."""
    router: bool = False
    """Take the larger of that and of what the router asks for (`_gate` in published code)."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.quantized:
            hint = FACTORED_HINT if model.quantized == FACTORED else "move this stage above the `quantize/...` stage"
            yield Problem("", f"the model is quantized already ({model.quantized})", hint=hint)


@stage("quantize/eaquant-smooth", version=1)
def eaquant_smooth(opt: EaquantSmooth, text: CalibrationText, model: Checkpoint, ctx: Context) -> Checkpoint:
    found: dict[int, Found] = {}
    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=STATISTICS)
    with ctx.writer(model) as out:
        for layer in swept:
            if not layer.is_moe:
                continue
            name = f"layer-{layer.index:03d}"
            work = _Layer(opt, layer, model)

            def write(part: PartWriter, work: _Layer = work, name: str = name) -> None:
                work.choose()
                for each, value in work.dense.items():
                    part.put(each, value)
                ctx.part(f"found-{name}", Found, lambda: work.found)

            finished = out.has_part(name)
            out.part(name, write)
            if finished:
                layer.rewrite(out.read_part(name))
            found[layer.index] = ctx.part(f"found-{name}", Found, lambda work=work: work.found)
    for line in swept.report():
        ctx.note(line)
    _report(found, ctx)
    return out.checkpoint


class Found(Artifact):
    """Of one layer: the least and the largest scale, and why there is none where there is none."""

    def __init__(self, spread: Sequence[float], why_not: str = "") -> None:
        self.spread, self.why_not = list(spread), why_not

    def pack(self) -> Packed:
        return Packed({}, {"spread": self.spread, "why_not": self.why_not})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(**packed.meta)


def _report(found: Mapping[int, Found], ctx: Context) -> None:
    """StageFailed when no layer took scales: nothing would have happened."""
    kept = {layer: some.spread for layer, some in found.items() if not some.why_not}
    if not kept:
        layer, first = next(iter(found.items()))
        raise StageFailed(f"no norm can take up scales: {first.why_not}", where=f"layer {layer}",
                          hint="leave `quantize/eaquant-smooth` out")  # fmt: skip
    ctx.record("scales", {str(layer): {"least": a, "largest": b} for layer, (a, b) in kept.items()})
    widest = max(b / a for a, b in kept.values())
    ctx.note(f"scales of {len(kept)} layers, powers of two; they differ by up to {widest:.0f} times within a layer")
    lost = {layer: some.why_not for layer, some in found.items() if some.why_not}
    for layer, why in list(lost.items())[:1]:
        ctx.note(f"{len(lost)} layers stay as they are; layer {layer}: {why}")


class _Layer(ScaledLayer):
    """One layer, the scales of its experts' norm, and what its weights become."""

    def __init__(self, opt: EaquantSmooth, layer: SweptLayer, model: Checkpoint) -> None:
        super().__init__(layer, model)
        self._opt = opt
        self.found = Found((1.0, 1.0), "no norm feeds the experts")

    def choose(self) -> None:
        """Put the scaled weights into `dense`, if the layer computes the same bits with them."""
        feeds = Feeds(self.layer, self.modules(self.norms()), self.modules([x.name for x in self.others]))
        with feeds.watching():
            stats = self.layer.observe(collectors(STATISTICS), on_device=True)
        if (norm := feeds.norm_of.get(EXPERTS)) is None:
            return
        before = self.layer.outputs()[0].clone()
        experts = [stack for stack in self.stacks() if stack.into == "x"]
        scale_C = self._scale(stats, experts, norm, feeds)
        scales = Scales(norm.removesuffix(".weight"), (0.0, 0.0), self.of_norm(norm, feeds, experts, scale_C))
        exact = self.scale([scales], before)
        self.found = Found(
            (float(scale_C.min()), float(scale_C.max())),
            "" if exact else f"the layer computes something else when `{norm}` and what it feeds are scaled",
        )

    def _scale(self, stats: LayerStats, experts: Sequence[Stack], norm: str, feeds: Feeds) -> Tensor:
        """[C], powers of two"""
        x_EC = stats["x_max"]
        weight_EC = torch.stack([self._largest(stack) for stack in experts]).amax(0)
        share_E = stats.count_E.to(x_EC.device) if self._opt.merge == "sum1" else None
        scale_C = merged(smoothing(x_EC, weight_EC, self._opt.alpha), share_E)
        names = family_of(self.model.config).router_names(self.layer.index, self.model)
        for name, tensor in names.items() if self._opt.router else ():
            if tensor.role == "weight" and feeds.norm_of.get(name) == norm:
                own_1C = smoothing(x_EC.amax(0)[None], self.original(name).abs().amax(0)[None], self._opt.alpha)
                scale_C = torch.maximum(scale_C, own_1C[0])
        return power_of_two(scale_C)

    def _largest(self, stack: Stack) -> Tensor:
        """Largest |w| of each column, [E, C]"""
        return self.values(stack.names, stack.transposed).abs().amax(1).float()
