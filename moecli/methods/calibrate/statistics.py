"""Run calibration text through the model once, layer by layer, and collect what later stages declared.

Which statistics exist, with their formulas: `engine.collectors.CATALOGUE`. `statistics: auto` collects what the
stages below ask for; counts and gate sums are always collected. Padding is masked out of everything.

- run: calibrate/statistics
  with: {dataset: calibration.jsonl, samples: 128, tokens_per_sample: 2048}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import PositiveInt

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, RunSetting, SourcePath, stage
from moecli.engine.collectors import CATALOGUE, collectors
from moecli.engine.data import tokenise
from moecli.engine.sweep import SweptLayer, sweep


class Statistics(Options):
    """Options of `calibrate/statistics`."""

    dataset: Annotated[str, SourcePath()]
    """A local json, jsonl, parquet or txt file (also .gz), `demo`, or a hub data set `org/name[config](split)`."""
    samples: PositiveInt = 128
    """Sequences to run."""
    tokens_per_sample: PositiveInt = 2048
    """Tokens in each sequence."""
    field: str = "text"
    """Column that holds the text."""
    packing: Literal["pack", "truncate"] = "pack"
    """`pack` joins documents and cuts equal blocks; `truncate` takes one document per sample and pads."""
    statistics: Literal["auto"] | list[str] = "auto"
    """What to collect besides counts and gate sums; `auto` is what the stages below need."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        if self.statistics != "auto":
            return self
        return self.model_copy(update={"statistics": list(needs)})

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.tokens_per_sample > model.max_positions:
            yield Problem(
                "tokens_per_sample",
                f"`tokens_per_sample` must be at most the model's {model.max_positions} positions, "
                f"got {self.tokens_per_sample}",
                hint=f"write `tokens_per_sample: {model.max_positions}`",
            )
        for name in self.statistics if isinstance(self.statistics, list) else ():
            if name not in CATALOGUE:
                yield Problem("statistics", f"unknown statistic `{name}`", hint=f"known: {', '.join(CATALOGUE)}")


@stage("calibrate/statistics", version=1)
def statistics(opt: Statistics, model: Checkpoint, ctx: Context) -> CalibrationStats:
    text = tokenise(
        opt.dataset, model, samples=opt.samples, tokens_per_sample=opt.tokens_per_sample,
        field=opt.field, packing=opt.packing, seed=ctx.seed,
    )  # fmt: skip
    names = ["count", "gate_sum", *opt.statistics]
    collected: dict[int, LayerStats] = {}
    for layer in sweep(model, text.batches(opt.batch_size), device=ctx.device, track=ctx.track):
        if layer.is_moe:
            collected[layer.index] = _observe(layer, names, ctx)
    stats = CalibrationStats(collected, {"dataset": opt.dataset, "samples": opt.samples,
                                         "tokens_per_sample": opt.tokens_per_sample, "packing": opt.packing,
                                         "seed": ctx.seed, "digest": text.digest})  # fmt: skip
    _report_coverage(stats, ctx)
    return stats


def _observe(layer: SweptLayer, names: list[str], ctx: Context) -> LayerStats:
    """The layer's statistics; a part that is already there saves the collection, not the forward pass."""

    def make() -> CalibrationStats:
        return CalibrationStats({layer.index: layer.observe(collectors(names))})

    return ctx.part(f"layer-{layer.index:03d}", CalibrationStats, make)[layer.index]


def _report_coverage(stats: CalibrationStats, ctx: Context) -> None:
    starved = {layer: int((s.count_E == 0).sum()) for layer, s in stats.items()}
    ctx.record("load", {str(layer): s.count_E.tolist() for layer, s in stats.items()})
    if total := sum(starved.values()):
        experts = sum(len(s.count_E) for s in stats.values())
        ctx.note(
            f"{total} of {experts} experts saw no calibration token (by layer: {' '.join(map(str, starved.values()))})"
        )
