"""Sub-MoE's merge: the plain average, and the average in few output directions."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, ExpertPlan, LayerPlan, LayerStats
from moecli.core.errors import StageFailed
from moecli.families import family_of
from moecli.methods.merge.sub_moe import SubMoe, sub_moe
from moecli.methods.merge.weighted import Weighted, weighted
from moecli.ops.lowrank import rank_at

GROUPS = torch.tensor([0, 1, 1, 0, 2, 3, 2, 2])
SHARES = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.2, 1.0, 0.3, 0.5])
LEADS = torch.tensor([0, 2, 4, 5])
COUNT = torch.tensor([3, 5, 9, 0, 2, 0, 7, 1])


def plan_for(model):
    return ExpertPlan({layer: LayerPlan(GROUPS, SHARES, LEADS) for layer in model.facts.moe_layers})


def stats_for(model):
    rng, layers = torch.Generator().manual_seed(0), {}
    for layer in model.facts.moe_layers:
        moments = {}
        for name, width in (("x_cov", model.facts.hidden), ("h_cov", model.facts.expert_width)):
            tokens = [torch.randn(int(n), width, generator=rng) for n in COUNT]
            moments[name] = torch.stack([t.T @ t for t in tokens])
        layers[layer] = LayerStats(30, COUNT, COUNT.double(), moments)
    return CalibrationStats(layers)


def test_without_truncation_it_is_the_weighted_average(checkpoint, context):
    model = checkpoint()
    first, second = context("sub"), context("mean")
    sub_moe(SubMoe(), plan_for(model), model, None, first)
    weighted(Weighted(), plan_for(model), model, None, second)
    a, b = first.finish(model), second.finish(model)
    assert all(torch.equal(a.get(name), b.get(name)) for name in b.names())


@pytest.mark.parametrize("cov", ["sum", "mean"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_truncated_experts_answer_in_the_members_leading_directions(cov, model_type, checkpoint, context, monkeypatch):
    monkeypatch.setattr("moecli.methods.merge.sub_moe.CHUNK_BYTES", 1)
    model, ctx, ratio = checkpoint(model_type), context(), 0.5
    stats = stats_for(model)
    sub_moe(SubMoe(ratio=ratio, cov=cov), plan_for(model), model, stats, ctx)
    merged, family, layer = ctx.finish(model), family_of(model.config), model.facts.moe_layers[1]
    for group in range(4):
        members = [e for e in range(8) if GROUPS[e] == group]
        found = family_of(merged.config).read_expert(merged, layer, group)
        for field, moment in ((0, "x_cov"), (1, "x_cov"), (2, "h_cov")):
            weights = {e: family.read_expert(model, layer, e)[field].double() for e in members}
            total = torch.zeros(len(found[field]), len(found[field]), dtype=torch.float64)
            for e, w in weights.items():
                c = stats[layer][moment][e].double() / (max(int(COUNT[e]), 1) if cov == "mean" else 1)
                c = c + 1e-5 * c.diagonal().mean() * torch.eye(len(c)).double()
                total += w @ (c if sum(int(COUNT[m]) for m in members) else torch.eye(len(c)).double()) @ w.T
            u = torch.linalg.svd(total).U[:, : rank_at(ratio, *found[field].shape)]
            average = sum(float(SHARES[e]) * w for e, w in weights.items())
            assert torch.allclose(found[field].double(), u @ u.T @ average, atol=1e-5)
    assert "stored whole" in ctx.notes[0]
    assert "groups saw no calibration token" in ctx.notes[1]


def test_truncation_without_statistics_is_refused(checkpoint, context):
    model = checkpoint()
    with pytest.raises(StageFailed, match="`ratio` needs calibration statistics"):
        sub_moe(SubMoe(ratio=0.5), plan_for(model), model, None, context())
