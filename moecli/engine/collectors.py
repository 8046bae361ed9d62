"""Calibration statistics: one class a statistic, one catalogue, one name for one thing.

A collector sees a layer's tokens in chunks, already grouped by expert (`Grouped`), and keeps a plain sum or
a plain maximum: results of two runs over different text add up (or maximise), and any split of the same
text gives the same result within fp64 rounding. Padding never reaches a collector.

Notation: x_t input of the experts, z_t router logits, A_t the experts chosen for token t, g_ti the weight
the model really multiplies with (after score function, renormalisation and scaling), y_ti the expert's
output before that weight, X_i the tokens routed to expert i, h_t the residual stream before the MoE block.
Shared experts are never counted. Values are computed in fp32 and summed in fp64; matrices are multiplied in
fp32 per chunk and summed in fp64.

On an alias checkpoint the experts are the M stored ones (two slots of a token on one expert are one visit
with the sum of both weights); statistics of the router (`prob_sum`, `logit_gram`) keep its E rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moecli.core.errors import UsageError
from moecli.core.model import ScoreRule
from moecli.engine.fused import Visits
from moecli.ops.grouped import turn

Need = Literal["outputs", "all_experts", "logits", "residual"]
"""What a collector reads of `Grouped`: `outputs` routed y, `all_experts` y of every expert for every token
(E/k times the work), `logits` router logits, `residual` the stream before the block and the routed sum.
"""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of the layer that is observed."""

    experts: int
    """Stored experts: E, or M of an alias checkpoint."""
    rows: int
    """Router rows: E"""
    hidden: int
    """D"""
    score: ScoreRule


