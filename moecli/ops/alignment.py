"""A router rounded to few bits so that its best experts keep their probabilities (EAQuant's router alignment).

Letters: T tokens, E router rows, D model width, R clip ratios, K experts that count for a token.

Rows are rounded symmetrically with one scale each, r max|w| / ((2^bits - 1) / 2), r a clip ratio. What is minimised is

    KL = mean over tokens of sum over i in top_t of p_ti (log p_ti - log q_ti)

p and q the softmax over all rows of logits before and after, top_t the K best before. For K < E it is no divergence of
distributions: more q on top_t than p had makes it negative.

Source: arXiv 2506.13329.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moecli.ops.pack import dequantize, rounded_again

RATIOS = 101
LEAST = 0.35
"""Clip ratios are so many from 1 down to this one: of equal ones the largest is taken."""
PASSES = 8
"""Times that `each` goes through the rows at most."""


class Inputs(NamedTuple):
    """What a router is judged by."""

    x_TD: Tensor
    bias_E: Tensor | None
    """Added to logits, and not rounded"""
    top_TK: Tensor
    """int64, router rows that count for each token"""
    logits_TE: Tensor
    """float32, of the weights as they were"""

    def logits(self, weight_ED: Tensor) -> Tensor:
        logits_TE = self.x_TD.float() @ weight_ED.float().T
        return logits_TE if self.bias_E is None else logits_TE + self.bias_E.float()


def ratios(device: torch.device | None = None) -> Tensor:
    return torch.linspace(1.0, LEAST, RATIOS, device=device)


def clipped(weight_ED: Tensor, ratio_E: Tensor, bits: int) -> Tensor:
    """What is left of the rows with these clip ratios, in their dtype; scales are rounded to it too. A row of zeros
    stays.
    """
    scale_E1 = (weight_ED.float().abs().amax(-1) / ((2**bits - 1) / 2) * ratio_E).to(weight_ED.dtype)[:, None]
    scale_E1 = torch.where(scale_E1 == 0, 1.0, scale_E1).to(weight_ED.dtype)
    return dequantize(rounded_again(weight_ED.float(), scale_E1, bits), scale_E1)


def divergence(seen: Inputs, logits_TE: Tensor) -> Tensor:
    """KL as above, float64, of logits after rounding."""
    p_TK, q_TK = (z.double().log_softmax(-1).gather(-1, seen.top_TK) for z in (seen.logits_TE, logits_TE))
    return (p_TK.exp() * (p_TK - q_TK)).sum(-1).mean()


def nearest(weight_ED: Tensor, bits: int) -> Tensor:
    """The ratio of each row [E] that leaves the least squared error of its weights."""
    errors_RE = [
        (clipped(weight_ED, r.expand(len(weight_ED)), bits).float() - weight_ED.float()).square().sum(-1)
        for r in ratios(weight_ED.device)
    ]
    return ratios(weight_ED.device)[torch.stack(errors_RE).argmin(0)]


def joint(weight_ED: Tensor, seen: Inputs, bits: int) -> Tensor:
    """One ratio for all rows, the best by KL, repeated [E]: what a search does that adds one score to every row."""
    found = ratios(weight_ED.device)
    losses_R = [divergence(seen, seen.logits(clipped(weight_ED, r.expand(len(weight_ED)), bits))) for r in found]
    return found[torch.stack(losses_R).argmin()].repeat(len(weight_ED))


def each(weight_ED: Tensor, seen: Inputs, bits: int) -> Tensor:
    """A ratio for each row [E]: from `joint` on row after row takes the best one while the others stay, until none
    changes or PASSES are done. KL never rises.

    A row e moves KL by the two terms in which its logit stands, so that a try costs T and no softmax:
    mean over t of P_t log(sum_{i != e} exp z_ti + exp z_te) - [e in top_t] p_te z_te, P_t the sum of p over top_t.
    """
    choices_R, ratio_E = ratios(weight_ED.device), joint(weight_ED, seen, bits)
    logits_TE = seen.logits(clipped(weight_ED, ratio_E, bits)).double()
    p_TE = torch.zeros_like(logits_TE)
    p_TE.scatter_(-1, seen.top_TK, seen.logits_TE.double().softmax(-1).gather(-1, seen.top_TK))
    mass_T = p_TE.sum(-1)
    for _ in range(PASSES):
        before_E = ratio_E.clone()
        for e in range(len(weight_ED)):
            rows_RD = clipped(weight_ED[e].expand(RATIOS, -1), choices_R, bits)
            z_TR = seen._replace(bias_E=None).logits(rows_RD).double()
            if seen.bias_E is not None:
                z_TR += seen.bias_E[e]
            rest_TE = logits_TE.clone()
            rest_TE[:, e] = -torch.inf
            rest_T = rest_TE.logsumexp(-1)
            loss_R = mass_T @ torch.logaddexp(rest_T[:, None], z_TR) - p_TE[:, e] @ z_TR
            now = mass_T @ logits_TE.logsumexp(-1) - p_TE[:, e] @ logits_TE[:, e]
            best = loss_R.argmin()
            if loss_R[best] < now:
                ratio_E[e], logits_TE[:, e] = choices_R[best], z_TR[:, best]
        if torch.equal(before_E, ratio_E):
            break
    return ratio_E
