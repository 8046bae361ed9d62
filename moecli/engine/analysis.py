"""How a model routes text: one sweep, then everything `ops.usage` and `ops.locality` can say of the trace.

    found = analyse(checkpoint, {"wiki": text}, device=device)      # a JSON-able dict, see `docs/analysis.md`

Text is whole samples without padding, so that a window is a window. The trace of every layer stays in memory, 2
bytes for each token and slot, and 8 more of the layer that is worked on. All numbers are of the experts that the
model stores; where an alias made two slots one visit, it is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationText, Checkpoint, LayerStats
from moecli.core.errors import UsageError
from moecli.engine.collectors import Grouped, LayerShape, collectors
from moecli.engine.collectors.base import Total
from moecli.engine.data import batches_of
from moecli.engine.sweep import Track, sweep
from moecli.families import adapter, family_of, linears_of
from moecli.io.formats import packed_weights, parts_of
from moecli.ops import locality, usage
from moecli.ops.super_experts import super_experts

STATISTICS = ("topk_idx", "coactivation", "transition", "absmax", "entropy")
LRU = "lru"
"""Name of the curve of a plain least-recently-used cache, beside those of each look-ahead."""
TOP_PAIRS = 8
"""Pairs of experts that are named, of each layer."""
DRAWS = 1000
"""Of each bootstrap."""

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the numbers besides model and text."""

    windows: tuple[int, ...] = (4, 16, 64, 256)
    """m of SRP and look-ahead F of SCH, in tokens; those longer than a sample are left out"""
    cache_samples: int = 32
    """Samples that caches are simulated on, evenly picked"""
    pooled_samples: int = 4
    """Samples for one cache of all layers, whose simulation costs L^2 times that of a layer; 0 leaves it out"""
    seed: int = 0
    """Of the bootstrap"""


@dataclass
class Analysis:
    """The document, and the counts of pairs, which are too many for one."""

    document: Document
    coactivation: dict[int, Tensor] = field(default_factory=dict)
    """int64 [E, E] by layer"""
    transition: dict[int, Tensor] = field(default_factory=dict)
    """int64 [E before, E] by layer, from the second MoE layer on"""


