"""Calibration statistics as values: put together, topped up, compared. Pure functions, nothing is run.

Every statistic combines over any split of the text (`Collector.reduce`), so two artifacts over different text of one
model are one artifact over both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import UsageError
from moecli.engine.collectors import CATALOGUE, Collector, joined, token_dim

ALWAYS = ("count", "gate_sum")
"""Statistics that every artifact holds."""

Starved = Mapping[int, list[int]]
"""Layer -> its experts with too few tokens, ascending; layers without any are left out."""


def names_in(stats: LayerStats) -> tuple[str, ...]:
    """Names of all statistics of a layer, counts and gate sums first."""
    return (*ALWAYS, *stats.extra)


def collector_of(name: str) -> type[Collector] | None:
    """The collector a tensor comes from: the one of its name, else the longest that its name starts with."""
    fitting = [known for known in CATALOGUE if name == known or name.startswith(f"{known}_")]
    return CATALOGUE[max(fitting, key=len)] if fitting else None


def is_per_expert(name: str) -> bool | None:
    """True when entry i of a statistic depends on the tokens routed to expert i alone, False when on others too; None
    for what no collector of this version makes.
    """
    return getattr(collector_of(name), "routed", None)


def channel_variance(stats: LayerStats) -> Tensor:
    """Variance of each channel of h over the tokens routed to each expert, float64 [E, F]; 0 without tokens. From `h1`
    and `h2`: E[h^2] - E[h]^2, at least 0.
    """
    count_E1 = stats.count_E.clamp(min=1)[:, None]
    return (stats["h2"] / count_E1 - (stats["h1"] / count_E1).square()).clamp(min=0)


# --- starved experts ------------------------------------------------------------------------------


def starved_in(stats: CalibrationStats, tokens: int) -> dict[int, list[int]]:
    """Experts with fewer than `tokens` tokens, by layer."""
    found = {layer: (s.count_E < tokens).nonzero().flatten().tolist() for layer, s in stats.items()}
    return {layer: experts for layer, experts in found.items() if experts}


def topped_up(stats: CalibrationStats, more: Mapping[int, LayerStats], starved: Starved) -> CalibrationStats:
    """`stats` with the starved experts' entries joined by those of `more`, which saw other text.

    Only the entries of `starved` change, and only in per-expert statistics: sums add, maxima take the larger. All
    other entries, statistics over all tokens, and `tokens` keep their bits.
    """
    layers = {layer: _fed(s, more[layer], starved[layer]) if layer in starved else s for layer, s in stats.items()}
    return CalibrationStats(layers, stats.source)


def _fed(stats: LayerStats, more: LayerStats, experts: list[int]) -> LayerStats:
    def feed(name: str) -> Tensor:
        old = stats[name]
        if not is_per_expert(name):
            return old
        new = old.clone()
        new[experts] = _joined(name, old[experts], more[name][experts])
        return new

    extra = {name: feed(name) for name in stats.extra}
    return LayerStats(stats.tokens, feed("count"), feed("gate_sum"), extra)


# --- two artifacts --------------------------------------------------------------------------------


DOMAINS = "domains"
"""Entry of `source`: how many domains `easy` is put together of; absent where it is a sum over tokens."""


def merged(first: CalibrationStats, second: CalibrationStats, domains: bool = False) -> CalibrationStats:
    """Statistics over the text of both. UsageError names everything that keeps them apart: another model or dtype,
    other layers, statistics or shapes, or text that is in both.

    With `domains` they stand for a domain each, or for several that were put together so: `easy` becomes the sum over
    domains of easy / sum_i easy_i, which ranks experts as the mean over domains does (EASY-EP, arXiv 2504.06792). All
    other statistics are those of both texts.
    """
    if reasons := list(_differences(first, second)):
        raise UsageError(f"these statistics cannot be merged: {'; '.join(reasons)}")
    many = sum(int(stats.source.get(DOMAINS, domains)) for stats in (first, second))
    if domains and any("easy" not in stats.extra for stats in first.values()):
        raise UsageError("`--domains` puts scores of EASY-EP together, these statistics hold no `easy`",
                         hint="calibrate with `statistics: [easy, absmax]`")  # fmt: skip
    if many and not domains:
        raise UsageError("these statistics cannot be merged: `easy` of one of them is put together of domains",
                         hint="add `--domains`")  # fmt: skip
    sides = [_by_domain(stats) for stats in (first, second)] if domains else [first, second]
    layers = {layer: _both(stats, sides[1][layer]) for layer, stats in sides[0].items()}
    source = _source_of(first.source, second.source)
    return CalibrationStats(layers, source | {DOMAINS: many} if domains else source)


def _by_domain(stats: CalibrationStats) -> CalibrationStats:
    """The same with `easy` as a share of its sum in each layer, unless it is made of domains already."""
    if DOMAINS in stats.source:
        return stats
    shared = {
        layer: replace(s, extra={**s.extra, "easy": s["easy"] / s["easy"].sum().clamp(min=1e-300)})
        for layer, s in stats.items()
    }
    return CalibrationStats(shared, stats.source)


def _both(first: LayerStats, second: LayerStats) -> LayerStats:
    owners: dict[type[Collector], list[str]] = {}
    for name in names_in(first):
        owners.setdefault(_owner(name), []).append(name)
    pairs = [(kind, *({n: side[n] for n in names} for side in (first, second))) for kind, names in owners.items()]
    found = {name: tensor for kind, mine, other in pairs for name, tensor in joined(kind, mine, other).items()}
    return LayerStats(first.tokens + second.tokens, found.pop("count"), found.pop("gate_sum"), found)


def _joined(name: str, first: Tensor, second: Tensor) -> Tensor:
    return joined(_owner(name), {name: first}, {name: second})[name]


def _owner(name: str) -> type[Collector]:
    kind = collector_of(name)
    if kind is None:
        raise KeyError(name)  # `_differences` and `is_per_expert` have refused it
    return kind


def _differences(first: CalibrationStats, second: CalibrationStats) -> Iterator[str]:
    for name, words in (("model_type", "families"), ("dtype", "dtypes of the model"), ("model", "models")):
        mine, other = first.source.get(name), second.source.get(name)
        if mine != other:
            yield f"{words} differ ({_short(mine)} and {_short(other)})"
    if first.source.get("mask_special_tokens") != second.source.get("mask_special_tokens"):
        yield "only one of them leaves out special tokens"
    yield from shape_differences(first, second, of_tokens=False)
    if common := _digests(first.source) & _digests(second.source):
        yield f"both hold the same text (digest {_short(min(common))})"
    if unknown := [name for name in _all_names(first) if collector_of(name) is None]:
        yield f"{_listed(unknown)} is nothing that this version knows how to merge"


def shape_differences(first: CalibrationStats, second: CalibrationStats, of_tokens: bool = True) -> Iterator[str]:
    """What keeps two artifacts from being compared entry by entry: layers, statistics, shapes, dtypes. Without
    `of_tokens` samples and traces may hold different numbers of tokens.
    """
    if list(first) != list(second):
        yield f"layers differ ({_numbers(first)} and {_numbers(second)})"
    for layer in first.keys() & second.keys():
        mine, other = names_in(first[layer]), names_in(second[layer])
        if set(mine) != set(other):
            yield f"layer {layer}: only one of them has {_listed(sorted(set(mine) ^ set(other)))}"
        for name in (n for n in mine if n in other):
            a, b = first[layer][name], second[layer][name]
            dim = None if of_tokens else token_dim(name, collector_of(name))
            if a.dtype != b.dtype or _without(a.shape, dim) != _without(b.shape, dim):
                yield f"layer {layer}: `{name}` is {_kind(a)} in one, {_kind(b)} in the other"


def _without(shape: torch.Size, dim: int | None) -> tuple[int, ...]:
    return tuple(size for at, size in enumerate(shape) if at != dim)


def _source_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: value for name, value in first.items() if second.get(name) == value and name != "merged"}
    parts = [*_origins(first), *_origins(second)]
    digest = hashlib.sha256(" ".join(sorted(_digests(first) | _digests(second))).encode()).hexdigest()
    samples = sum(int(part.get("samples", 0)) for part in parts)
    return same | {"samples": samples, "digest": digest, "merged": parts}


def _origins(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(source.get("merged") or [dict(source)])


def _digests(source: Mapping[str, Any]) -> set[str]:
    return {str(part["digest"]) for part in _origins(source) if part.get("digest")}


@dataclass(frozen=True, slots=True)
class Change:
    """How far one statistic of one layer is from another run's."""

    layer: int
    name: str
    relative: float
    """||a - b|| / max(||a||, ||b||), sums divided by their tokens first; 0 when both are 0."""
    equal: bool
    """True when every entry has the same bits."""
    expert: int | None
    """Entry of the first dimension with the largest difference; None when all are equal."""


