"""Run calibration text through the model, layer by layer, and collect what later stages declared.

Which statistics exist, with their formulas: `engine.collectors.CATALOGUE`. `statistics: auto` collects what the
stages below ask for; counts and gate sums are always collected. Padding is masked out of everything. How data sets
are named: `engine.data`; `packing` may be the rule of a paper's code, which brings its own data and numbers.

Each statistic of each layer is kept in the run folder under (model, tokens, dtype, statistic, layer): a recipe that
asks for one more collects that one. Values of one pass and of several agree within rounding of float64 sums.

Statistics of gradients (`gh2`, `hgh`, `hgh2`: `engine.collectors.gradients`) take a way back through all layers, about
twice the time of the way there; hidden states of all layers are kept meanwhile (`engine.backward`).

In a run of several processes every one runs a block of the batches, and each layer's statistics are put together before
they are kept: integers are those of one process, sums agree within rounding of float64.

`mask_special_tokens` leaves tokens that the tokenizer calls special (BOS, EOS, chat marks) out of every statistic, the
number of tokens too. They run with the others: what comes behind them sees them.

`min_tokens_per_expert` says what becomes of an expert with fewer than n tokens: `warn` notes it, `fail` stops. With
`top_up` up to `draws` further draws of text are run, by the same rule, going on where the last one stopped. Of each
draw only the entries of experts that are still below n are taken, in statistics over the tokens routed to an expert
(`count`, `ean_*`, `h2`, `x_cov` and the like: added; `absmax` and other maxima: the larger). All other experts'
entries, statistics over all tokens (`prob_sum`, `y_mean`, samples, traces) and the number of tokens stay as the first
draw left them, bit for bit. So sums and counts of a topped-up expert do not compare with its neighbours', means over
`count` do.

- run: calibrate/statistics
  with: {dataset: calibration.jsonl, samples: 128, tokens_per_sample: 2048}
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, CalibrationText, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import RunSetting, stage
from moecli.engine.backward import BackLayer, backward_sweep
from moecli.engine.collectors import CATALOGUE, FORWARD, Collector, collectors
from moecli.engine.data import Batch, batches_of, spec_text
from moecli.engine.ranks import Ranks, current
from moecli.engine.stats import ALWAYS, Starved, is_per_expert, starved_in, topped_up
from moecli.engine.sweep import Sweep, SweptLayer, sweep
from moecli.methods.calibrate import TextOptions, key_of, special_tokens, text_of

VERSION = 2
_SHOWN = 8
"""Experts that a message names."""


class MinTokens(BaseModel):
    """What becomes of experts that calibration hardly reaches."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    n: PositiveInt
    """Tokens an expert needs."""
    action: Literal["warn", "top_up", "fail"] = "warn"
    """`warn` notes it in the report, `top_up` runs more text for these experts, `fail` stops."""
    draws: PositiveInt = 4
    """`top_up` runs at most this many further draws, each of `samples` samples."""


