"""Keep one router row for each merged expert: that of the group's lead. The result loads everywhere.

Rows of the leads stay in ascending original order, with their biases; the alias map goes. Routing changes: a group
gets the probability of its lead alone, where the alias form gives it the sum over its members.

Source: mode `row_drop` as REAM (arXiv 2604.04356) uses it after merging.

- run: router/row-drop
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, LayerPlan
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.router import Router, Rows, StockRouter, replace_rows


class RowDrop(StockRouter):
    """Options of `router/row-drop`: none."""


@stage("router/row-drop", version=2, needs=("tok_reservoir",))
def row_drop(
    opt: RowDrop, plan: ExpertPlan, model: Checkpoint, stats: CalibrationStats | None, ctx: Context
) -> Checkpoint:
    def rows(router: Router, layer_plan: LayerPlan) -> Rows:
        return {role: value[layer_plan.lead_K.to(value.device)] for role, value in router.rows.items()}

    return replace_rows(model, plan, stats, rows, ctx)
