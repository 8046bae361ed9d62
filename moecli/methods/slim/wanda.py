"""Set the weights to zero that are smallest beside the inputs they meet (Wanda): unstructured, or N:M.

score_ij = |W_ij| sqrt(mean over the tokens routed to the expert of x_j^2), x what goes into the matrix: the layer's
input for gate and up, the gated activation for down. The lowest scores of each output go, or of each group of N:M; the
others stay as they are. Experts that no token reached are ranked by |W_ij|.

Only routed experts, and statistics are those of the source model (in the authors' code each layer sees pruned layers
below it, and attention is pruned too). The model gets no smaller: zeros are stored like any weight.

Source: arXiv 2306.11695, Eq. 1 and section 4 (N:M).

- run: slim/wanda
  with: {sparsity: "2:4"}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.matrices import Scored, drop_weights


class Wanda(Scored):
    """Options of `slim/wanda`."""


@stage("slim/wanda", version=1, needs=("x2", "h2"))
def wanda(opt: Wanda, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    mean = {
        layer: {into: s[f"{into}2"] / s.count_E.clamp(min=1)[:, None] for into in ("x", "h")}
        for layer, s in stats.items()
    }
    return drop_weights(model, mean, {layer: s.count_E > 0 for layer, s in stats.items()}, opt, ctx)
