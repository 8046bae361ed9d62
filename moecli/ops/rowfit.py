"""Fit a router of K rows to what a router of more rows did, from its inputs: convex problems, no model in memory.

x_t [D] are router inputs, W [K, D] the rows, b [K] an additive logit bias where the router has one (a constant last
feature here).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def grouped_lse(logits_TE: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """log sum exp of the logits of each group's members, [T, K]: a softmax router's logit of the whole group."""
    outside_EK = torch.nn.functional.one_hot(group_E, groups) == 0
    spread_TEK = logits_TE[..., None].masked_fill(outside_EK, float("-inf"))
    return spread_TEK.logsumexp(1)


def grouped_max(score_TE: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """The largest score of each group's members, [T, K]."""
    start_TK = score_TE.new_full((len(score_TE), groups), float("-inf"))
    return start_TK.scatter_reduce_(1, group_E.expand_as(score_TE), score_TE, "amax")


def grouped_total(score_TE: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """The sum of the scores of each group's members, [T, K]."""
    return score_TE @ torch.nn.functional.one_hot(group_E, groups).to(score_TE)


def grouped_sum(weight_Tk: Tensor, expert_Tk: Tensor, group_E: Tensor, groups: int) -> Tensor:
    """[T, K]: what an alias map gives each group: weights of slots on members of one group add up."""
    total_TK = weight_Tk.new_zeros(len(weight_Tk), groups)
    return total_TK.scatter_add_(1, group_E[expert_Tk], weight_Tk)


def fit_rows(
    x_TD: Tensor,
    target_TK: Tensor,
    start_KD: Tensor,
    *,
    softmax: bool,
    ridge: float,
    free_K: Tensor | None = None,
    rounds: int = 100,
) -> Tensor:
    """Rows W that minimise mean_t KL(target_t || softmax(W x_t)) + lambda/2 |W - start|^2, float32 [K, D].

    With `softmax=False` each row is a logistic regression of its own: binary cross entropy with targets in [0, 1].
    Rows outside `free_K` (bool [K], all by default) stay as they start, and take part. lambda is `ridge` times the mean
    of x^2. Newton's matrix is replaced by a bound of it (Boehning 1992), c X^T X/T + lambda I with c = 1/2 for the
    softmax and 1/4 for logistic rows: it is factored once, and each of the `rounds` accelerated steps is two products.
    """
    x, target, start = x_TD.float(), target_TK.float(), start_KD.float()
    free_K1 = torch.ones(len(start), 1) if free_K is None else free_K[:, None].float()
    free_K1 = free_K1.to(x)
    second_DD = (x.T @ x).double() / len(x)
    scale = float(ridge * second_DD.diagonal().mean())
    bound_DD = (0.5 if softmax else 0.25) * second_DD
    bound_DD.diagonal().add_(max(scale, 1e-30))
    step_DD = torch.linalg.inv(bound_DD).float()
    mass_T1 = target.sum(-1, keepdim=True)

    def slope(rows_KD: Tensor) -> Tensor:
        logits = x @ rows_KD.T
        guess = logits.softmax(-1) * mass_T1 if softmax else logits.sigmoid()
        return ((guess - target).T @ x / len(x) + scale * (rows_KD - start)) * free_K1

    return _descend(start, slope, step_DD, rounds)


def _descend(start_KD: Tensor, slope: Callable[[Tensor], Tensor], step_DD: Tensor, rounds: int) -> Tensor:
    """Nesterov's steps along the inverse of the bound; momentum starts anew when it points uphill (O'Donoghue and
    Candes 2015).
    """
    best_KD = ahead_KD = start_KD
    momentum = torch.ones((), device=start_KD.device)
    for _ in range(rounds):
        slope_KD = slope(ahead_KD)
        found_KD = ahead_KD - slope_KD @ step_DD
        uphill = (slope_KD * (found_KD - best_KD)).sum() > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead_KD = found_KD + torch.where(uphill, 0.0, (momentum - 1) / following) * (found_KD - best_KD)
        best_KD, momentum = found_KD, following
    return best_KD
