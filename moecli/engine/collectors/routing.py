"""Statistics of the router: who is chosen, how surely, and with whom."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from moecli.engine.collectors.base import Collector, LayerShape, Total
from moecli.engine.collectors.grouped import Grouped, used_TE
from moecli.engine.fetch import fetched


class Count(Total):
    """Tokens routed to each expert: n_i = |X_i|. int64 [E], sum."""

    name = "count"
    routed = True
    dtype = torch.int64

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.count_E


class GateSum(Total):
    """Sum of the weights really used: sum over X_i of g_ti. float64 [E], sum."""

    name = "gate_sum"
    routed = True

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.gate_S)


class GateSq(Total):
    """Sum over X_i of g_ti^2. float64 [E], sum. Spread of the weights; p^2-weighted energies divide by it."""

    name = "gate_sq"
    routed = True

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.sum_E(grouped.gate_S.double().square())


class ProbSum(Total):
    """Soft count: sum over all tokens of the full score p_ti, chosen or not; sigmoid(z) for sigmoid
    routers, softmax(z) for all others; no selection bias, no renormalisation. float64 [router rows], sum.

    SEER-MoE (2404.05089). The sum over routed tokens only, which PMQ uses, is `prob_routed`.
    """

    name = "prob_sum"
    routed = False
    needs = frozenset({"logits"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.rows,)

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.score_TE.sum(0, dtype=torch.float64)


class ProbRouted(Total):
    """Sum over X_i of the full score p_ti, before selection and renormalisation, as in `prob_sum`. float64 [E], sum.
    PMQ's expert weight w (MC-MoE, 2410.06270, section 3.2).
    """

    name = "prob_routed"
    routed = True
    needs = frozenset({"logits"})

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.folded((grouped.score_TE * grouped.chosen_TE).sum(0, dtype=torch.float64))


class Entropy(Total):
    """Sum over all tokens of the entropy of softmax(z_t) over the router's rows, in nats. float64 [1], sum.
    Routing entropy of a model is this over tokens and ln E.
    """

    name = "entropy"
    routed = False
    needs = frozenset({"logits"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (1,)

    def of(self, grouped: Grouped) -> Tensor:
        p_TE = grouped.softmax_TE
        return torch.special.entr(p_TE).sum(dtype=torch.float64)[None]


class LogitGram(Total):
    """Sum over all tokens of z_t z_t^T. float64 [router rows, router rows], sum. M-SMoE (2310.01334)."""

    name = "logit_gram"
    routed = False
    needs = frozenset({"logits"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.rows, shape.rows)

    def of(self, grouped: Grouped) -> Tensor:
        logits = grouped.logits_TE.float()
        return logits.T @ logits


class CoActivation(Total):
    """C_ij: tokens that were routed to both i and j; the diagonal is `count`. int64 [E, E], sum.
    Lift and pointwise mutual information of pairs come from it.
    """

    name = "coactivation"
    routed = False
    dtype = torch.int64

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.experts)

    def of(self, grouped: Grouped) -> Tensor:
        used = used_TE(grouped.index_Tk, grouped.shape.experts)
        return _together(used, used)


class Transition(Total):
    """N_ij: tokens routed to expert i of the MoE layer before and to j of this one. int64 [E before, E], sum;
    [0, E] in the first MoE layer.
    """

    name = "transition"
    routed = False
    needs = frozenset({"before"})
    dtype = torch.int64

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.before, shape.experts)

    def of(self, grouped: Grouped) -> Tensor:
        here = used_TE(grouped.index_Tk, grouped.shape.experts)
        if grouped.before_Tk is None:
            return here.new_zeros(0, grouped.shape.experts, dtype=torch.int64)
        return _together(used_TE(grouped.before_Tk, grouped.shape.before), here)


def _together(left_TE: Tensor, right_TE: Tensor) -> Tensor:
    """Counts of pairs; exact in float32 up to 2^24 tokens a chunk."""
    return (left_TE.float().T @ right_TE.float()).long()


class _Trace(Collector):
    """One row a token, in the order of the text: `Grouped.token_T`. k columns, heaviest weight first."""

    reduce = "trace"
    routed = False
    dtype: ClassVar[torch.dtype]

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self._empty = torch.empty(0, shape.slots, dtype=self.dtype, device=device)
        self._rows: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def update(self, grouped: Grouped) -> None:
        self._rows.append(self.of(grouped).gather(1, grouped.order_Tk).to(self.dtype))
        self._tokens.append(grouped.token_T)

    @abstractmethod
    def of(self, grouped: Grouped) -> Tensor:
        """[T, k], slots in the model's order"""

    def result(self) -> dict[str, Tensor]:
        order = torch.cat([torch.empty(0, dtype=torch.int64), *self._tokens]).argsort()
        return {self.name: fetched(torch.cat([self._empty, *self._rows]))[order]}


class TopkIdx(_Trace):
    """Routing trace: stored experts of each token, by falling weight; -1 where an alias made two slots one visit.
    int16 [T, k], one after the other. Read by routing analysis: local consistency (2505.16056), caches,
    specialisation. 16 bytes a token and layer with k = 8.
    """

    name = "topk_idx"
    dtype = torch.int16

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.index_Tk


class TopkW(_Trace):
    """The weights g of `topk_idx`, as the model multiplies with them; 0 where there is no visit. float16 [T, k]."""

    name = "topk_w"
    dtype = torch.float16

    def of(self, grouped: Grouped) -> Tensor:
        return grouped.weight_Tk.masked_fill(grouped.index_Tk < 0, 0)
