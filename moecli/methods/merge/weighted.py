"""Average the experts of each group, weighted by how often each was used.

W = sum_i share_i W_i for gate, up and down, accumulated in fp32 and cast once. A group that no token reached is
averaged uniformly.

Source: HC-SMoE (arXiv 2410.08589, section 3.3) and M-SMoE (2310.01334) without alignment. The router keeps all its
rows, as in the papers; add `router/row-drop` for a model that loads everywhere.

- run: merge/weighted
"""

from __future__ import annotations

from typing import Literal

import torch

from moecli.core.artifacts import Checkpoint, ExpertPlan, ExpertWeights, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.methods.merge import Merge, merge_experts
from moecli.ops.averaging import weighted_mean


class Weighted(Merge):
    """Options of `merge/weighted`."""

    weights: Literal["frequency", "uniform"] = "frequency"
    """Shares inside a group: routing frequency as the plan has it, or equal."""


@stage("merge/weighted", version=1)
def weighted(opt: Weighted, plan: ExpertPlan, model: Checkpoint, ctx: Context) -> Checkpoint:
    family = family_of(model.config)

    def merge(layer: int, layer_plan: LayerPlan, group: int) -> ExpertWeights:
        members = layer_plan.members(group)
        share = layer_plan.share_E[members]
        if opt.weights == "uniform":
            share = torch.full_like(share, 1 / len(members))
        experts = [family.read_expert(model, layer, expert) for expert in members]
        return ExpertWeights(*(_mean(parts, share) for parts in zip(*experts, strict=True)))

    return merge_experts(model, plan, merge, ctx)


def _mean(parts: tuple[torch.Tensor | None, ...], share: torch.Tensor) -> torch.Tensor | None:
    if parts[0] is None:
        return None
    return weighted_mean(torch.stack([p for p in parts if p is not None]), share)
