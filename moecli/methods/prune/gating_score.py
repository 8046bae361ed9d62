"""Keep the experts that the router gives most weight. A baseline.

score_j = sum over tokens t routed to j of g_tj, the weight the model really multiplies with.

Source: the gating-score baseline of arXiv 2504.06792.

- run: prune/gating-score
  with: {keep: 64}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.prune import Prune, drop_experts, reads


class GatingScore(Prune):
    """Options of `prune/gating-score`."""


@stage("prune/gating-score", version=1, needs=reads())
def gating_score(opt: GatingScore, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    return drop_experts(model, stats, {layer: s.gate_sum_E for layer, s in stats.items()}, opt, ctx)
