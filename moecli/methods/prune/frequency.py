"""Keep the experts that were used most. A baseline every other method should beat.

score_j = |X_j|, the number of tokens routed to expert j.

Source: the usual baseline, for example arXiv 2510.13999, section 4.

- run: prune/frequency
  with: {keep: 64}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.prune import Prune, drop_experts, reads


class Frequency(Prune):
    """Options of `prune/frequency`."""


@stage("prune/frequency", version=2, needs=reads())
def frequency(opt: Frequency, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    return drop_experts(model, stats, {layer: s.count_E.double() for layer, s in stats.items()}, opt, ctx)