class TopMass(Total):
    """Sum over tokens of the k largest entries of softmax(z_t). float64 [1], sum."""

    name = "top_mass"
    routed = False
    needs = frozenset({"logits"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (1,)

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.softmax_TE.topk(grouped.choice_Tk.shape[1]).values.sum(dtype=torch.float64)[None]


class FirstAbsMax(Total):
    """max over samples of max|y| of the first token of each sample that an expert gets. float32 [E].

    What the published profile code of Super Experts reads, which looks at one row of an expert's output; `absmax` is
    over all tokens.
    """

    name = "absmax_first"
    needs = frozenset({"outputs"})
    routed = True
    reduce = "max"
    dtype = torch.float32

    def __init__(self, samples: int, tokens: int) -> None:
        self._samples, self._tokens = samples, tokens

    def start(self, shape: LayerShape, device: torch.device) -> None:
        super().start(shape, device)
        size = (self._samples, shape.experts + 1)  # the last one for what is no visit
        self._first_NE = torch.full(size, torch.iinfo(torch.int64).max, device=device)
        self._value_NE = torch.zeros(size, device=device)

    def update(self, grouped: Grouped) -> None:
        self.total = self.of(grouped)

    def of(self, grouped: Grouped) -> Tensor:
        token_S = grouped.token_T.to(self._first_NE.device)[grouped.row_S]
        place_S = token_S // self._tokens * self._first_NE.shape[1] + grouped.expert_S
        first, value = self._first_NE.view(-1), self._value_NE.view(-1)
        first.scatter_reduce_(0, place_S, token_S, "amin")
        # Of two slots of one place only one has the smallest token: a token visits an expert once.
        place_S = place_S.where(first[place_S] == token_S, self._first_NE.shape[1] - 1)
        value[place_S] = grouped.largest_S
        return self._value_NE[:, :-1].amax(0)


def analyse(
    checkpoint: Checkpoint,
    texts: Mapping[str, CalibrationText],
    settings: Settings | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    track: Track | None = None,
) -> Analysis:
    """Route the texts, by name, and measure. UsageError when they differ in length or hold padding."""
    settings = settings or Settings()
    _refuse_uneven(texts)
    domain_N = np.repeat(np.arange(len(texts)), [len(text.ids) for text in texts.values()])
    ids_NT = torch.cat([text.ids for text in texts.values()])
    whole = CalibrationText(ids_NT, torch.ones_like(ids_NT), "")
    swept = sweep(checkpoint, batches_of(whole, batch_size), device=device, dtype=dtype, track=track)
    bytes_by_layer = expert_bytes(checkpoint)
    analysis = Analysis({})
    traces: dict[int, np.ndarray] = {}
    layers: dict[int, Document] = {}
    absmax: dict[int, Tensor] = {}
    for layer in swept:
        if not layer.is_moe:
            continue
        stats = layer.observe([*collectors(STATISTICS), TopMass(), FirstAbsMax(*ids_NT.shape)])
        experts = layer.shape.experts
        analysis.coactivation[layer.index] = stats["coactivation"]
        if len(stats["transition"]):
            analysis.transition[layer.index] = stats["transition"]
        absmax[layer.index] = stats["absmax"]
        traces[layer.index] = stats["topk_idx"].reshape(*ids_NT.shape, -1).numpy()
        layers[layer.index] = _layer(stats, layer.shape, ids_NT, domain_N, list(texts))
        layers[layer.index] |= {"experts": experts, "expert_bytes": bytes_by_layer[layer.index]}
    analysis.document = {
        "texts": [
            {"name": name, "samples": len(text.ids), "tokens_per_sample": text.ids.shape[1], "digest": text.digest}
            for name, text in texts.items()
        ],
        "model_type": checkpoint.facts.model_type,
        "top_k": checkpoint.facts.top_k,
        "dtype": str(dtype).removeprefix("torch.") if dtype else checkpoint.facts.dtype,
        "layers": layers,
        "super_experts": super_experts(absmax, checkpoint.facts.layers),
        "locality": _locality(traces, layers, domain_N, list(texts), settings),
        "notes": swept.report(),
    }
    return analysis


def _refuse_uneven(texts: Mapping[str, CalibrationText]) -> None:
    if len({text.ids.shape[1] for text in texts.values()}) > 1 or any(not text.mask.all() for text in texts.values()):
        raise UsageError("routing is analysed on samples of one length without padding", hint="use `packing: pack`")


def expert_bytes(checkpoint: Checkpoint) -> dict[int, float]:
    """Bytes on disk of one expert, by MoE layer, scales of packed ones included: what a cache of experts holds."""
    dense = adapter.dense(checkpoint)
    family, specs = family_of(dense.config), {name: checkpoint.spec(name) for name in checkpoint.names()}
    packed = packed_weights(specs)
    total = dict.fromkeys(dense.facts.moe_layers, 0)
    for linear in linears_of(dense.config, {name: dense.spec(name) for name in dense.names()}):
        if linear.role == "expert" and linear.layer is not None:
            names = parts_of(linear.name, specs) if linear.name in packed else [linear.name]
            total[linear.layer] += sum(specs[name].bytes for name in names)
    return {layer: size / family.experts_in(layer) for layer, size in total.items()}


# -- questions to a document


def layer_mean(document: Document, name: str) -> float | None:
    """Mean over layers of a number of theirs; None when a layer lacks it."""
    values = [layer[name] for layer in document["layers"].values()]
    return None if None in values else sum(values) / len(values)


def experts_within(document: Document, size: float) -> int:
    """Experts of one layer that a cache of `size` bytes holds."""
    cache = document["locality"]["cache"]
    return min(int(size / cache["expert_bytes"] + 1e-9), len(cache["capacity"]))


def hit_rate(document: Document, curve: str, experts: int) -> tuple[float, float | None]:
    """Of a cache of this many experts in each layer, and its standard error over samples."""
    if experts < 1:
        return 0.0, None
    found = document["locality"]["cache"]["model"][curve]
    return found["rate"][experts - 1], found["stderr"][experts - 1]


# -- one layer


def _layer(
    stats: LayerStats, shape: LayerShape, ids_NT: Tensor, domain_N: np.ndarray, domains: Sequence[str]
) -> Document:
    count_E, experts = stats.count_E, shape.experts
    index_Tk = stats["topk_idx"]
    words = usage.vocabulary(index_Tk, ids_NT.flatten(), experts)
    document = {
        "tokens": stats.tokens,
        "count": count_E.tolist(),
        "frequency": _floats(count_E / count_E.sum().clamp(min=1)),
        "mean_gate": _floats((stats.gate_sum_E / count_E).masked_fill(count_E == 0, math.nan)),
        **usage.load(count_E)._asdict(),
        "routing_entropy": float(stats["entropy"]) / stats.tokens / math.log(shape.rows) if shape.rows > 1 else 0.0,
        "top_k_mass": float(stats["top_mass"]) / stats.tokens,
        "absmax": _floats(stats["absmax"]),
        "absmax_first": _floats(stats["absmax_first"]),
        "absmax_kurtosis": usage.kurtosis(stats["absmax"]),
        "pairs": _top_pairs(stats["coactivation"], count_E, stats.tokens),
        "token_share": _floats(words.share),
        "token_id": words.type.tolist(),
    }
    if len(domains) > 1:
        per_domain = [_count(index_Tk, ids_NT, domain_N == g, experts) for g in range(len(domains))]
        found = usage.domains(torch.stack(per_domain))
        document["domain_divergence"] = _floats(found.divergence)
        document["domain_ratio"] = _floats(found.largest)
        document["domain"] = [None if home < 0 else domains[home] for home in found.home.tolist()]
    return document


def _count(index_Tk: Tensor, ids_NT: Tensor, mine_N: np.ndarray, experts: int) -> Tensor:
    some = index_Tk.reshape(*ids_NT.shape, -1)[torch.from_numpy(mine_N)].long().flatten()
    return torch.bincount(some[some >= 0], minlength=experts)


def _top_pairs(together_EE: Tensor, count_E: Tensor, tokens: int) -> list[Document]:
    """The pairs with the largest PMI, each once, of those that met often enough to say so: rare ones lead by chance."""
    found = usage.pairs(together_EE, count_E, count_E, tokens)
    often = (together_EE >= usage.COMMON).triu(1)
    some = found.pmi.masked_fill(~often, -math.inf).flatten().topk(min(TOP_PAIRS, int(often.sum())))
    pairs = [divmod(place, len(count_E)) for place in some.indices.tolist()]
    return [
        {"experts": [a, b], "tokens": int(together_EE[a, b]), "lift": float(found.lift[a, b]),
         "pmi": float(found.pmi[a, b])}
        for a, b in pairs
    ]  # fmt: skip


def _floats(values: Tensor) -> list[float | None]:
    """nan, which JSON has no word for, becomes null."""
    return [None if math.isnan(value) else value for value in values.double().tolist()]


# -- locality


def _locality(
    traces: Mapping[int, np.ndarray],
    layers: Mapping[int, Document],
    domain_N: np.ndarray,
    domains: Sequence[str],
    settings: Settings,
) -> Document:
    """SRP and SCH of every layer, of all layers together, and of each text."""
    samples, tokens, _ = next(iter(traces.values())).shape
    windows = [m for m in settings.windows if m <= tokens]
    srp: dict[int, Document] = {layer: {} for layer in traces}
    model: Document = {}
    for window in windows:
        total_Nm = np.zeros((samples, window + 1), np.int64)
        for layer, trace in traces.items():
            by_expert = locality.window_histogram(trace, layers[layer]["experts"], window)
            mine_Nm = by_expert.sum(1)
            total_Nm += mine_Nm
            found = _srp(mine_Nm, settings.seed)
            found["experts"] = [getattr(locality.segment_routing(h), "srp", None) for h in by_expert.sum(0)]
            srp[layer][str(window)] = found
        model[str(window)] = _srp(total_Nm, settings.seed)
        if len(domains) > 1:
            model[str(window)]["texts"] = {
                name: _srp(total_Nm[domain_N == g], settings.seed) for g, name in enumerate(domains)
            }
    picked = _picked(samples, settings.cache_samples)
    names = [LRU, *map(str, windows)]
    rates = {
        layer: {name: _rates(trace[picked], layers[layer]["experts"], name) for name in names}
        for layer, trace in traces.items()
    }
    widest = max(layer["experts"] for layer in layers.values())
    document: Document = {
        "windows": windows,
        "samples": samples,
        "cache_samples": len(picked),
        "srp": {"model": model, "layers": srp},
        "cache": {
            "capacity": list(range(1, widest + 1)),
            "expert_bytes": float(np.mean([layer["expert_bytes"] for layer in layers.values()])),
            "model": {
                name: _curve(np.mean([_widened(of[name], widest) for of in rates.values()], 0), settings.seed)
                for name in names
            },
            "layers": {
                layer: {name: rate.mean(0).tolist() for name, rate in of.items()} for layer, of in rates.items()
            },
        },
    }
    if settings.pooled_samples and len(traces) > 1:
        document["pooled"] = _pooled(traces, widest, names, settings)
    return document


def _picked(samples: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, samples - 1, min(samples, wanted)).round().astype(int))


def _srp(histogram_Nm: np.ndarray, seed: int) -> Document:
    found = locality.segment_routing(histogram_Nm.sum(0))
    if found is None:
        return {}
    low, high = locality.srp_interval(histogram_Nm, DRAWS, seed)
    return {"srp": found.srp, "low": low, "high": high, "threshold": found.threshold, "active": found.active,
            "rho": found.rho, "baseline": found.baseline}  # fmt: skip


def _rates(trace_NTk: np.ndarray, experts: int, name: str) -> np.ndarray:
    return locality.cache_hits(trace_NTk, experts, 0 if name == LRU else int(name)).rate_NE


def _widened(rate_NE: np.ndarray, experts: int) -> np.ndarray:
    """A cache larger than the layer always hits."""
    return np.pad(rate_NE, ((0, 0), (0, experts - rate_NE.shape[1])), constant_values=1.0)


def _curve(rate_NE: np.ndarray, seed: int, capacity: np.ndarray | None = None) -> Document:
    """Mean over samples at every capacity, with its interval."""
    rate_NE = rate_NE if capacity is None else rate_NE[:, capacity - 1]
    bounds = [locality.mean_interval(rate_N, DRAWS, seed) for rate_N in rate_NE.T]
    error_E = rate_NE.std(0, ddof=1) / len(rate_NE) ** 0.5 if len(rate_NE) > 1 else np.full(rate_NE.shape[1], np.nan)
    return {
        "rate": rate_NE.mean(0).tolist(),
        "stderr": [None if math.isnan(error) else float(error) for error in error_E],
        "low": [max(0.0, low) for low, _ in bounds],
        "high": [min(1.0, high) for _, high in bounds],
    }


def _pooled(traces: Mapping[int, np.ndarray], experts: int, names: Sequence[str], settings: Settings) -> Document:
    """One cache of all layers' experts."""
    stacked = np.stack(list(traces.values()))
    picked = _picked(stacked.shape[1], settings.pooled_samples)
    trace = locality.pooled(stacked[:, picked], experts)
    every = len(traces) * experts
    capacity = np.unique(np.linspace(1, every, min(every, 128)).round().astype(int))
    curves = {name: _curve(_rates(trace, every, name), settings.seed, capacity) for name in names}
    return {"samples": len(picked), "capacity": capacity.tolist(), "model": curves}
