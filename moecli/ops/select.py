"""Which experts stay, given a score for each."""

from __future__ import annotations

import torch
from torch import Tensor

from moecli.core.artifacts import DROPPED, LayerPlan


def keep_best(score_E: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The `keep` experts of highest score, ascending; ties keep the lower index.

    With `groups` > 1 (group-limited routing, contiguous blocks) the best keep/groups of each block stay, so that
    no expert changes its routing group (policy `per_group`). Raises ValueError on NaN scores and on a `keep` that
    `groups` does not divide.
    """
    if torch.isnan(score_E).any():
        bad = torch.isnan(score_E).nonzero().flatten().tolist()
        raise ValueError(f"score of expert {bad[0]} is NaN")
    if keep % groups or len(score_E) % groups:
        raise ValueError(f"{groups} routing groups do not divide {keep} of {len(score_E)} experts")
    block = len(score_E) // groups
    kept: list[int] = []
    for group in range(groups):
        scores = score_E[group * block : (group + 1) * block]
        order = torch.argsort(scores, descending=True, stable=True)[: keep // groups]
        kept += (order + group * block).tolist()
    return sorted(kept)


def keep_only(kept: list[int], of: int) -> LayerPlan:
    """The plan that keeps these experts, each alone in its group, in ascending order."""
    group_E = torch.full((of,), DROPPED, dtype=torch.int64)
    lead_K = torch.tensor(sorted(kept), dtype=torch.int64)
    group_E[lead_K] = torch.arange(len(kept))
    return LayerPlan(group_E, (group_E != DROPPED).float(), lead_K)
