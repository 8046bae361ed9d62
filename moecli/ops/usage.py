"""How evenly, with whom and on what a layer's experts are used: measures of counts.

Standard definitions; letters: E experts, T tokens, k visits a token, G data sets ("domains"), V token types. All take
integer counts and return float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMOOTHING = 0.5
"""Added to the count of a pair before its PMI is taken: the logarithm of 0 is none."""
COMMON = 20
"""A token type counts as common from this many uses on."""


class Load(NamedTuple):
    """Of f = count / sum(count). All None when nothing was routed."""

    entropy: float | None
    """-sum f ln f / ln E: 1 when all are used alike, 0 when one does everything"""
    imbalance: float | None
    """max f * E"""
    cv: float | None
    """std(f) / mean(f), of the population"""
    gini: float | None
    """0 when all are used alike, (E - 1) / E when one does everything"""


def load(count_E: Tensor) -> Load:
    """Balance of a layer's experts."""
    total, experts = int(count_E.sum()), len(count_E)
    if not total:
        return Load(None, None, None, None)
    f_E = count_E.double() / total
    entropy = float(torch.special.entr(f_E).sum()) / math.log(experts) if experts > 1 else 1.0
    rank_E = 2 * torch.arange(1, experts + 1, dtype=torch.float64) - experts - 1
    gini = float((rank_E * f_E.sort().values).sum()) / experts
    return Load(entropy, float(f_E.max()) * experts, float(f_E.std(correction=0)) * experts, gini)


class Pairs(NamedTuple):
    """How much oftener two experts meet than if they were chosen independently. [E, E], float64."""

    lift: Tensor
    """C * T / (count * count'); nan where an expert was never used"""
    pmi: Tensor
    """ln of the lift with 0.5 added to C; nan where an expert was never used"""


def pairs(together_EE: Tensor, left_E: Tensor, right_E: Tensor, tokens: int) -> Pairs:
    """Of counts of pairs: in one layer (both sides its counts), or of a layer and the next."""
    expected = left_E.double()[:, None] * right_E.double() / tokens
    expected = expected.where(expected > 0, torch.nan)
    return Pairs(together_EE / expected, ((together_EE + SMOOTHING) / expected).log())


class Domains(NamedTuple):
    """How far experts belong to data sets, [E] float64; nan for experts that were never used."""

    divergence: Tensor
    """KL(p(domain | expert) || p(domain)) in nats, p(domain) the share of all visits"""
    largest: Tensor
    """max over domains of the expert's frequency there over its frequency in all of them"""
    home: Tensor
    """int64, the domain where that is; -1 for an expert that was never used"""


def domains(count_GE: Tensor) -> Domains:
    """Of visits by data set and expert. A data set without visits counts for nothing."""
    count_GE = count_GE.double()
    visits_G, uses_E, visits = count_GE.sum(1), count_GE.sum(0), count_GE.sum()
    unused = uses_E == 0
    of_expert_GE = count_GE / uses_E.clamp(min=1)
    prior_G1 = (visits_G / visits.clamp(min=1))[:, None]
    ratio_GE = torch.where(prior_G1 > 0, of_expert_GE / prior_G1.clamp(min=1e-300), 0)
    divergence = torch.special.xlogy(of_expert_GE, ratio_GE).sum(0)
    largest, home = ratio_GE.max(0)
    return Domains(
        divergence.masked_fill(unused, torch.nan),
        largest.masked_fill(unused, torch.nan),
        home.masked_fill(unused, -1),
    )


class Vocabulary(NamedTuple):
    """The token type that an expert sees most, [E]."""

    share: Tensor
    """float64, its share of the expert's visits; nan for an expert that was never used"""
    type: Tensor
    """int64, its id; -1 when the expert saw no common type"""


def vocabulary(index_Tk: Tensor, id_T: Tensor, experts: int, common: int = COMMON) -> Vocabulary:
    """Of a trace and the token ids behind it; only types that occur `common` times in the text compete."""
    types, rank_T, uses_V = id_T.unique(return_inverse=True, return_counts=True)
    expert_S = index_Tk.long().flatten()
    rank_S = rank_T.repeat_interleave(index_Tk.shape[1])[expert_S >= 0]
    expert_S = expert_S[expert_S >= 0]
    count_EV = torch.bincount(expert_S * len(types) + rank_S, minlength=experts * len(types)).reshape(experts, -1)
    visits_E = count_EV.sum(1)
    most, best = count_EV.masked_fill(uses_V < common, 0).max(1)
    return Vocabulary(
        (most / visits_E.clamp(min=1).double()).masked_fill(visits_E == 0, torch.nan),
        types[best].masked_fill(most == 0, -1),
    )


def kurtosis(value_E: Tensor) -> float | None:
    """Fourth central moment over the squared variance, 3 for a normal distribution; None when all are equal."""
    gap = value_E.double() - value_E.double().mean()
    variance = gap.square().mean()
    return float(gap.pow(4).mean() / variance.square()) if variance > 0 else None
