"""Set the weights to zero that are smallest beside their inputs as the router weighs them (MoE-Pruner).

score_ij = |W_ij| sqrt(sum over the tokens t routed to the expert of (g_t x_tj)^2), g_t the weight the model multiplies
the expert's output with, x what goes into the matrix: the layer's input for gate and up, the gated activation for
down. The lowest scores of each output go, or of each group of N:M; the others stay as they are. Experts that no token
reached are ranked by |W_ij|.

Only the pruning: the paper's distillation from the dense model afterwards is not part of it. Only routed experts, and
statistics are those of the source model. The model gets no smaller: zeros are stored like any weight.

Source: arXiv 2410.12013.

- run: slim/moe-pruner
  with: {sparsity: 0.5}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.matrices import Scored, drop_weights


class MoePruner(Scored):
    """Options of `slim/moe-pruner`."""


@stage("slim/moe-pruner", version=1, needs=("px2", "ph2"))
def moe_pruner(opt: MoePruner, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    weighed = {layer: {"x": s["px2"], "h": s["ph2"]} for layer, s in stats.items()}
    return drop_weights(model, weighed, {layer: s.count_E > 0 for layer, s in stats.items()}, opt, ctx)
