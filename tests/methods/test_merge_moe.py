"""MergeMoE: `down` fitted to what the members gave, token by token."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, ExpertPlan, LayerPlan, LayerStats
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.methods.merge.merge_moe import MergeMoe, merge_moe
from moecli.methods.merge.weighted import Weighted, weighted

GROUPS = torch.tensor([0, 1, 1, 0, 2, 3, 2, 2])
SHARES = torch.tensor([0.5, 0.25, 0.75, 0.5, 0.2, 1.0, 0.3, 0.5])
LEADS = torch.tensor([0, 2, 4, 5])
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "phimoe", "gpt_oss"]


def plan_for(model):
    return ExpertPlan({layer: LayerPlan(GROUPS, SHARES, LEADS) for layer in model.facts.moe_layers})


def stats_for(model, tokens=200, seed=0):
    rng = torch.Generator().manual_seed(seed)
    count = torch.full((8,), tokens // 4)
    return CalibrationStats({
        layer: LayerStats(tokens, count, count.double(),
                          {"tok_reservoir": torch.randn(tokens, model.facts.hidden, generator=rng)})
        for layer in model.facts.moe_layers
    })  # fmt: skip


def error_of(family, model, merged, after, layer, group, x, routed):
    """Mean squared difference of what the group adds, by the plain definition."""
    logits = family.router_logits(model, layer, x)
    correction = family.router_role(model, layer, "correction")
    routing = family.route(logits, None if correction is None else model.get(correction))
    out = family.expert_forward(after.read_expert(merged, layer, group), x)
    total = 0.0
    for t in range(len(x)):
        members = [e for e in range(8) if GROUPS[e] == group]
        weight = {e: float(SHARES[e]) for e in members}
        if routed:
            chosen = dict(zip(routing.experts_Tk[t].tolist(), routing.weights_Tk[t].tolist(), strict=True))
            weight = {e: chosen.get(e, 0.0) for e in members}
        wanted = sum(w * family.expert_forward(family.read_expert(model, layer, e), x[t : t + 1])[0]
                     for e, w in weight.items())  # fmt: skip
        total += float((wanted - sum(weight.values()) * out[t]).square().sum())
    return total / len(x)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tokens", ["all", "routed"])
def test_no_other_down_does_better_on_the_tokens_it_was_fitted_on(model_type, tokens, checkpoint, context):
    """The fit is a minimum: averaging does worse, and so does every small step away from it."""
    model = checkpoint(model_type)
    stats, plan = stats_for(model), plan_for(model)
    fitted, average = context("fitted"), context("average")
    merge_moe(MergeMoe(tokens=tokens, ridge=1e-9, align="none"), plan, model, stats, fitted)
    weighted(Weighted(), plan, model, stats, average)
    after, before = fitted.finish(model), average.finish(model)
    family, layer = family_of(model.config), model.facts.moe_layers[-1]
    x = stats[layer]["tok_reservoir"].float()

    def errors(merged):
        return [
            error_of(family, model, merged, family_of(merged.config), layer, g, x, tokens == "routed")
            for g in (0, 1, 2)
        ]

    ours, theirs = errors(after), errors(before)
    assert all(a < 0.9 * b for a, b in zip(ours, theirs, strict=True))
    rng = torch.Generator().manual_seed(5)
    kept = family_of(after.config).read_expert(after, layer, 1)
    for _ in range(3):
        step = 0.01 * torch.randn(kept.down_DF.shape, generator=rng)
        moved = Replaced(after, layer, kept._replace(down_DF=kept.down_DF + step))
        assert error_of(family, model, after, moved, layer, 1, x, tokens == "routed") >= ours[1]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_the_short_form_is_the_papers(model_type, checkpoint, context):
    """`tokens: all`: down~ = [b_1 down_1 ... b_n down_n] T1 with T1 = Q P^+, Q the members' stacked activations."""
    model, ctx = checkpoint(model_type), context()
    stats = stats_for(model)
    merge_moe(MergeMoe(tokens="all", ridge=1e-12, align="none"), plan_for(model), model, stats, ctx)
    merged, family, layer = ctx.finish(model), family_of(model.config), model.facts.moe_layers[0]
    x = stats[layer]["tok_reservoir"].double()
    for group in range(3):
        members = [e for e in range(8) if GROUPS[e] == group]
        experts = [type(w)(*(None if v is None else v.double() for v in w))
                   for w in (family.read_expert(model, layer, e) for e in members)]  # fmt: skip
        share = [float(SHARES[e]) for e in members]
        gate, up = (sum(b * w[i] for b, w in zip(share, experts, strict=True)) for i in (0, 1))
        p_FS = family.inner(experts[0]._replace(gate_FD=gate, up_FD=up), x).T
        q_XS = torch.cat([family.inner(w, x).T for w in experts])
        stacked_DX = torch.cat([b * w.down_DF for b, w in zip(share, experts, strict=True)], 1)
        found = family_of(merged.config).read_expert(merged, layer, group).down_DF.double()
        assert torch.allclose(found, stacked_DX @ q_XS @ torch.linalg.pinv(p_FS), atol=1e-4)


