"""Router logits to weights and experts, for each score rule, as the models compute it.

Used as the oracle of tests and by methods that ask "where would this token go if the router were cut".
Weights are float32 [T, k], experts int64 [T, k]; the order of the k slots carries no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moecli.core.model import ScoreRule


class Routing(NamedTuple):
    """Where each token goes: weights float32, as the experts' outputs are multiplied; experts int64."""

    weights_Tk: Tensor
    experts_Tk: Tensor


@dataclass(frozen=True, slots=True)
class RouteRule:
    """How one model routes. A token may use `groups_used` of `groups` blocks of consecutive experts."""

    score: ScoreRule
    top_k: int
    renormalized: bool = False
    floor: float = 0.0
    """What keeps the renormalising sum away from zero ..."""
    floor_is: Literal["added", "minimum"] = "added"
    """... and how."""
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    group_score: Literal["max", "top2"] = "max"
    """What ranks groups: the best expert (DeepSeek-V2) or the sum of the best two (DeepSeek-V3)."""
    band: float = 0.0
    """sparsemixer: logits further (relatively) below the best get no probability: 2 x router_jitter_noise."""


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: RouteRule) -> Routing:
    """The routing of T tokens. `bias_E` is the correction bias, one row or one for each token: it moves the selection,
    never the weights.

    A router's own linear bias (gpt_oss) belongs into the logits. Logits of -inf mask dropped experts, except of
    sigmoid routers with a correction bias: cut their columns out instead.
    """
    logits_TE = logits_TE.float()
    match rule.score:
        case "topk_softmax":
            top_Tk, experts_Tk = logits_TE.topk(rule.top_k, dim=-1)
            return Routing(top_Tk.softmax(-1), experts_Tk)
        case "sparsemixer":
            return _sparsemixer(logits_TE, rule.band)
        case "softmax":
            score_TE = logits_TE.softmax(-1)
        case "sigmoid":
            score_TE = logits_TE.sigmoid()
    choice_TE = score_TE if bias_E is None else score_TE + bias_E.float().reshape(-1, score_TE.shape[-1])
    experts_Tk = _in_best_groups(choice_TE, rule).topk(rule.top_k, dim=-1).indices
    weights_Tk = score_TE.gather(-1, experts_Tk)
    if rule.renormalized:
        sum_T1 = weights_Tk.sum(-1, keepdim=True)
        weights_Tk = weights_Tk / (sum_T1.clamp(min=rule.floor) if rule.floor_is == "minimum" else sum_T1 + rule.floor)
    return Routing(weights_Tk * rule.scale, experts_Tk)


def _in_best_groups(choice_TE: Tensor, rule: RouteRule) -> Tensor:
    """`choice_TE` with every expert outside the best groups at -inf."""
    if rule.groups == 1:
        return choice_TE
    choice_TGe = choice_TE.unflatten(-1, (rule.groups, -1))
    if rule.group_score == "max":
        score_TG = choice_TGe.amax(-1)
    else:
        score_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
    used_TG = torch.zeros_like(score_TG, dtype=torch.bool)
    used_TG.scatter_(-1, score_TG.topk(rule.groups_used, dim=-1).indices, True)
    return choice_TGe.masked_fill(~used_TG[..., None], float("-inf")).flatten(-2)


def _sparsemixer(logits_TE: Tensor, band: float) -> Routing:
    """PhiMoE (arXiv 2409.12136, eq. 10 at inference): twice the best logit, softmaxed over those near it."""
    weights, experts = [], []
    left_TE = logits_TE
    for _ in range(2):
        best_T1, expert_T1 = left_TE.max(-1, keepdim=True)
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > band
        weights.append(left_TE.masked_fill(far_TE, float("-inf")).softmax(-1).gather(-1, expert_T1))
        experts.append(expert_T1)
        left_TE = left_TE.scatter(-1, expert_T1, float("-inf"))
    return Routing(torch.cat(weights, -1), torch.cat(experts, -1))
