"""Make the router agree with the experts that are left.

A merged model keeps all router rows and an alias map: that form needs no stage here, and it is what papers evaluate
(their code points every slot of a group at one module; `export: expanded` writes such a model out at full size).
The stages here give each merged expert one row, so that the model loads everywhere. Routing changes by that, and each
stage measures how much: `router_gap` in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertPlan, ExpertWeights, LayerPlan, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.families import Family, family_of, forecast_row_drop
from moecli.ops.averaging import mixed, share_matrix
from moecli.ops.rowfit import grouped_sum

GAP_TOKENS = 512
"""Tokens that the gap is measured on."""
_GAP_CHUNK = 64
"""Tokens that go through all experts at a time."""


class StockRouter(Options):
    """Options of a stage that gives each merged expert one router row."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.router_rows == model.experts:
            yield Problem(
                "",
                f"the router has one row for each of its {model.experts} experts, so there is none to drop",
                hint="put it below a `merge/...` stage, or leave it out",
            )
        elif model.experts < model.top_k:
            yield Problem(
                "",
                f"the router picks {model.top_k} experts per token, only {model.experts} are left",
                hint=f"cluster with `keep: {model.top_k}` or more",
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        if model.facts.groups > 1 and not model.within_groups:
            raise StageFailed(
                f"one row for each merged expert would move experts across the router's {model.facts.groups} groups",
                hint="write `routing_groups: keep` in the clustering, or leave this stage out",
            )
        if model.uneven:
            raise StageFailed(
                "layers keep different numbers of experts, and one row for each needs one number",
                hint="write `alloc: uniform` or `uniform: true` in the clustering, or leave this stage out",
            )
        return forecast_row_drop(model)


Rows = Mapping[str, Tensor]
"""Role (`weight`, `bias`, `correction`) -> one entry for each merged expert: [K, D] for the weight, [K] otherwise."""


class Router:
    """The router of an alias model, one layer at a time, in fp32."""

    def __init__(self, model: Checkpoint, layer: int, device: torch.device) -> None:
        self.family, self.layer, self._model = family_of(model.config), layer, model
        self.roles = {tensor.role: name for name, tensor in self.family.router_names(layer, model).items()}
        self.rows: Rows = {
            role: (value if role == "weight" else value.flatten()).to(device).float()
            for role, value in ((role, model.get(name)) for role, name in self.roles.items())
        }

    def logits(self, x_TD: Tensor) -> Tensor:
        """float32 [T, E]"""
        return logits_of(self.rows, x_TD)

    def experts(self, device: torch.device) -> ExpertWeights:
        """The merged experts, with a leading K, in fp32."""
        stored = self.family.read_experts(self._model, self.layer)
        return ExpertWeights(*(None if value is None else value.to(device).float() for value in stored))

    def dtype(self, role: str) -> torch.dtype:
        """The type that a role is stored in."""
        return getattr(torch, self._model.spec(self.roles[role]).dtype)

    def stored(self, role: str, value: Tensor) -> Tensor:
        """New rows in the stored type and form of a role: `[1, K]` where the file has `[1, E]`."""
        old = self._model.spec(self.roles[role])
        shape = (*old.shape[:-1], len(value)) if role != "weight" else value.shape
        return value.to("cpu", self.dtype(role)).view(shape).contiguous()


def logits_of(rows: Rows, x_TD: Tensor) -> Tensor:
    """Router logits as the model computes them, correction bias left out, float32."""
    logits = x_TD.float() @ rows["weight"].T
    return logits + rows["bias"] if "bias" in rows else logits


NewRows = Callable[[Router, LayerPlan], Rows]


def replace_rows(
    model: Checkpoint, plan: ExpertPlan, stats: CalibrationStats | None, new_rows: NewRows, ctx: Context
) -> Checkpoint:
    """One router row for each merged expert, as `new_rows` makes them; the alias map goes.

    Raises StageFailed when layers keep different numbers of experts, or a group spans routing groups.
    """
    counts = {layer_plan.experts for layer_plan in plan.values()}
    if len(counts) > 1:
        raise StageFailed(
            f"layers keep different numbers of experts ({min(counts)} to {max(counts)}); one count is needed",
            hint="cluster with the same `keep` in every layer",
        )
    family = family_of(model.config)
    for layer, layer_plan in plan.items():
        _refuse_spanning(layer_plan, family.facts.groups, layer)
    config = family.shrink_config(model.config, counts.pop())
    gaps: dict[int, tuple[float, float]] = {}
    with ctx.writer(model, config=config) as out:
        for layer in ctx.track(list(plan), "fitting router rows"):
            router = Router(model, layer, ctx.device)
            rows = new_rows(router, plan[layer])

            def write(part: PartWriter, router: Router = router, rows: Rows = rows) -> None:
                for role, value in rows.items():
                    part.put(router.roles[role], router.stored(role, value))
                part.drop(family.alias_name(router.layer), "router rows now match the experts")

            out.part(f"layer-{layer:03d}", write)
            if stats is not None and "tok_reservoir" in stats[layer].extra:
                x_TD = sample(stats, layer, ctx.device)[:GAP_TOKENS]
                gaps[layer] = gap(router, family_of(config), rows, plan[layer], x_TD)
    _tell(gaps, ctx)
    return out.checkpoint


def _refuse_spanning(plan: LayerPlan, blocks: int, layer: int) -> None:
    """Under group-limited routing merged experts must stay in their routing group, as many in each."""
    block_E = torch.arange(len(plan.group_E)) * blocks // len(plan.group_E)
    block_K = block_E[plan.lead_K]
    wrong = (block_K[plan.group_E] != block_E).nonzero().flatten()
    if len(wrong) or len(torch.bincount(block_K, minlength=blocks).unique()) > 1:
        what = f"expert {int(wrong[0])} is merged into another routing group" if len(wrong) else "routing groups differ"
        raise StageFailed(what, where=f"layer {layer}", hint="write `routing_groups: keep` in the clustering")


def mean_rows(router: Router, plan: LayerPlan, share_E: Tensor) -> Rows:
    """sum_i share_i row_i over the members of each group, of every router tensor."""
    share_KE = share_matrix(share_E, plan.group_E, plan.experts)
    return {role: mixed(value, share_KE) for role, value in router.rows.items()}


def with_ones(x_TD: Tensor, rows: Rows) -> Tensor:
    """Inputs as the rows see them: with a constant last feature where the router adds a bias to its logits."""
    return torch.cat((x_TD, torch.ones_like(x_TD[:, :1])), 1) if "bias" in rows else x_TD


def stacked(rows: Rows) -> Tensor:
    """[K, D], or [K, D + 1] with the logit bias as a last column."""
    return torch.cat((rows["weight"], rows["bias"][:, None]), 1) if "bias" in rows else rows["weight"]


def unstacked(fitted_KD: Tensor, rows: Rows) -> Rows:
    """`rows` with weight and logit bias from such a matrix; a correction bias stays."""
    new = {"weight": fitted_KD[:, : rows["weight"].shape[1]]} | ({"bias": fitted_KD[:, -1]} if "bias" in rows else {})
    return {**rows, **new}


def sample(stats: CalibrationStats, layer: int, device: torch.device) -> Tensor:
    """Inputs of the layer's experts [T, D] in fp32. MoecliError where statistics lack them."""
    return stats[layer]["tok_reservoir"].to(device).float()


def gap(router: Router, after: Family, rows: Rows, plan: LayerPlan, x_TD: Tensor) -> tuple[float, float]:
    """What one row for each expert changes against the alias map, in one layer, on inputs of the source model:
    (relative error of the routed sum, share of routing weight that lies elsewhere).
    """
    before = router.family.route(router.logits(x_TD), router.rows.get("correction"))
    alias_TK = grouped_sum(before.weights_Tk, before.experts_Tk, plan.group_E.to(x_TD.device), plan.experts)
    now = after.route(logits_of(rows, x_TD), rows.get("correction"))
    stock_TK = torch.zeros_like(alias_TK).scatter_(1, now.experts_Tk, now.weights_Tk)
    experts = router.experts(x_TD.device)
    wanted = error = 0.0
    for x, alias, stock in zip(*(value.split(_GAP_CHUNK) for value in (x_TD, alias_TK, stock_TK)), strict=True):
        y_KTD = router.family.expert_forward(experts, x)
        wanted += float(torch.einsum("tk,ktd->td", alias, y_KTD).square().sum())
        error += float(torch.einsum("tk,ktd->td", stock - alias, y_KTD).square().sum())
    moved = (stock_TK - alias_TK).clamp(min=0).sum() / alias_TK.sum()
    return (error / wanted) ** 0.5, float(moved)


def _tell(gaps: Mapping[int, tuple[float, float]], ctx: Context) -> None:
    if not gaps:
        ctx.note("how far routing is from the alias form was not measured: the statistics have no `tok_reservoir`")
        return
    error, moved = (sum(values) / len(gaps) for values in zip(*gaps.values(), strict=True))
    ctx.record("router_gap", {str(layer): {"output": e, "weight": m} for layer, (e, m) in gaps.items()})
    ctx.note(
        f"against the alias form (all router rows, what papers evaluate) the routed sum differs by {error:.1%} and "
        f"{moved:.1%} of routing weight lies elsewhere (mean of {len(gaps)} layers, {GAP_TOKENS} calibration tokens, "
        "each layer on the source's inputs)"
    )