def compared(first: CalibrationStats, second: CalibrationStats) -> list[Change]:
    """Every statistic of every layer of two artifacts. UsageError when their layers, statistics or shapes differ."""
    if reasons := list(shape_differences(first, second)):
        raise UsageError(f"these statistics cannot be compared: {'; '.join(reasons)}")
    return [_change(layer, name, a, second[layer]) for layer, a in first.items() for name in names_in(a)]


def _change(layer: int, name: str, first: LayerStats, second: LayerStats) -> Change:
    a, b = _per_token(name, first), _per_token(name, second)
    size = max(float(a.norm()), float(b.norm()))
    gap = (a - b).abs().flatten(1 if a.dim() > 1 else 0)
    gap_E = gap.amax(1) if a.dim() > 1 else gap
    differs = bool(gap_E.numel()) and float(gap_E.max()) > 0
    return Change(
        layer, name, float((a - b).norm()) / size if size else 0.0, torch.equal(first[name], second[name]),
        int(gap_E.argmax()) if differs else None,
    )  # fmt: skip


def _per_token(name: str, stats: LayerStats) -> Tensor:
    kind = collector_of(name)
    value = stats[name].double()
    return value / max(stats.tokens, 1) if kind is None or kind.reduce == "sum" else value


def _all_names(stats: CalibrationStats) -> list[str]:
    return list(dict.fromkeys(name for layer in stats.values() for name in names_in(layer)))


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _numbers(layers: Collection[int]) -> str:
    return " ".join(map(str, layers)) or "none"


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
