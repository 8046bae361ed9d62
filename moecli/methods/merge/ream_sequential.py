"""Merge one layer after the other, each on what the merged layers before it give (REAM as its paper runs it).

Layer by layer: the layer is observed on the calibration text, groups are formed as `cluster/ream` forms them, merged as
`merge/ream` merges them, and each keeps its centroid's router row as `router/row-drop` does; then the text goes through
the smaller layer, and the next layer is observed on that. One stage in place of these three, and of their statistics,
which are those of the source. Nothing is protected; under group-limited routing groups stay within routing groups.

Source: arXiv 2604.04356, section 3, with what `cluster/ream` and `merge/ream` put right. One way through the layers:
every expert on every token of a layer, and one pass more through what it became.

- run: calibrate/text
  with: {dataset: calibration.jsonl, samples: 128, tokens_per_sample: 2048}
- run: merge/ream-sequential
  with: {keep: 96}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moecli.core.artifacts import (
    CalibrationStats,
    CalibrationText,
    Checkpoint,
    ExpertPlan,
    LayerPlan,
    LayerStats,
    PartWriter,
)
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options, RunSetting, stage
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of
from moecli.engine.sweep import sweep
from moecli.families import Family, family_of, forecast_keep, keep_problem
from moecli.families.adapter import moe_parts
from moecli.methods.cluster import Groups, layer_plan
from moecli.methods.merge import aligned_to_leads, averaged, on_device, unstacked
from moecli.ops.likeness import pseudo_pruned, saliency, similarity

READS = ("gean_sum", "gy_mean", "logit_gram", "tok_reservoir")


class ReamSequential(Options):
    """Options of `merge/ream-sequential`."""

    keep: PositiveInt
    """Experts left per layer."""
    limit: PositiveInt = 16
    """Largest group."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's. Many CPUs are much faster in `float32`."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.router_rows != model.experts:
            hint = "put `- run: router/row-drop` between the two merges"
            yield Problem("", "the experts of this model are merged already", hint=hint)
        elif problem := keep_problem(model, self.keep):
            yield problem
        elif self.keep * self.limit < model.experts:
            yield Problem(
                "limit",
                f"{self.keep} groups of at most {self.limit} cannot hold {model.experts} experts",
                hint=f"write `limit: {-(-model.experts // self.keep)}` or more",
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return forecast_keep(model, self.keep)


@stage("merge/ream-sequential", version=1)
def ream_sequential(opt: ReamSequential, text: CalibrationText, model: Checkpoint, ctx: Context) -> Checkpoint:
    if isinstance(text, CalibrationStats) and text.text is None:
        raise StageFailed("these statistics have no text of their own", hint="add a `calibrate/text` stage above")
    family, plans = family_of(model.config), {}
    swept = sweep(
        model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=READS,
        dtype=None if opt.dtype == "auto" else getattr(torch, opt.dtype),
    )  # fmt: skip
    with ctx.writer(model, config=family.shrink_config(model.config, opt.keep)) as out:
        for layer in swept:
            if not layer.is_moe:
                continue
            name = f"layer-{layer.index:03d}"

            def write(part: PartWriter, index: int = layer.index, name: str = name) -> None:
                stats = layer.observe(collectors(READS))  # noqa: B023  called before the loop goes on
                plan = _plan(opt, index, stats, family.facts.groups)
                _merge(part, family, model, index, plan, stats, ctx)
                ctx.part(f"plan-{name}", ExpertPlan, lambda: ExpertPlan({index: plan}))

            out.part(name, write)
            plans |= dict(ctx.part(f"plan-{name}", ExpertPlan, _not_there))
            layer.rewrite(_padded(out.read_part(name), model))
            layer.edit(lambda module: _cut(module, opt.keep))
        out.part("mtp", lambda part: family.drop_mtp(part, model))
    for line in swept.report():
        ctx.note(line)
    ctx.record("groups", {str(layer): plan.group_E.tolist() for layer, plan in plans.items()})
    ctx.record("leads", {str(layer): plan.lead_K.tolist() for layer, plan in plans.items()})
    return out.checkpoint


def _plan(opt: ReamSequential, layer: int, stats: LayerStats, blocks: int) -> LayerPlan:
    if not stats.count_E.any():
        raise StageFailed(
            "no calibration token was routed to any expert", where=f"layer {layer}",
            hint="calibrate with text, and with more `samples`",
        )  # fmt: skip
    salient_E = saliency(stats["gean_sum"], stats.count_E)
    alike_EE = similarity(stats["gy_mean"], stats["logit_gram"])

    def grouping(_: int, some: Tensor, keep: int) -> Groups:
        return Groups(*pseudo_pruned(alike_EE[some][:, some], salient_E[some], keep, opt.limit))

    return layer_plan(layer, salient_E, set(), opt.keep, blocks, grouping)


def _merge(
    part: PartWriter, family: Family, model: Checkpoint, layer: int, plan: LayerPlan, stats: LayerStats, ctx: Context
) -> None:
    experts = on_device(family.read_experts(model, layer), ctx.device)
    experts = aligned_to_leads("weights+acts", family, layer, plan, experts, CalibrationStats({layer: stats}))
    family.write_experts(part, model, layer, unstacked(averaged(experts, plan.share_E, plan)))
    family.keep_router_rows(part, model, layer, plan.lead_K.tolist())


def _not_there() -> ExpertPlan:
    raise RuntimeError("a part went missing while the stage ran")


# -- the merged layer in memory: the first `keep` experts and rows of a layer of the old size, then cut to them


def _padded(values: Mapping[str, Tensor], model: Checkpoint) -> dict[str, Tensor]:
    """What was written, by name, with the source's values behind it where the source has more experts."""
    found = {}
    for name, value in values.items():
        found[name] = value
        if model.spec(name).shape != value.shape:
            found[name] = model.get(name).clone()
            _front(found[name], value.shape).copy_(value)
    return found


def _cut(module: nn.Module, keep: int) -> None:
    """The MoE block of a decoder layer with its first `keep` experts and router rows alone."""
    from moecli.runtime.compact_model import resize_block

    parts = moe_parts(module)
    if parts is None:
        raise TypeError("a dense layer has no experts to cut")
    before = {**dict(parts.block.named_parameters()), **dict(parts.block.named_buffers())}
    resize_block(parts.block, keep, keep)
    with torch.no_grad():
        for name, value in [*parts.block.named_parameters(), *parts.block.named_buffers()]:
            if value.shape != before[name].shape:
                value.copy_(_front(before[name], value.shape))


def _front(value: Tensor, shape: torch.Size) -> Tensor:
    """The part of `value` in front, of this shape: a view."""
    return value[tuple(slice(size) for size in shape)]