class Replaced:
    """A family whose group 1 of one layer is another expert."""

    def __init__(self, merged, layer, expert):
        self.layer, self.expert = layer, expert

    def read_expert(self, merged, layer, group):
        return self.expert


def test_alone_in_its_group_an_expert_is_copied_bit_for_bit(checkpoint, context):
    model, ctx = checkpoint(dtype="bfloat16"), context()
    merge_moe(MergeMoe(), plan_for(model), model, stats_for(model), ctx)
    merged = ctx.finish(model)
    for layer in model.facts.moe_layers:
        old = family_of(model.config).read_expert(model, layer, 5)
        new = family_of(merged.config).read_expert(merged, layer, 3)
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True) if a is not None)


def test_a_strong_ridge_is_plain_averaging(checkpoint, context):
    model = checkpoint()
    first, second = context("fit"), context("mean")
    merge_moe(MergeMoe(ridge=1e12, align="none"), plan_for(model), model, stats_for(model), first)
    weighted(Weighted(), plan_for(model), model, None, second)
    fitted, mean = first.finish(model), second.finish(model)
    assert all(torch.allclose(fitted.get(n), mean.get(n), atol=1e-6) for n in mean.names())


def test_gate_and_up_are_averages(checkpoint, context):
    model, ctx = checkpoint(), context()
    merge_moe(MergeMoe(align="none"), plan_for(model), model, stats_for(model), ctx)
    merged = ctx.finish(model)
    layer, family = model.facts.moe_layers[0], family_of(model.config)
    found = family_of(merged.config).read_expert(merged, layer, 1)
    one, two = family.read_expert(model, layer, 1), family.read_expert(model, layer, 2)
    assert torch.allclose(found.gate_FD, 0.25 * one.gate_FD + 0.75 * two.gate_FD, atol=1e-6)
    assert torch.allclose(found.up_FD, 0.25 * one.up_FD + 0.75 * two.up_FD, atol=1e-6)


@pytest.mark.parametrize("align", ["weights", "weights+acts"])
def test_shuffled_copies_of_one_expert_merge_without_loss(align, checkpoint, context):
    """Averaging unaligned copies destroys them; matched neurons do not."""
    model, family = checkpoint(), None
    family = family_of(model.config)
    shuffled = context("shuffled")
    with shuffled.writer(model) as out:
        for layer in model.facts.moe_layers:
            experts = []
            for e, group in enumerate(GROUPS.tolist()):
                w = family.read_expert(model, layer, int(LEADS[group]))
                order = torch.randperm(len(w.gate_FD), generator=torch.Generator().manual_seed(e))
                experts.append(w._replace(gate_FD=w.gate_FD[order], up_FD=w.up_FD[order], down_DF=w.down_DF[:, order]))
            out.part(f"layer-{layer}", lambda part, layer=layer, experts=experts: family.write_experts(
                part, model, layer, experts))  # fmt: skip
    copies = shuffled.finish(model)
    ids = torch.arange(40).view(2, 20) % 100
    with torch.no_grad():
        wanted = load_model(copies)(ids).logits
        for name, options, loss in (("aligned", {"align": align}, False), ("plain", {}, True)):
            ctx = context(name)
            weighted(Weighted(**options), plan_for(copies), copies, stats_for(copies), ctx)
            difference = (load_model(ctx.finish(copies))(ids).logits - wanted).abs().max()
            assert (difference > 1e-2) == loss
            assert loss or difference < 1e-4


def test_statistics_without_the_reservoir_are_refused(checkpoint, context):
    from moecli.core.errors import MoecliError

    model = checkpoint()
    count = torch.ones(8, dtype=torch.int64)
    bare = CalibrationStats({layer: LayerStats(8, count, count.double()) for layer in model.facts.moe_layers})
    with pytest.raises(MoecliError, match="statistic `tok_reservoir` was not collected"):
        merge_moe(MergeMoe(), plan_for(model), model, bare, context())
