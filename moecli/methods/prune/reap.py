"""Drop the experts whose routed outputs weigh least, by router-weighted activation (REAP).

score_j = (1/|X_j|) sum over tokens t routed to j of g_tj * ||y_tj||_2, where g is the weight the model really
multiplies with (after score function, renormalisation and scaling) and y the expert's un-gated output.
Experts that no token reached score 0 and go first.

Source: arXiv 2510.13999, Eq. 9. Differs from the authors' code where that recomputes routing from raw logits:
selection bias, group limits and sigmoid scores are honoured here.

- run: prune/reap
  with: {keep: 64}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.prune import Prune, drop_experts, reads


class Reap(Prune):
    """Options of `prune/reap`."""


@stage("prune/reap", version=2, needs=reads("gean_sum"))
def reap(opt: Reap, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    score = {layer: s["gean_sum"] / s.count_E.clamp(min=1) for layer, s in stats.items()}
    return drop_experts(model, stats, score, opt, ctx)
