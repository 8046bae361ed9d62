"""How a model uses its experts, before and after: balance, certainty, and how well a cache of few experts would do.

Means over MoE layers; `moecli analyse` writes the same numbers layer by layer and expert by expert, with more.

    load entropy      -sum f ln f / ln E of the share f of visits: 1 when all experts are used alike
    load imbalance    max f * E
    routing entropy   mean over tokens of the entropy of softmax(router logits), over ln of its rows
    SRP m             segment routing best performance over windows of m tokens, one threshold for the whole model
    SCH F, LRU        hit rate of a cache in each layer that holds as many bytes as twice the experts that the *source*
                      uses for a token: the best that a look-ahead of F tokens allows, and least recently used. Equal
                      bytes make models with fewer or smaller experts comparable

Documents are joined and cut into samples. SCH and LRU run on `cache_samples` of them; their standard errors are over
samples.

Source: arXiv 2505.16056; the definitions are in `ops.locality` and `ops.usage`.

- run: eval/routing
  with: {dataset: texts.jsonl}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PositiveInt

from moecli.core.artifacts import Checkpoint, Evaluation, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, RunSetting, stage
from moecli.engine.analysis import (
    LRU,
    Document,
    Settings,
    analyse,
    expert_bytes,
    experts_within,
    hit_rate,
    layer_mean,
)
from moecli.engine.data import check_there, parse, pinned, spec_text, tokenise
from moecli.engine.data import identity as data_identity

TIMES_ACTIVE = 2
"""The cache that is compared holds this many times the experts that a token uses: where most models balance memory and
hits (2505.16056, section 5)."""


class Routing(Options):
    """Options of `eval/routing`."""

    dataset: str
    """A local json, jsonl, parquet or txt file (also .gz), `demo`, or a hub data set `org/name[config](split)`."""
    field: str = "text"
    """Column that holds the text."""
    samples: PositiveInt = 64
    """Samples to run."""
    tokens_per_sample: PositiveInt = 512
    """Tokens in each sample."""
    windows: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (4, 16, 64, 256)
    """Tokens of SRP's windows and of SCH's look-ahead; those longer than a sample are left out."""
    cache_samples: PositiveInt = 16
    """Samples that caches are simulated on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Samples per forward pass."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        """A hub data set gets the commit its revision stands for."""
        return self.model_copy(update={"dataset": spec_text(pinned(parse(self.dataset)))})

    def identity(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        return {"dataset": data_identity(parse(self.dataset), digest)}

    def ready(self) -> None:
        for source in parse(self.dataset):
            check_there(source)

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.tokens_per_sample > model.max_positions:
            yield Problem(
                "tokens_per_sample",
                f"`tokens_per_sample` must be at most the model's {model.max_positions} positions, "
                f"got {self.tokens_per_sample}",
                hint=f"write `tokens_per_sample: {model.max_positions}`",
            )


@stage("eval/routing", version=1, on_source_too=True)
def routing(opt: Routing, source: Checkpoint, model: Checkpoint, ctx: Context) -> Evaluation:
    dtype = model.facts.dtype if opt.dtype == "auto" else opt.dtype
    text = tokenise(
        opt.dataset, source, samples=opt.samples, tokens_per_sample=opt.tokens_per_sample, field=opt.field,
        seed=ctx.seed,
    )  # fmt: skip
    settings = Settings(windows=opt.windows, cache_samples=opt.cache_samples, pooled_samples=0, seed=ctx.seed)
    found = analyse(
        model, {opt.dataset: text}, settings, device=ctx.device, dtype=getattr(torch, dtype), track=ctx.track,
        batch_size=opt.batch_size,
    ).document  # fmt: skip
    for line in found["notes"]:
        ctx.note(line)
    budget = TIMES_ACTIVE * source.facts.top_k * fmean(expert_bytes(source).values())
    cache = found["locality"]["cache"]
    curves = {name: curve["rate"] for name, curve in cache["model"].items()}
    ctx.record("cache", {"expert_bytes": cache["expert_bytes"], "bytes_per_layer": budget, "curves": curves})
    side = "source" if ctx.input_keys.get("source") == ctx.input_keys["model"] else "result"
    ctx.record("charts", [_chart(side, cache["expert_bytes"], curves)])
    settings_said = {
        "dataset": opt.dataset, "digest": text.digest, "samples": len(text.ids), "cache_samples": opt.cache_samples,
        "tokens_per_sample": opt.tokens_per_sample, "dtype": dtype, "cache_bytes_per_layer": budget,
    }  # fmt: skip
    return Evaluation(tuple(_metrics(found, budget)), settings_said)


def _chart(side: str, expert_bytes: float, curves: Mapping[str, list[float]]) -> Document:
    """Hits against bytes, so that models with other experts can be laid over each other: LRU, and what bounds it."""
    ahead = [name for name in curves if name != LRU]
    names = [LRU, *ahead[len(ahead) // 2 : len(ahead) // 2 + 1]]
    return {
        "title": "Hits of a cache of experts",
        "caption": "Share of expert visits that find their expert in a cache of one layer, mean over layers and "
        "samples. LRU keeps what was used last; SCH is the best that a look-ahead of that many tokens allows. Higher "
        "is better.",
        "x_label": "MiB of cache in each layer",
        "y_label": "hit rate",
        "series": [
            {
                "name": f"{side}, {'LRU' if name == LRU else f'SCH {name}'}",
                "x": [(c + 1) * expert_bytes / 2**20 for c in range(len(curves[name]))],
                "y": curves[name],
            }
            for name in names
        ],
    }


def _metrics(found: Document, budget: float) -> Iterator[Metric]:
    tokens = next(iter(found["layers"].values()))["tokens"]
    for label, name in (
        ("load entropy", "entropy"), ("load imbalance", "imbalance"), ("load Gini", "gini"),
        ("routing entropy", "routing_entropy"), ("top-k mass", "top_k_mass"),
    ):  # fmt: skip
        if (value := layer_mean(found, name)) is not None:
            yield Metric("routing", label, value, None, tokens)
    place = found["locality"]
    for window, srp in place["srp"]["model"].items():
        yield Metric("routing", f"SRP {window}", srp["srp"], None, place["samples"], True)
    held = experts_within(found, budget)
    for name in place["cache"]["model"]:
        rate, error = hit_rate(found, name, held)
        label = "hit rate LRU" if name == LRU else f"hit rate SCH {name}"
        yield Metric("routing", label, rate, error, place["cache_samples"], True)
