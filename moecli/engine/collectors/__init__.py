"""Calibration statistics: one class a statistic, one catalogue, one name for one thing.

A collector sees a layer's tokens in chunks, already grouped by expert (`Grouped`), and keeps what combines over any
split of the text: a plain sum, a plain maximum, the rows of the tokens with the smallest keys, or one row a token. Any
split of the same text gives the same result within rounding. Padding never reaches a collector.

Notation: x_t input of the experts, z_t router logits, A_t the experts chosen for token t, X_i the tokens routed to
expert i, g_ti (p_ti in papers on channels) the weight the model really multiplies with (after score function,
renormalisation and scaling), h_ti what the expert's down projection takes (act(gate) * up), y_ti the expert's output
before that weight, h_t the residual stream before the MoE block.
Shared experts are never counted. Values are computed in fp32 and summed in fp64; matrices are multiplied in
fp32 per chunk and summed in fp64 (`grams` says what holds on CUDA).

On an alias checkpoint the experts are the M stored ones (two slots of a token on one expert are one visit
with the sum of both weights); `prob_sum`, `logit_gram` and `entropy` keep the router's E rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from moecli.core.errors import UsageError
from moecli.engine.collectors.base import Collector, LayerShape, Need
from moecli.engine.collectors.channels import H1, H2, X2, HAbs, HMax, Ph2, PhMax, Px2, XAbs, XMax
from moecli.engine.collectors.gradients import GRADIENTS
from moecli.engine.collectors.grams import GhCov, GxCov, HCov, PhCov, XCov, XCovPool
from moecli.engine.collectors.grouped import Grouped
from moecli.engine.collectors.outputs import (
    AbsMax,
    BlockCos,
    EanSq,
    EanSum,
    Easy,
    GeanSq,
    GeanSum,
    GramCos,
    GyMean,
    Share,
    YMean,
)  # fmt: skip
from moecli.engine.collectors.routing import (
    CoActivation,
    Count,
    Entropy,
    GateSq,
    GateSum,
    LogitGram,
    ProbRouted,
    ProbSum,
    TopkIdx,
    TopkW,
    Transition,
)  # fmt: skip
from moecli.engine.collectors.samples import ActSample, Sample, TokReservoir, joined_samples

__all__ = [
    "CATALOGUE",
    "FORWARD",
    "Collector",
    "Grouped",
    "LayerShape",
    "Need",
    "collectors",
    "held_bytes",
    "joined",
    "needs_of",
    "token_dim",
]

FORWARD: Mapping[str, type[Collector]] = {
    kind.name: kind
    for kind in (
        Count, GateSum, GateSq, ProbSum, ProbRouted, Entropy, LogitGram, CoActivation, Transition, TopkIdx, TopkW,
        EanSum, EanSq, GeanSum, GeanSq, Easy, Share, BlockCos, AbsMax, YMean, GyMean, GramCos,
        X2, Px2, XAbs, XMax, H1, H2, HAbs, HMax, Ph2, PhMax,
        XCov, GxCov, XCovPool, HCov, GhCov, PhCov, TokReservoir, ActSample,
    )
}  # fmt: skip
"""What a forward sweep collects, by name."""

CATALOGUE: Mapping[str, type[Collector]] = {**FORWARD, **{kind.name: kind for kind in GRADIENTS}}
"""Every statistic by name; each class's docstring gives formula, dtype, shape, how it combines, and paper. Those that
are not in `FORWARD` need a backward sweep.
"""


def collectors(names: Iterable[str]) -> list[Collector]:
    """Fresh collectors for one layer, without doubles. UsageError for a name that is not in the catalogue."""
    return [_known(name)() for name in dict.fromkeys(names)]


def _known(name: str) -> type[Collector]:
    if name not in CATALOGUE:
        raise UsageError(f"unknown statistic `{name}`", hint=f"known: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def needs_of(some: Iterable[Collector]) -> frozenset[Need]:
    """Everything these collectors read."""
    return frozenset(_each_need(some))


def _each_need(some: Iterable[Collector]) -> Iterator[Need]:
    for collector in some:
        yield from collector.needs


def held_bytes(names: Iterable[str], shape: LayerShape) -> int:
    """Device memory that these statistics hold while one layer is observed."""
    return sum(_known(name).held_bytes(shape) for name in dict.fromkeys(names))


def joined(kind: type[Collector], first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `kind` found over the text of both, from the tensors it found in each. Sums add, maxima take the larger,
    samples keep the smallest keys, traces follow one another; equal keys keep the order first, second.
    """
    if issubclass(kind, Sample):
        return joined_samples(kind, first, second)
    if kind.reduce == "trace":
        return {name: torch.cat([value, second[name]]) for name, value in first.items()}
    join = torch.maximum if kind.reduce == "max" else torch.add
    return {name: join(value, second[name]) for name, value in first.items()}


def token_dim(name: str, kind: type[Collector] | None) -> int | None:
    """Which dimension of this tensor of `kind` counts tokens: that of samples and traces; None in sums and maxima."""
    if kind is not None and issubclass(kind, Sample):
        return kind.dim if name == kind.name else 0
    return 0 if kind is not None and kind.reduce == "trace" else None