class Statistics(TextOptions):
    """Options of `calibrate/statistics`."""

    statistics: Literal["auto"] | list[str] = "auto"
    """What to collect besides counts and gate sums; `auto` is what the stages below need."""
    min_tokens_per_expert: MinTokens | None = None
    """What becomes of experts with fewer tokens than `n`; nothing by default, coverage is reported always."""
    mask_special_tokens: bool = False
    """Leave BOS, EOS and the tokenizer's other special tokens out of every statistic. Padding always is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's. Many CPUs are much faster in `float32`."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        """`auto` is what `needs` says; hub data sets get the commit their revision stands for."""
        named = super().resolve(needs)
        return named.model_copy(update={"statistics": list(needs)}) if self.statistics == "auto" else named

    def collects(self) -> Collection[str] | None:
        return None if self.statistics == "auto" else [*ALWAYS, *self.statistics]

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        topping = self.min_tokens_per_expert is not None and self.min_tokens_per_expert.action == "top_up"
        for name in self.statistics if isinstance(self.statistics, list) else ():
            if name not in CATALOGUE:
                yield Problem("statistics", f"unknown statistic `{name}`", hint=f"known: {', '.join(CATALOGUE)}")
            elif topping and is_per_expert(name) is None:
                yield Problem(
                    "min_tokens_per_expert.action", f"`top_up` cannot be used with the statistic `{name}`",
                    hint="write `action: warn` and raise `samples`",
                )  # fmt: skip
            elif name not in FORWARD and (model.dtype if self.dtype == "auto" else self.dtype) == "float16":
                yield Problem(
                    "dtype" if self.dtype == "float16" else "",
                    f"the statistic `{name}` is one of gradients, which leave the range of float16",
                    hint="write `dtype: bfloat16`",
                )


@stage("calibrate/statistics", version=VERSION, every_rank=True)
def statistics(opt: Statistics, model: Checkpoint, ctx: Context) -> CalibrationStats:
    """On ranks that do not write, statistics without layers."""
    text = current().told(lambda: _text(opt, model, ctx))
    layers = _collect(text, opt.statistics, model.facts.moe_layers, opt, model, ctx)
    stats = CalibrationStats(layers, _source(opt, model, text, ctx), text)
    _report_coverage(stats, ctx)
    return _see_to_starved(stats, opt, model, ctx)


def _text(opt: Statistics, model: Checkpoint, ctx: Context, draw: int = 0) -> CalibrationText:
    opt.ready()
    return text_of(opt, model, ctx, draw)


def _source(opt: Statistics, model: Checkpoint, text: CalibrationText, ctx: Context) -> dict[str, Any]:
    return {
        "dataset": spec_text(opt.sources), "samples": opt.samples, "tokens_per_sample": opt.tokens_per_sample,
        "packing": opt.packing, "seed": ctx.seed, "digest": text.digest, "model": ctx.input_keys["model"],
        "model_type": model.facts.model_type, "dtype": _dtype(opt, model),
        **({"mask_special_tokens": True} if opt.mask_special_tokens else {}),
    }  # fmt: skip


def _dtype(opt: Statistics, model: Checkpoint) -> str:
    return model.facts.dtype if opt.dtype == "auto" else opt.dtype


def _report_coverage(stats: CalibrationStats, ctx: Context) -> None:
    starved = {layer: int((s.count_E == 0).sum()) for layer, s in stats.items()}
    ctx.record("load", {str(layer): s.count_E.tolist() for layer, s in stats.items()})
    if total := sum(starved.values()):
        ctx.note(
            f"{total} of {_experts(stats)} experts saw no calibration token "
            f"(by layer: {' '.join(map(str, starved.values()))})"
        )


# -- parts: tokens and statistics that other recipes of this run folder can use


def _collect(
    text: CalibrationText,
    names: Sequence[str],
    layers: Collection[int],
    opt: Statistics,
    model: Checkpoint,
    ctx: Context,
) -> dict[int, LayerStats]:
    """Statistics of these layers: from parts where they are, and one sweep for all that are missing. Only the first
    rank keeps and reads parts; it tells the others what is missing.
    """
    ranks = current()
    wanted = [ALWAYS[0], *(name for name in dict.fromkeys(names) if name not in ALWAYS)]
    keys = {layer: {name: _part_key(text, name, layer, opt, model, ctx) for name in wanted} for layer in layers}
    missing = ranks.told(lambda: {i: [n for n in wanted if not ctx.has_shared_part(keys[i][n])] for i in layers})
    if any(missing.values()):
        settings = {"device": ctx.device, "track": ctx.track, "ranks": ranks,
                    "dtype": None if opt.dtype == "auto" else getattr(torch, opt.dtype)}  # fmt: skip
        swept = _run(model, _batches(text, opt, model, ranks), missing, keys, settings, ctx)
        for line in dict.fromkeys(line for lines in ranks.gathered(swept.report()) for line in lines):
            ctx.note(line)
    return {layer: _assembled(layer, keys[layer], ctx) for layer in layers} if ranks.leads else {}


def _run(
    model: Checkpoint, batches: Sequence[Batch], missing: Mapping[int, list[str]],
    keys: Mapping[int, Mapping[str, str]], settings: Mapping[str, Any], ctx: Context,
) -> Sweep:  # fmt: skip
    """One way through the layers for what a forward sweep collects, and where gradients are wanted one way back."""
    there = {layer: [n for n in some if n in FORWARD] for layer, some in missing.items()}
    back = {layer: [n for n in some if n not in FORWARD] for layer, some in missing.items()}
    first = min((layer for layer, some in back.items() if some), default=None)
    names = sorted({name for some in missing.values() for name in some})
    if first is None:
        last = max(layer for layer, some in there.items() if some)
        swept: Sweep = sweep(model, batches, statistics=names, **settings)
        _each(swept, there, keys, last, ctx)
        return swept
    both = backward_sweep(model, batches, statistics=names, **settings)
    _each(both, there, keys, None, ctx)
    _each(both.back(), back, keys, first, ctx)
    return both


def _each(
    layers: Iterable[SweptLayer | BackLayer], names: Mapping[int, list[str]], keys: Mapping[int, Mapping[str, str]],
    last: int | None, ctx: Context,
) -> None:  # fmt: skip
    """Observe what each layer lacks, up to and with layer `last`."""
    for layer in layers:
        if names.get(layer.index):
            _observe(layer, names[layer.index], keys[layer.index], ctx)
        if layer.index == last:
            break


def _batches(text: CalibrationText, opt: Statistics, model: Checkpoint, ranks: Ranks) -> list[Batch]:
    """Whole batches go to a rank, so that each runs as it does in one process; smaller ones when some rank would have
    none.
    """
    size = min(opt.batch_size, -(-len(text.ids) // ranks.size))
    return batches_of(text, size, special_tokens(model) if opt.mask_special_tokens else ())


def _observe(layer: SweptLayer | BackLayer, names: Sequence[str], keys: Mapping[str, str], ctx: Context) -> None:
    """One pass over the layer's tokens for all statistics it lacks; each becomes a part of its own."""
    made = collectors(names)
    found = layer.observe(made)
    if current().leads:
        for name, tensors in _by_collector(made, found.extra).items():
            part = CalibrationStats({layer.index: LayerStats(found.tokens, found.count_E, found.gate_sum_E, tensors)})
            ctx.shared_part(keys[name], CalibrationStats, lambda part=part: part)


