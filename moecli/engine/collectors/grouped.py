"""What collectors are shown of a layer: some tokens of one batch, sorted by expert, and values made when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecli.engine.fused import Visits
from moecli.ops import grouped as ops

if TYPE_CHECKING:
    from moecli.engine.collectors.base import LayerShape

Run = Callable[[Tensor, Tensor], Tensor]
"""(x_SD, expert_S sorted) -> one row for each"""


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
    """int64 on the CPU, so that what is decided by it needs no wait: running number of each token in the whole
    calibration text, padding not counted"""
    run_experts: Run = field(repr=False)
    """un-gated y_SD"""
    run_inner: Run = field(repr=False)
    """inner_SF, what the down projection takes"""
    choice_Tk: Tensor
    """int64, router row of each slot: `index_Tk` without aliases"""
    alias_E: Tensor | None = None
    """int64, stored expert of each router row; None when they are the same"""
    before_Tk: Tensor | None = None
    """int16, `index_Tk` of these tokens in the MoE layer before; None in the first"""
    logits_TE: Tensor | None = None
    residual_TD: Tensor | None = None
    """h"""
    routed_TD: Tensor | None = None
    """sum over A_t of g*y, as the model adds it to the stream"""
    block_TD: Tensor | None = None
    """the same with shared experts, where the family has them"""
    slope_TD: Tensor | None = None
    """dl/d(output of the decoder layer), on the way back only"""
    visits: Visits | None = None
    """What the layer's own pass through the experts left, padding among it; None: outputs are computed anew"""
    place_Tk: Tensor | None = None
    """int64, where in `visits` each slot lies"""
    whole: bool = False
    """True when `visits` holds these tokens and no others, each slot a visit of its own."""
    sum_experts: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = field(
        default=None, repr=False
    )
    """(x_TD, p_TE) -> sums over T of y and of p*y of every expert, float32 [E, D]; None: `run_experts` on all pairs"""
    pair_rows: int = 1 << 15
    """Rows of `run_experts` in one call when all experts see all tokens."""

    @property
    def tokens(self) -> int:
        """T"""
        return self.hidden_TD.shape[0]

    # -- visits

    @property
    def coalesced(self) -> bool:
        """True when `index_Tk` may hold -1."""
        return self.alias_E is not None

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
    def _edges(self) -> Tensor:
        edges = torch.arange(self.shape.experts + 1, dtype=torch.int32, device=self.expert_S.device)
        return torch.searchsorted(self.expert_S, edges, out_int32=True)  # unlike bincount, nothing waits

    @property
    def end_E(self) -> Tensor:
        """int32, visits of this expert and all before it"""
        return self._edges[1:]

    @cached_property
    def count_E(self) -> Tensor:
        """int64, visits of each expert"""
        return self._edges.diff().long()

    def sum_E(self, value_S: Tensor) -> Tensor:
        """float64 [E], sum of a value over each expert's visits; the same bytes on every run."""
        return torch.segment_reduce(value_S.double(), "sum", lengths=self.count_E, unsafe=True, initial=0)

    def max_E(self, value_S: Tensor) -> Tensor:
        """[E], largest of a non-negative value over each expert's visits; 0 without visits."""
        return torch.segment_reduce(value_S, "max", lengths=self.count_E, unsafe=True, initial=0)

    # -- what routed experts make of their tokens

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
    def inner_SF(self) -> Tensor:
        """h of each visit, act(gate) * up, what the down projection takes; in the model's dtype"""
        if self.visits is not None:
            return self._passed(self.visits.inner_SF)
        return self.run_inner(self.hidden_TD[self.row_S], self.expert_S)

    @cached_property
    def input_moments(self) -> ops.Moments:
        """Channel sums of x over each expert's visits, [E, D]"""
        return ops.moments(self.hidden_TD, self.row_S, self.end_E, self.gate_S)

    @cached_property
    def inner_moments(self) -> ops.Moments:
        """Channel sums of h over each expert's visits, [E, F]"""
        return ops.moments(self.inner_SF, None, self.end_E, self.gate_S)

    # -- what all experts make of all tokens

    @cached_property
    def _output_sums(self) -> tuple[Tensor, Tensor | None]:
        prob_TE = None if self.logits_TE is None else self.prob_TE
        if self.sum_experts is not None:
            return self.sum_experts(self.hidden_TD, prob_TE)
        y_ETD = self.all_output_ETD
        weighted = None if prob_TE is None else torch.einsum("te,etd->ed", prob_TE, y_ETD.float())
        return y_ETD.sum(1, dtype=torch.float32), weighted

    @property
    def output_sum_ED(self) -> Tensor:
        """float32, sum over all tokens of every expert's y"""
        return self._output_sums[0]

    @property
    def weighted_output_sum_ED(self) -> Tensor:
        """float32, sum over all tokens of softmax(z) times every expert's y"""
        return self._output_sums[1]

    @cached_property
    def all_output_ETD(self) -> Tensor:
        """y of every expert for every token, in the model's dtype: E*T*D elements, so chunks are small."""
        return self.of_all(self.run_experts, self.hidden_TD)

    def of_all(self, run: Run, hidden_TD: Tensor) -> Tensor:
        """`run_experts` or `run_inner` for every expert on each of these tokens, [E, T, ...]."""
        per_call = max(1, self.pair_rows // max(1, len(hidden_TD)))
        experts = torch.arange(self.shape.experts, dtype=torch.int32, device=hidden_TD.device).split(per_call)
        return torch.cat([_run_all(run, hidden_TD, some_e) for some_e in experts])

    # -- the router

    @cached_property
    def score_TE(self) -> Tensor:
        """float32 full score vector before any selection: sigmoid for sigmoid routers, else softmax over
        all rows.
        """
        return self.logits_TE.float().sigmoid() if self.shape.score == "sigmoid" else self.softmax_TE

    @cached_property
    def softmax_TE(self) -> Tensor:
        """float32 softmax over all router rows, whatever the router's own score"""
        return self.logits_TE.float().softmax(-1)

    @property
    def prob_TE(self) -> Tensor:
        """`softmax_TE` of stored experts: rows of one expert added"""
        return self.folded(self.softmax_TE)

    @cached_property
    def order_Tk(self) -> Tensor:
        """int64, slots of each token by falling weight, those that are no visit last"""
        weight_Tk = self.weight_Tk.masked_fill(self.index_Tk < 0, -torch.inf)
        return weight_Tk.argsort(dim=-1, descending=True, stable=True)

    @cached_property
    def chosen_TE(self) -> Tensor:
        """bool, router rows that each token chose"""
        return torch.zeros_like(self.logits_TE, dtype=torch.bool).scatter_(1, self.choice_Tk, True)

    def folded(self, value_TE: Tensor) -> Tensor:
        """Values of router rows added up to those of the stored experts they stand for, in the last dimension."""
        if self.alias_E is None:
            return value_TE
        stored = torch.arange(self.shape.experts, device=value_TE.device)
        return value_TE @ (self.alias_E[:, None] == stored).to(value_TE.dtype)


def _run_all(run: Run, hidden_TD: Tensor, some_e: Tensor) -> Tensor:
    rows = run(hidden_TD.repeat(len(some_e), 1), some_e.repeat_interleave(len(hidden_TD)))
    return rows.unflatten(0, (len(some_e), len(hidden_TD)))


def used_TE(index_Tk: Tensor, experts: int) -> Tensor:
    """bool [T, E], stored experts that each token visits; -1 is none."""
    index_Tk = index_Tk.long()
    index_Tk = index_Tk.masked_fill(index_Tk < 0, experts)
    mask = torch.zeros(len(index_Tk), experts + 1, dtype=torch.bool, device=index_Tk.device)
    return mask.scatter_(1, index_Tk, True)[:, :experts]
