"""Clusters, merged weights, the alias map, and what dropping router rows leaves."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, ExpertPlan, LayerPlan, LayerStats
from moecli.core.errors import StageFailed
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.methods.cluster.hc_smoe import HcSmoe, hc_smoe
from moecli.methods.merge.weighted import Weighted, weighted
from moecli.methods.router.row_drop import RowDrop, row_drop
from moecli.ops.select import keep_only

GROUPS = torch.tensor([0, 1, 1, 0, 2, 3, 2, 2])
SHARES = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.2, 1.0, 0.3, 0.5])
LEADS = torch.tensor([0, 2, 4, 5])


def plan_for(model):
    return ExpertPlan({layer: LayerPlan(GROUPS, SHARES, LEADS) for layer in model.facts.moe_layers})


def means(points):
    return CalibrationStats({0: LayerStats(2, torch.tensor([1, 3, 2, 0]), torch.ones(4), {"y_mean": 2 * points})})


def test_close_mean_outputs_share_a_cluster(context):
    points = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 1.0], [9.0, 3.0]], dtype=torch.float64)
    plan = hc_smoe(HcSmoe(keep=2, protect="none"), means(points), None, context())[0]
    assert plan.group_E.tolist() == [0, 1, 0, 1]
    assert plan.share_E.tolist() == pytest.approx([1 / 3, 1, 2 / 3, 0])
    assert plan.lead_K.tolist() == [0, 1]


def test_the_lead_is_the_member_nearest_to_the_mean_and_leads_ascend(context):
    points = torch.tensor([[4.0, 0.0], [0.0, 0.0], [2.1, 0.0], [50.0, 0.0]], dtype=torch.float64)
    plan = hc_smoe(HcSmoe(keep=2, protect="none"), means(points), None, context())[0]
    assert plan.lead_K.tolist() == [2, 3]
    assert plan.group_E.tolist() == [0, 0, 0, 1]


def test_more_clusters_than_experts_is_said_before_anything_runs(checkpoint):
    (problem,) = HcSmoe(keep=9).problems(checkpoint().facts)
    assert (problem.option, problem.message) == ("keep", "`keep` must be at most the model's 8 experts, got 9")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_merged_experts_are_weighted_means_of_their_members(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    weighted(Weighted(), plan_for(model), model, None, ctx)
    merged = ctx.finish(model)
    before, after = family_of(model.config), family_of(merged.config)
    assert (merged.facts.experts, merged.facts.router_rows) == (4, 8)
    for layer in model.facts.moe_layers:
        assert torch.equal(merged.get(after.alias_name(layer)), GROUPS)
        for group in range(4):
            found = after.read_expert(merged, layer, group)
            members = [(before.read_expert(model, layer, e), SHARES[e]) for e in range(8) if GROUPS[e] == group]
            for i, part in enumerate(found):
                if part is not None:
                    expected = sum(weights[i].double() * share for weights, share in members)
                    assert (part.double() - expected).abs().max() < 1e-6


def test_merging_equal_experts_loses_nothing(checkpoint, context, tmp_path):
    model = checkpoint()
    copied = context("copied")
    family = family_of(model.config)
    with copied.writer(model) as out:
        for layer in model.facts.moe_layers:
            experts = [family.read_expert(model, layer, int(LEADS[g])) for g in GROUPS]
            out.part(
                f"layer-{layer}",
                lambda part, layer=layer, experts=experts: family.write_experts(part, model, layer, experts),
            )
    equal = copied.finish(model)
    ctx = context("merged")
    weighted(Weighted(), plan_for(equal), equal, None, ctx)
    ids = torch.arange(40).view(2, 20) % 100
    with torch.no_grad():
        difference = load_model(ctx.finish(equal))(ids).logits - load_model(equal)(ids).logits
    assert difference.abs().max() < 1e-5


def test_a_plan_that_drops_experts_cannot_be_merged(checkpoint, context):
    model = checkpoint()
    plan = ExpertPlan({layer: keep_only([0, 1, 2, 3], of=8) for layer in model.facts.moe_layers})
    with pytest.raises(StageFailed, match="the plan drops experts"):
        weighted(Weighted(), plan, model, None, context())


def test_uniform_weights_ignore_the_shares(checkpoint, context):
    model, ctx = checkpoint(), context()
    weighted(Weighted(weights="uniform"), plan_for(model), model, None, ctx)
    merged = ctx.finish(model)
    layer, family = model.facts.moe_layers[0], family_of(model.config)
    members = [family.read_expert(model, layer, e).up_FD for e in (4, 6, 7)]
    assert torch.allclose(family_of(merged.config).read_expert(merged, layer, 2).up_FD, sum(members) / 3, atol=1e-6)


def test_dropping_rows_keeps_those_of_the_leads(checkpoint, context):
    model = checkpoint()
    first, second = context("merge"), context("drop")
    weighted(Weighted(), plan_for(model), model, None, first)
    merged = first.finish(model)
    row_drop(RowDrop(), plan_for(model), merged, None, second)
    stock = second.finish(merged)
    family = family_of(stock.config)
    assert (stock.facts.experts, stock.facts.router_rows) == (4, 4)
    for layer in model.facts.moe_layers:
        assert family.alias_name(layer) not in stock
        for name, axis in family.router_tensors(stock, layer).items():
            assert torch.equal(stock.get(name), model.get(name).index_select(axis, LEADS))


def test_rows_cannot_be_dropped_before_a_merge(checkpoint):
    (problem,) = RowDrop().problems(checkpoint().facts)
    assert "one row for each of its 8 experts" in problem.message


def test_how_many_merged_experts_a_token_goes_to(checkpoint, context):
    """Behind the alias map, among 4 picks: each group is counted once."""
    model, ctx = checkpoint(top_k=4), context()
    layers, family = model.facts.moe_layers, family_of(model.config)
    x = torch.randn(30, model.facts.hidden, generator=torch.Generator().manual_seed(0))
    count = torch.ones(8, dtype=torch.int64)
    stats = CalibrationStats({i: LayerStats(30, count, count.double(), {"tok_reservoir": x}) for i in layers})
    weighted(Weighted(), plan_for(model), model, stats, ctx)
    for layer in layers:
        chosen = family.route_tokens(model, layer, x).experts_Tk.tolist()
        expected = sum(len({int(GROUPS[e]) for e in row}) for row in chosen) / 30
        assert 1 < expected < 4
        assert ctx.records["experts_per_token"][str(layer)] == pytest.approx(expected)
    assert "merged experts on average, 4 before merging" in ctx.notes[-1]