@dataclass(frozen=True, eq=False)
class Grouped:
    """Some tokens of one batch in one layer. T tokens, S = visits of experts (T*k without aliases), sorted
    by expert.

    Tensors that a collector did not declare in `needs` may be absent. Outputs are computed when first asked
    for and shared by all collectors.
    """

    shape: LayerShape
    hidden_TD: Tensor
    index_Tk: Tensor
    """int64, stored expert of each slot; -1 where an alias made the slot part of an earlier one"""
    weight_Tk: Tensor
    """g, in the model's dtype"""
    token_T: Tensor
    """int64, running number of each token in the whole calibration text, padding not counted"""
    run_experts: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    """(x_SD, expert_S sorted) -> y_SD, un-gated"""
    logits_TE: Tensor | None = None
    residual_TD: Tensor | None = None
    """h"""
    routed_TD: Tensor | None = None
    """sum over A_t of g*y, as the model adds it to the stream"""
    coalesced: bool = False
    """True when `index_Tk` may hold -1."""
    visits: Visits | None = None
    """What the layer's own pass through the experts left, padding among it; None: outputs are computed anew"""
    place_Tk: Tensor | None = None
    """int64, where in `visits` each slot lies"""
    whole: bool = False
    """True when `visits` holds these tokens and no others, each slot a visit of its own."""
    sum_experts: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """x_TD -> sum over T of y of every expert, float32 [E, D]; None: `run_experts` on all pairs"""
    pair_rows: int = 1 << 15
    """Rows of `run_experts` in one call when all experts see all tokens."""

    @property
    def tokens(self) -> int:
        """T"""
        return self.hidden_TD.shape[0]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Sorted expert of each visit and its position in the flattened [T, k]. Slots that are part of an earlier one
        come last, as visits of an expert after the last: their number is known to the device only.
        """
        if self.visits is not None and self.whole:
            return self.visits.groups.expert_S, self.visits.groups.slot_S
        flat = self.index_Tk.flatten().to(torch.int32)
        if self.coalesced:
            flat = flat.masked_fill(flat < 0, self.shape.experts)
        return torch.sort(flat, stable=True)

    def _passed(self, value_S: Tensor) -> Tensor:
        """A value of `visits` in the order of this group."""
        return value_S if self.whole else value_S[self.place_Tk.flatten()[self._sorted[1]]]

    @property
    def expert_S(self) -> Tensor:
        """int32, ascending; E for what is no visit (see `coalesced`)"""
        return self._sorted[0]

    @cached_property
    def row_S(self) -> Tensor:
        """int64, row of `hidden_TD` of each visit"""
        return self._sorted[1] // self.index_Tk.shape[1]

    @cached_property
    def gate_S(self) -> Tensor:
        """float32, g of each visit"""
        return self.weight_Tk.flatten()[self._sorted[1]].float()

    @cached_property
    def count_E(self) -> Tensor:
        """int64, visits of each expert"""
        edges = torch.arange(self.shape.experts + 1, dtype=torch.int32, device=self.expert_S.device)
        return torch.searchsorted(self.expert_S, edges).diff()  # unlike bincount, nothing waits for the device

    @cached_property
    def output_SD(self) -> Tensor:
        """y of each visit, in the model's dtype"""
        if self.visits is not None:
            return self._passed(self.visits.output_SD)
        return self.run_experts(self.hidden_TD[self.row_S], self.expert_S)

    @cached_property
    def norm_S(self) -> Tensor:
        """float32, ||y||_2"""
        if self.visits is not None:
            return self._passed(self.visits.square_S).sqrt()
        return torch.linalg.vector_norm(self.output_SD, dim=-1, dtype=torch.float32)

    @cached_property
    def largest_S(self) -> Tensor:
        """float32, max |y|"""
        if self.visits is not None:
            return self._passed(self.visits.largest_S)
        return self.output_SD.abs().amax(-1).float()

    @cached_property
    def output_sum_ED(self) -> Tensor:
        """float32, sum over all tokens of every expert's y"""
        if self.sum_experts is not None:
            return self.sum_experts(self.hidden_TD)
        return self.all_output_ETD.sum(1, dtype=torch.float32)

    @cached_property
    def all_output_ETD(self) -> Tensor:
        """y of every expert for every token, in the model's dtype: E*T*D elements, so chunks are small."""
        per_call = max(1, self.pair_rows // max(1, self.tokens))
        experts = torch.arange(self.shape.experts, dtype=torch.int32, device=self.hidden_TD.device).split(per_call)
        return torch.cat([self._run_all(some_e) for some_e in experts])

    def _run_all(self, some_e: Tensor) -> Tensor:
        hidden_SD = self.hidden_TD.repeat(len(some_e), 1)
        return self.run_experts(hidden_SD, some_e.repeat_interleave(self.tokens)).unflatten(
            0, (len(some_e), self.tokens)
        )

    @cached_property
    def score_TE(self) -> Tensor:
        """float32 full score vector before any selection: sigmoid for sigmoid routers, else softmax over
        all rows.
        """
        logits = self.logits_TE.float()
        return logits.sigmoid() if self.shape.score == "sigmoid" else logits.softmax(-1)

    def sum_E(self, value_S: Tensor) -> Tensor:
        """float64 [E], sum of a value over each expert's visits; the same bytes on every run."""
        return torch.segment_reduce(value_S.double(), "sum", lengths=self.count_E, unsafe=True, initial=0)

    def max_E(self, value_S: Tensor) -> Tensor:
        """[E], largest of a non-negative value over each expert's visits; 0 without visits."""
        return torch.segment_reduce(value_S, "max", lengths=self.count_E, unsafe=True, initial=0)


class Collector(ABC):
    """One statistic of one layer: `start` once, `update` for every chunk, `result` at the end.

    Further statistics (channel energies, Grams, reservoirs keyed by `Grouped.token_T`) need no other
    interface: what they read becomes another lazy property of `Grouped`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    reduce: ClassVar[Literal["sum", "max"]] = "sum"
    """How results of several runs combine."""

    @abstractmethod
    def start(self, shape: LayerShape, device: torch.device) -> None: ...

    @abstractmethod
    def update(self, grouped: Grouped) -> None: ...

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Statistic by name, on the CPU. Only now may the device be waited for."""


class _Total(Collector):
    """A collector that holds one tensor: sums in fp64 (int64 for counts), maxima in fp32."""

    dtype: ClassVar[torch.dtype] = torch.float64

    def size(self, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts,)

    @abstractmethod
    def of(self, grouped: Grouped) -> Tensor:
        """This chunk's share."""

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self.total = torch.zeros(self.size(shape), dtype=self.dtype, device=device)

    def update(self, grouped: Grouped) -> None:
        share = self.of(grouped)
        if self.reduce == "max":
            torch.maximum(self.total, share, out=self.total)
        else:
            self.total += share

    def result(self) -> dict[str, Tensor]:
        return {self.name: self.total.cpu()}


class Count(_Total):
    """Tokens routed to each expert: n_i = |X_i|. int64 [E], sum."""

    name = "count"
    dtype = torch.int64

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.count_E


class GateSum(_Total):
    """Sum of the weights really used: sum over X_i of g_ti. float64 [E], sum."""

    name = "gate_sum"

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.gate_S)


