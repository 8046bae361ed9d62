"""Keep the experts whose routed outputs are largest (expert activation norm: EAN, MAN, MSAN).

Over the tokens t routed to expert j, y its un-gated output and g the weight the model really multiplies with:

    form: sum            EAN           sum of ||y_tj||
    form: mean           MAN           mean of ||y_tj||
    form: mean_square    MSAN          mean of ||y_tj||^2
    form: weighted_sum   weighted EAN  sum of g_tj ||y_tj||

Experts that no token reached score 0 and go first. `prune/reap` is the mean of g_tj ||y_tj||.

Source: arXiv 2504.05586 (EAN); arXiv 2606.15716 (MAN, MSAN: second-hand, the exponents as restated there).

- run: prune/ean
  with: {keep: 64, form: mean}
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.prune import Prune, drop_experts, reads

_STATISTIC = {"sum": "ean_sum", "mean": "ean_sum", "mean_square": "ean_sq", "weighted_sum": "gean_sum"}


class Ean(Prune):
    """Options of `prune/ean`."""

    form: Literal["sum", "mean", "mean_square", "weighted_sum"] = "sum"
    """What is made of the norms of an expert's outputs."""


@stage("prune/ean", version=1, needs=lambda opt: reads(_STATISTIC[opt.form])(opt))
def ean(opt: Ean, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    return drop_experts(model, stats, {layer: _score(s, opt.form) for layer, s in stats.items()}, opt, ctx)


def _score(stats: LayerStats, form: str) -> Tensor:
    """float64 [E]"""
    total_E = stats[_STATISTIC[form]]
    return total_E / stats.count_E.clamp(min=1) if form in ("mean", "mean_square") else total_E
