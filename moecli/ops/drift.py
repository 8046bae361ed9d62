"""How far the routing of one layer has moved, counted over tokens. Sums stay on the device until `result`.

T tokens, E router rows of the source, R router rows of the model, M experts the model stores, k experts per token (of
either). A source expert is *kept* while a router row of the model stands for it, and has a *home* while some stored
expert holds its weights, alone or merged with others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowMap:
    """What became of the source's experts in one layer."""

    source_R: Tensor
    """int64 [R] the source expert each router row of the model stands for"""
    stored_R: Tensor
    """int64 [R] the stored expert behind each router row of the model"""
    home_E: Tensor
    """int64 [E] the stored expert that holds each source expert now, -1 where none does"""
    stored: int
    """M"""

    def to(self, device: torch.device) -> RowMap:
        return RowMap(self.source_R.to(device), self.stored_R.to(device), self.home_E.to(device), self.stored)


class Drift:
    """Of the model's choices (index_Tk) against the source's on the same tokens.

    top1         share of tokens whose largest weight went to the same source expert
    jaccard      mean over tokens of |A & B| / |A | B|; A source experts chosen by the source, B source experts that the
                 rows chosen by the model stand for: a choice that was dropped counts against
    jaccard_home the same with both sets as stored experts, the source's choices replaced by their homes and those
                 without one left out; tokens with no home at all are left out, None when all are
    router_kl    mean of KL(p || q) in nats, p the source's router softmax renormalised over the kept experts, q the
                 model's over its rows; None when a router does not show its logits. Softmax of raw logits whatever the
                 model's score function: corrections, groups and sigmoid scores are in the sets, not in this number
    kept_weight  share of the source's gate weight that went to experts that are kept
    home_weight  ... that have a home
    """

    def __init__(self, rows: RowMap) -> None:
        self._rows = rows
        self._sums: dict[str, Tensor] = {}
        self._logits = True

    def add(
        self,
        source: tuple[Tensor, Tensor, Tensor | None],
        model: tuple[Tensor, Tensor, Tensor | None],
    ) -> None:
        """(index_Tk, weight_Tk, logits or None) of either; the k may differ."""
        (index, weight, logits), (index_r, weight_r, logits_r) = source, model
        rows, experts, stored = self._rows, len(self._rows.home_E), self._rows.stored
        kept_E = torch.zeros(experts, dtype=torch.bool, device=index.device)
        kept_E[rows.source_R] = True
        weight = weight.double()
        total_T = weight.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
        home = rows.home_E[index]
        best, best_r = (
            i.gather(-1, w.argmax(-1, keepdim=True))[:, 0] for i, w in ((index, weight), (index_r, weight_r))
        )
        jaccard_T = _jaccard(_set(index, experts), _set(rows.source_R[index_r], experts))
        home_T = (home >= 0).any(-1)
        home_jaccard_T = _jaccard(_set(home, stored), _set(rows.stored_R[index_r], stored))
        found = {
            "tokens": torch.ones_like(total_T),
            "top1": rows.source_R[best_r] == best,
            "jaccard": jaccard_T,
            "home_tokens": home_T,
            "jaccard_home": home_jaccard_T * home_T,
            "kept_weight": (weight * kept_E[index]).sum(-1) / total_T,
            "home_weight": (weight * (home >= 0)).sum(-1) / total_T,
        }
        if logits is None or logits_r is None:
            self._logits = False
        else:
            p, q = logits[:, rows.source_R].double().log_softmax(-1), logits_r.double().log_softmax(-1)
            found["router_kl"] = (p.exp() * (p - q)).sum(-1)
        for name, value_T in found.items():
            self._sums[name] = self._sums.get(name, 0) + value_T.double().sum()

    def result(self) -> dict[str, float | None]:
        """Means over all tokens added."""
        sums = {name: float(value) for name, value in self._sums.items()}
        tokens, home = sums.pop("tokens"), sums.pop("home_tokens")
        homes = sums.pop("jaccard_home")
        means: dict[str, float | None] = {name: value / tokens for name, value in sums.items()}
        if not self._logits:
            means["router_kl"] = None
        return means | {"jaccard_home": homes / home if home else None}


def _set(index_Tk: Tensor, size: int) -> Tensor:
    """bool [T, size]: what is chosen; -1 is nothing."""
    chosen = torch.zeros(len(index_Tk), size + 1, dtype=torch.bool, device=index_Tk.device)
    chosen.scatter_(1, index_Tk.where(index_Tk >= 0, size), True)
    return chosen[:, :size]


def _jaccard(a_TE: Tensor, b_TE: Tensor) -> Tensor:
    return (a_TE & b_TE).sum(-1).double() / (a_TE | b_TE).sum(-1).clamp(min=1)


class RelativeError:
    """||found - wanted|| / ||wanted|| over all tokens added (Frobenius)."""

    def __init__(self) -> None:
        self._off: Tensor | float = 0.0
        self._all: Tensor | float = 0.0

    def add(self, wanted_TD: Tensor, found_TD: Tensor) -> None:
        wanted = wanted_TD.float()
        self._off = self._off + (found_TD.float() - wanted).square().sum(dtype=torch.float64)
        self._all = self._all + wanted.square().sum(dtype=torch.float64)

    def result(self) -> float:
        return float(self._off / self._all) ** 0.5