class ProbSum(_Total):
    """Soft count: sum over all tokens of the full score p_ti, chosen or not; sigmoid(z) for sigmoid
    routers, softmax(z) for all others; no selection bias, no renormalisation. float64 [router rows], sum.

    SEER-MoE (2404.05089). The sum over routed tokens only, which PMQ uses, is another statistic.
    """

    name = "prob_sum"
    needs = frozenset({"logits"})

    def size(self, shape: LayerShape) -> tuple[int, ...]:
        return (shape.rows,)

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.score_TE.sum(0, dtype=torch.float64)


class EanSum(_Total):
    """Expert activation norm: sum over X_i of ||y_ti||_2. float64 [E], sum. EAN (2504.05586)."""

    name = "ean_sum"
    needs = frozenset({"outputs"})

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.norm_S)


class EanSq(_Total):
    """Sum over X_i of ||y_ti||_2^2. float64 [E], sum. MSAN (2606.15716)."""

    name = "ean_sq"
    needs = frozenset({"outputs"})

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.norm_S.double().square())


class GeanSum(_Total):
    """Gated activation norm: sum over X_i of g_ti * ||y_ti||_2. float64 [E], sum. REAP (2510.13999)."""

    name = "gean_sum"
    needs = frozenset({"outputs"})

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.gate_S * grouped.norm_S)


class GeanSq(_Total):
    """Sum over X_i of (g_ti * ||y_ti||_2)^2. float64 [E], sum."""

    name = "gean_sq"
    needs = frozenset({"outputs"})

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E((grouped.gate_S * grouped.norm_S).double().square())


class Easy(_Total):
    """Sum over X_i of g_ti * ||y_ti||_2 * max(0, 1 - cos(h_t, h_t + r_t)), r_t the routed sum without
    shared experts. float64 [E], sum. EASY-EP (2504.06792). Where a family scales what it adds to the
    stream, so is r_t.
    """

    name = "easy"
    needs = frozenset({"outputs", "residual"})

    def of(self, grouped: Grouped) -> Tensor:
        change_T = turn(grouped.residual_TD, grouped.routed_TD)
        return grouped.sum_E(grouped.gate_S * grouped.norm_S * change_T[grouped.row_S])


class AbsMax(_Total):
    """Largest |y| over X_i and all channels, un-gated. float32 [E], maximum. Super Experts (2507.23279)."""

    name = "absmax"
    needs = frozenset({"outputs"})
    reduce = "max"
    dtype = torch.float32

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.max_E(grouped.largest_S)


class YMean(_Total):
    """Sum of y over *all* tokens for every expert, routed there or not; divide by `tokens` for the mean.
    float64 [E, D], sum. HC-SMoE (2410.08589, section 3). Costs E/k times the expert work of a forward pass.
    """

    name = "y_mean"
    needs = frozenset({"all_experts"})

    def size(self, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.hidden)

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.output_sum_ED


class LogitGram(_Total):
    """Sum over all tokens of z_t z_t^T. float64 [router rows, router rows], sum. M-SMoE (2310.01334)."""

    name = "logit_gram"
    needs = frozenset({"logits"})

    def size(self, shape: LayerShape) -> tuple[int, ...]:
        return (shape.rows, shape.rows)

    def of(self, grouped: Grouped) -> Tensor:
        logits = grouped.logits_TE.float()
        return logits.T @ logits


CATALOGUE: Mapping[str, type[Collector]] = {
    kind.name: kind
    for kind in (
        Count, GateSum, ProbSum, EanSum, EanSq, GeanSum, GeanSq, Easy, AbsMax, YMean, LogitGram,
    )
}  # fmt: skip
"""Every statistic by name; each class's docstring gives formula, dtype, shape, sum or maximum, and paper."""


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
