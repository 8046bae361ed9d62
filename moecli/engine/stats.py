"""Calibration statistics as values: put together, topped up, compared. Pure functions, nothing is run.

Every statistic is a plain sum or a plain maximum over tokens (`Collector.reduce`), so two artifacts over different
text of one model are one artifact over both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import UsageError
from moecli.engine.collectors import CATALOGUE, Collector

ALWAYS = ("count", "gate_sum")
"""Statistics that every artifact holds."""
_ROUTED = frozenset({"count", "gate_sum", "ean_sum", "ean_sq", "gean_sum", "gean_sq", "easy", "absmax"})
_ALL_TOKENS = frozenset({"prob_sum", "y_mean", "logit_gram"})

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
    """True when entry i of a statistic depends on the tokens routed to expert i alone, False when on all tokens;
    None when that is not known (a collector may say it as `routed`).
    """
    kind = collector_of(name)
    told = getattr(kind, "routed", None)
    if told is not None:
        return bool(told)
    known = kind.name if kind is not None else name
    return True if known in _ROUTED else False if known in _ALL_TOKENS else None


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


def merged(first: CalibrationStats, second: CalibrationStats) -> CalibrationStats:
    """Statistics over the text of both. UsageError names everything that keeps them apart: another model or dtype,
    other layers, statistics or shapes, or text that is in both.
    """
    if reasons := list(_differences(first, second)):
        raise UsageError(f"these statistics cannot be merged: {'; '.join(reasons)}")
    layers = {layer: _both(stats, second[layer]) for layer, stats in first.items()}
    return CalibrationStats(layers, _source_of(first.source, second.source))


def _both(first: LayerStats, second: LayerStats) -> LayerStats:
    found = {name: _joined(name, first[name], second[name]) for name in names_in(first)}
    return LayerStats(first.tokens + second.tokens, found.pop("count"), found.pop("gate_sum"), found)


def _joined(name: str, first: Tensor, second: Tensor) -> Tensor:
    kind = collector_of(name)
    return torch.maximum(first, second) if kind is not None and kind.reduce == "max" else first + second


def _differences(first: CalibrationStats, second: CalibrationStats) -> Iterator[str]:
    for name, words in (("model_type", "families"), ("dtype", "dtypes of the model"), ("model", "models")):
        mine, other = first.source.get(name), second.source.get(name)
        if mine != other:
            yield f"{words} differ ({_short(mine)} and {_short(other)})"
    yield from shape_differences(first, second)
    if common := _digests(first.source) & _digests(second.source):
        yield f"both hold the same text (digest {_short(min(common))})"
    unknown = [name for name in _all_names(first) if getattr(collector_of(name), "reduce", None) not in ("sum", "max")]
    if unknown:
        yield f"{_listed(unknown)} is neither a sum nor a maximum that this version knows"


def shape_differences(first: CalibrationStats, second: CalibrationStats) -> Iterator[str]:
    """What keeps two artifacts from being compared entry by entry: layers, statistics, shapes, dtypes."""
    if list(first) != list(second):
        yield f"layers differ ({_numbers(first)} and {_numbers(second)})"
    for layer in first.keys() & second.keys():
        mine, other = names_in(first[layer]), names_in(second[layer])
        if set(mine) != set(other):
            yield f"layer {layer}: only one of them has {_listed(sorted(set(mine) ^ set(other)))}"
        for name in (n for n in mine if n in other):
            a, b = first[layer][name], second[layer][name]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                yield f"layer {layer}: `{name}` is {_kind(a)} in one, {_kind(b)} in the other"


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
    return value if kind is not None and kind.reduce == "max" else value / max(stats.tokens, 1)


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