def _by_collector(made: Sequence[Collector], extra: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a layer by the collector they come from: its name is theirs, or the start of it."""

    def owner(name: str) -> str | None:
        return max((c.name for c in made if f"{name}_".startswith(f"{c.name}_")), key=len, default=None)

    owners = {name: owner(name) for name in extra}
    if None in owners.values():  # names of another kind: asking copies the tensors from the device once more
        owners = {name: c.name for c in made for name in c.result()}
    return {c.name: {n: tensor for n, tensor in extra.items() if owners[n] == c.name} for c in made}


def _assembled(layer: int, keys: Mapping[str, str], ctx: Context) -> LayerStats:
    parts = [ctx.shared_part(key, CalibrationStats, _not_there)[layer] for key in keys.values()]
    extra = {name: tensor for part in parts for name, tensor in part.extra.items()}
    return LayerStats(parts[0].tokens, parts[0].count_E, parts[0].gate_sum_E, extra)


def _not_there() -> CalibrationStats:
    raise RuntimeError("a part went missing while the stage ran")


def _part_key(text: CalibrationText, name: str, layer: int, opt: Statistics, model: Checkpoint, ctx: Context) -> str:
    key = key_of(
        version=VERSION, model=ctx.input_keys["model"], text=text.digest, seed=ctx.seed, dtype=_dtype(opt, model),
        statistic=name, layer=layer, masked=special_tokens(model) if opt.mask_special_tokens else [],
    )  # fmt: skip
    return f"statistic-{name}-{layer:03d}-{key}"


# -- experts with few tokens


def _see_to_starved(stats: CalibrationStats, opt: Statistics, model: Checkpoint, ctx: Context) -> CalibrationStats:
    floor = opt.min_tokens_per_expert
    if floor is None:
        return stats
    starved = current().told(lambda: starved_in(stats, floor.n))
    if not starved:
        return stats
    if floor.action == "top_up":
        return _top_up(stats, starved, opt, model, ctx)
    if current().leads:
        said = f"{_too_few(stats, starved, floor)}: {_named(stats, starved)}"
        if floor.action == "fail":
            raise StageFailed(said, hint="raise `samples`, or write `action: top_up`")
        ctx.note(said)
    return stats


def _top_up(
    stats: CalibrationStats, starved: Starved, opt: Statistics, model: Checkpoint, ctx: Context
) -> CalibrationStats:
    floor, first, before, ranks = opt.min_tokens_per_expert, starved, stats, current()
    names = [name for name in opt.statistics if is_per_expert(name)]
    samples, draw = 0, 0
    while starved and draw < floor.draws:
        draw += 1
        text = ranks.told(partial(_text, opt, model, ctx, draw))
        if len(text.ids) == 0:
            break
        samples += len(text.ids)
        more = _collect(text, names, starved, opt, model, ctx)
        if ranks.leads:
            stats = topped_up(stats, more, starved)
        starved = ranks.told(partial(starved_in, stats, floor.n))
    if ranks.leads:
        _say_topped_up(before, stats, first, starved, names, samples, opt, ctx)
    source = stats.source | {"top_up": f"{_many(first)} experts, {samples} further samples"}
    return CalibrationStats(dict(stats), source, stats.text)


def _say_topped_up(
    before: CalibrationStats, after: CalibrationStats, first: Starved, still: Starved, names: Sequence[str],
    samples: int, opt: Statistics, ctx: Context,
) -> None:  # fmt: skip
    change = {
        str(layer): {str(e): [int(before[layer].count_E[e]), int(after[layer].count_E[e])] for e in experts}
        for layer, experts in first.items()
    }
    ctx.record("top_up", change)
    kept = [name for name in opt.statistics if not is_per_expert(name)]
    left = f"; still below: {_named(after, still)}" if still else ""
    same = f"; {', '.join(f'`{name}`' for name in kept)} stay those of the first draw" if kept else ""
    ctx.note(
        f"{_too_few(before, first, opt.min_tokens_per_expert)}; {samples} further samples were run, and only these "
        f"experts' entries of {', '.join(f'`{name}`' for name in [*ALWAYS, *names])} take part in them: "
        f"compare their means, not their sums{same}{left}"
    )


def _too_few(stats: CalibrationStats, starved: Starved, floor: MinTokens) -> str:
    return f"{_many(starved)} of {_experts(stats)} experts got fewer than {floor.n} tokens"


def _named(stats: CalibrationStats, starved: Starved) -> str:
    """`layer 0: expert 4 (9 tokens), expert 7 (0 tokens); layer 2: ...`, the first of them."""
    pairs = [(layer, expert) for layer, experts in starved.items() for expert in experts]
    words = []
    for layer in dict.fromkeys(layer for layer, _ in pairs[:_SHOWN]):
        some = [f"expert {e} ({int(stats[layer].count_E[e])} tokens)" for at, e in pairs[:_SHOWN] if at == layer]
        words.append(f"layer {layer}: {', '.join(some)}")
    more = f"; and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    return "; ".join(words) + more


def _many(starved: Starved) -> int:
    return sum(len(experts) for experts in starved.values())


def _experts(stats: CalibrationStats) -> int:
    return sum(len(s.count_E) for s in stats.values())
