"""One router row for each merged expert: what the rows are, and how far routing is from the alias map's."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, ExpertPlan, LayerPlan, LayerStats
from moecli.core.errors import MoecliError, StageFailed
from moecli.core.model import ModelSketch
from moecli.families import family_of
from moecli.families.adapter import load_model, moe_parts
from moecli.methods.merge.weighted import Weighted, weighted
from moecli.methods.router import Router, gap
from moecli.methods.router.lse_ridge import LseRidge, lse_ridge
from moecli.methods.router.refit import Refit, refit, target
from moecli.methods.router.row_drop import RowDrop, row_drop
from moecli.methods.router.row_mean import RowMean, row_mean

GROUPS = torch.tensor([0, 1, 1, 0, 2, 3, 2, 2])
SHARES = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.2, 1.0, 0.3, 0.5])
LEADS = torch.tensor([0, 2, 4, 5])
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "glm4_moe", "phimoe", "gpt_oss", "ernie4_5_moe"]
STAGES = {
    "row-drop": (row_drop, RowDrop()),
    "row-mean": (row_mean, RowMean()),
    "row-mean uniform": (row_mean, RowMean(weights="uniform")),
    "lse-ridge": (lse_ridge, LseRidge()),
    "refit": (refit, Refit()),
    "refit sum": (refit, Refit(mass="sum")),
}


def plan_for(model, groups=GROUPS, shares=SHARES, leads=LEADS):
    return ExpertPlan({layer: LayerPlan(groups, shares, leads) for layer in model.facts.moe_layers})


def stats_for(model, tokens=150):
    rng, count = torch.Generator().manual_seed(0), torch.full((8,), tokens // 4)
    return CalibrationStats({
        layer: LayerStats(tokens, count, count.double(),
                          {"tok_reservoir": torch.randn(tokens, model.facts.hidden, generator=rng)})
        for layer in model.facts.moe_layers
    })  # fmt: skip


def merged(model, context, plan=None):
    ctx = context("merged")
    weighted(Weighted(), plan or plan_for(model), model, None, ctx)
    return ctx.finish(model)


def rows_of(model, layer):
    return {role: value.double() for role, value in Router(model, layer, torch.device("cpu")).rows.items()}


@pytest.mark.parametrize("model_type", [*FAMILIES, "deepseek_v3", "deepseek_v2", "qwen2_moe", "lfm2_moe"])
def test_tokens_are_routed_as_the_model_routes_them(model_type, checkpoint):
    model, seen = checkpoint(model_type), {}
    loaded, family = load_model(model), family_of(model.config)
    for layer in model.facts.moe_layers:
        parts = moe_parts(loaded.model.layers[layer])
        parts.experts.register_forward_pre_hook(
            lambda m, args, kwargs, layer=layer: seen.update({layer: [*args, *kwargs.values()]}), with_kwargs=True
        )
    with torch.no_grad():
        loaded(torch.arange(60).view(2, 30) % 100)
    for layer, (hidden, index, weight) in seen.items():
        found = family.route_tokens(model, layer, hidden.reshape(-1, model.facts.hidden))
        mine, theirs = (torch.zeros(60, 8) for _ in range(2))
        mine.scatter_(1, found.experts_Tk, found.weights_Tk)
        theirs.scatter_(1, index.reshape(60, -1), weight.reshape(60, -1).float())
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_result_is_a_stock_model_that_runs(name, model_type, checkpoint, context):
    model = checkpoint(model_type)
    stage, options = STAGES[name]
    alias, ctx = merged(model, context), context("router")
    stage(options, plan_for(model), alias, stats_for(model), ctx)
    stock = ctx.finish(alias)
    assert (stock.facts.experts, stock.facts.router_rows) == (4, 4)
    with torch.no_grad():
        assert load_model(stock)(torch.arange(20)[None] % 100).logits.isfinite().all()
    assert set(ctx.records["router_gap"]) == {str(layer) for layer in model.facts.moe_layers}
    assert "against the alias form" in ctx.notes[-1]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "gpt_oss", "ernie4_5_moe"])
@pytest.mark.parametrize("weights", ["frequency", "uniform"])
def test_rows_are_means_of_their_members(model_type, weights, checkpoint, context):
    model = checkpoint(model_type)
    alias, ctx = merged(model, context), context("router")
    row_mean(RowMean(weights=weights), plan_for(model), alias, None, ctx)
    stock, layer = ctx.finish(alias), model.facts.moe_layers[0]
    before, after = rows_of(model, layer), rows_of(stock, layer)
    for m in range(4):
        members = [e for e in range(8) if GROUPS[e] == m]
        share = {e: float(SHARES[e]) if weights == "frequency" else 1 / len(members) for e in members}
        for role, value in before.items():
            expected = sum(share[e] * value[e] for e in members)
            expected = expected + (torch.tensor(len(members)).log() if role == "bias" else 0)
            assert torch.allclose(after[role][m], expected, atol=1e-5)
    assert "was not measured" in ctx.notes[-1]


@pytest.mark.parametrize("name", STAGES)
def test_rows_of_experts_that_stand_alone_stay(name, checkpoint, context):
    model = checkpoint("gpt_oss")
    stage, options = STAGES[name]
    alias, ctx = merged(model, context), context("router")
    stage(options, plan_for(model), alias, stats_for(model), ctx)
    stock = ctx.finish(alias)
    for layer in model.facts.moe_layers:
        before, after = rows_of(model, layer), rows_of(stock, layer)
        for role in before:
            assert torch.allclose(after[role][3], before[role][5], atol=0 if name != "lse-ridge" else 1e-4)


def test_equal_rows_and_a_logit_bias_keep_the_mass_of_their_group(checkpoint, context):
    """n equal rows have n times the mass of one: with log n in the bias nothing is lost."""
    model = checkpoint("gpt_oss")
    family, layer = family_of(model.config), model.facts.moe_layers[0]
    equal = context("equal")
    with equal.writer(model) as out:

        def write(part):
            for name in family.router_names(layer, model):
                part.put(name, model.get(name)[LEADS[GROUPS]])

        out.part("rows", write)  # fmt: skip
    alias, ctx = merged(equal.finish(model), context), context("router")
    row_mean(RowMean(), plan_for(model), alias, None, ctx)
    x = torch.randn(30, model.facts.hidden, generator=torch.Generator().manual_seed(1))
    before = family.router_logits(alias, layer, x).softmax(-1)
    after = family.router_logits(ctx.finish(alias), layer, x).softmax(-1)
    summed = torch.stack([before[:, m == GROUPS].sum(1) for m in range(4)], 1)
    assert torch.allclose(after, summed, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "glm4_moe", "gpt_oss"])
def test_the_gap_is_measured_token_by_token(model_type, checkpoint, context):
    model = checkpoint(model_type)
    alias, ctx = merged(model, context), context("router")
    plan, stats = plan_for(model), stats_for(model)
    row_drop(RowDrop(), plan, alias, stats, ctx)
    stock, layer = ctx.finish(alias), model.facts.moe_layers[-1]
    x = stats[layer]["tok_reservoir"]
    experts = [family_of(stock.config).read_expert(stock, layer, m) for m in range(4)]
    before, after = (family_of(c.config).route_tokens(c, layer, x) for c in (alias, stock))
    wanted = error = moved = total = 0.0
    for t in range(len(x)):
        a, b = [0.0] * 4, [0.0] * 4
        for e, w in zip(before.experts_Tk[t].tolist(), before.weights_Tk[t].tolist(), strict=True):
            a[int(GROUPS[e])] += w
        for m, w in zip(after.experts_Tk[t].tolist(), after.weights_Tk[t].tolist(), strict=True):
            b[m] += w
        y = [family_of(model.config).expert_forward(w, x[t : t + 1])[0].double() for w in experts]
        wanted += float(sum(a[m] * y[m] for m in range(4)).square().sum())
        error += float(sum((b[m] - a[m]) * y[m] for m in range(4)).square().sum())
        moved += sum(max(b[m] - a[m], 0) for m in range(4))
        total += sum(a)
    found = ctx.records["router_gap"][str(layer)]
    assert found["output"] == pytest.approx((error / wanted) ** 0.5, rel=1e-4)
    assert found["weight"] == pytest.approx(moved / total, rel=1e-4)


def test_without_a_merge_there_is_no_gap(checkpoint):
    model = checkpoint()
    everyone = torch.arange(8)
    router = Router(model, 0, torch.device("cpu"))
    plan = LayerPlan(everyone, torch.ones(8), everyone)
    x = torch.randn(20, model.facts.hidden, generator=torch.Generator().manual_seed(0))
    assert gap(router, family_of(model.config), router.rows, plan, x) == (0.0, 0.0)


def test_a_refit_comes_closer_to_its_target_than_the_mean_of_rows(checkpoint, context):
    model = checkpoint()
    alias, plan, stats = merged(model, context), plan_for(model), stats_for(model)
    layer, losses = model.facts.moe_layers[0], {}
    x = stats[layer]["tok_reservoir"]
    wanted = target("max", True, family_of(model.config).router_logits(model, layer, x), GROUPS, 4)
    for name in ("row-mean", "refit"):
        stage, options = STAGES[name]
        ctx = context(name)
        stage(options, plan, alias, stats, ctx)
        log_p = family_of(model.config).router_logits(ctx.finish(alias), layer, x).log_softmax(-1)
        losses[name] = float(-(wanted * log_p).sum(-1).mean())
    assert losses["refit"] < losses["row-mean"] - 1e-3


def test_targets_are_the_best_or_the_sum_of_the_members(checkpoint):
    z = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).log_softmax(-1)
    p, groups = z.exp()[0], torch.tensor([0, 1, 0, 1])
    assert target("sum", True, z, groups, 2)[0].tolist() == pytest.approx([float(p[0] + p[2]), float(p[1] + p[3])])
    best = [float(p[0] / (p[0] + p[1])), float(p[1] / (p[0] + p[1]))]
    assert target("max", True, z, groups, 2)[0].tolist() == pytest.approx(best)
    assert target("sum", False, torch.full((1, 4), 9.0), groups, 2)[0].tolist() == [1, 1]


def test_layers_of_different_counts_are_refused_by_the_plan_and_by_the_stage(checkpoint, context):
    model = checkpoint()
    sketch = ModelSketch(model.facts, model.config, {}, uneven=True)
    with pytest.raises(StageFailed, match="layers keep different numbers of experts"):
        RowDrop().forecast(sketch)
    other = LayerPlan(torch.arange(8), torch.ones(8), torch.arange(8))
    plan = ExpertPlan({0: LayerPlan(GROUPS, SHARES, LEADS), 1: other})
    alias = merged(model, context, plan)
    found = [family_of(alias.config).experts_in(layer) for layer in (0, 1)]
    assert found == [4, 8]
    with pytest.raises(StageFailed, match=r"different numbers of experts \(4 to 8\)"):
        refit(Refit(), plan, alias, stats_for(model), context("router"))


def test_a_fit_without_tokens_is_refused(checkpoint, context):
    model = checkpoint()
    alias, count = merged(model, context), torch.ones(8, dtype=torch.int64)
    bare = CalibrationStats({layer: LayerStats(8, count, count.double()) for layer in model.facts.moe_layers})
    with pytest.raises(MoecliError, match="statistic `tok_reservoir` was not collected"):
        refit(Refit(), plan_for(model), alias, bare, context("router"))


WITHIN = (torch.tensor([0, 1, 1, 0, 2, 3, 2, 2]), SHARES, LEADS)


@pytest.mark.parametrize("name", STAGES)
def test_group_limited_routing_keeps_its_groups(name, checkpoint, context):
    model = checkpoint("deepseek_v3")
    stage, options = STAGES[name]
    plan = plan_for(model, *WITHIN)
    alias, ctx = merged(model, context, plan), context("router")
    stage(options, plan, alias, stats_for(model), ctx)
    stock = ctx.finish(alias)
    assert (stock.facts.groups, stock.facts.router_rows) == (2, 4)
    with torch.no_grad():
        assert load_model(stock)(torch.arange(20)[None] % 100).logits.isfinite().all()


def test_merges_across_routing_groups_are_refused_by_the_plan_and_by_the_stage(checkpoint, context):
    model = checkpoint("deepseek_v3")
    with pytest.raises(StageFailed, match="across the router's 2 groups"):
        RowDrop().forecast(ModelSketch(model.facts, model.config, {}))
    shares = SHARES.new_tensor([0.5, 1, 0.1, 0.5, 0.2, 1, 0.3, 0.4])
    plan = plan_for(model, torch.tensor([0, 1, 2, 0, 2, 3, 2, 2]), shares, torch.tensor([0, 1, 4, 5]))
    alias = merged(model, context, plan)
    with pytest.raises(StageFailed, match="expert 2 is merged into another routing group"):
        row_drop(RowDrop(), plan, alias, None, context("router"))
