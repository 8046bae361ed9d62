"""Keep the experts with the largest probability summed over all tokens, chosen or not (SEER-MoE's soft count).

score_j = sum over all tokens t of p_tj: softmax of the router's logits, or their sigmoid for sigmoid routers, without
selection bias and renormalisation.

Source: arXiv 2404.05089. Unverified: the formula follows the paper's description of heavy-hitter counting, its code was
not at hand; its fine-tuning step is not part of this method.

- run: prune/soft-count
  with: {keep: 64}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.prune import Prune, drop_experts, reads


class SoftCount(Prune):
    """Options of `prune/soft-count`."""


@stage("prune/soft-count", version=1, needs=reads("prob_sum"))
def soft_count(opt: SoftCount, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    return drop_experts(model, stats, {layer: s["prob_sum"] for layer, s in stats.items()}, opt, ctx)
