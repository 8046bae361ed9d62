"""Pruning keeps the experts with the best scores, bit for bit, with their router rows."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, LayerStats, sketch_of
from moecli.core.errors import StageFailed
from moecli.engine.stats import merged
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.methods.prune.ean import Ean, ean
from moecli.methods.prune.easy_ep import EasyEp, easy_ep
from moecli.methods.prune.frequency import Frequency, frequency
from moecli.methods.prune.gating_score import GatingScore, gating_score
from moecli.methods.prune.random import Random, random
from moecli.methods.prune.reap import Reap, reap
from moecli.methods.prune.soft_count import SoftCount, soft_count


def stats_of(model, count, gean):
    layers = model.facts.moe_layers
    values = torch.tensor(count), torch.tensor(gean, dtype=torch.float64)
    return CalibrationStats({i: LayerStats(40, values[0], values[0].double(), {"gean_sum": values[1]}) for i in layers})


COUNT = [10, 0, 5, 1, 20, 2, 4, 8]
GEAN = [10.0, 0.0, 20.0, 3.0, 10.0, 1.0, 16.0, 4.0]


def test_reap_ranks_by_the_mean_over_routed_tokens(checkpoint, context):
    model, ctx = checkpoint(), context()
    reap(Reap(keep=4, protect="none"), stats_of(model, COUNT, GEAN), model, ctx)
    mean = {e: g / c if c else 0 for e, (g, c) in enumerate(zip(GEAN, COUNT, strict=True))}
    expected = sorted(sorted(mean, key=mean.get, reverse=True)[:4])
    assert expected == [0, 2, 3, 6]
    assert ctx.records["kept"] == {str(layer): expected for layer in model.facts.moe_layers}


def test_an_expert_no_token_reached_goes_first(checkpoint, context):
    model, ctx = checkpoint(), context()
    reap(Reap(keep=7, protect="none"), stats_of(model, COUNT, GEAN), model, ctx)
    assert all(1 not in kept for kept in ctx.records["kept"].values())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "lfm2_moe"])
def test_kept_experts_and_rows_are_those_of_the_source(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    frequency(Frequency(keep=4, protect="none"), stats_of(model, COUNT, GEAN), model, ctx)
    pruned = ctx.finish(model)
    before, after = family_of(model.config), family_of(pruned.config)
    kept = [0, 2, 4, 7]
    assert pruned.facts.experts == pruned.facts.router_rows == 4
    for layer in model.facts.moe_layers:
        for new, old in enumerate(kept):
            mine, theirs = after.read_expert(pruned, layer, new), before.read_expert(model, layer, old)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        for name, axis in before.router_tensors(model, layer).items():
            assert torch.equal(pruned.get(name), model.get(name).index_select(axis, torch.tensor(kept)))


def test_groups_keep_their_own_best(checkpoint, context):
    model, ctx = checkpoint("deepseek_v3"), context()
    assert model.facts.groups == 2
    frequency(Frequency(keep=4, protect="none"), stats_of(model, [9, 8, 7, 6, 1, 2, 3, 4], GEAN), model, ctx)
    assert next(iter(ctx.records["kept"].values())) == [0, 1, 6, 7]


def test_scores_that_are_not_numbers_stop_the_stage(checkpoint, context):
    model = checkpoint()
    broken = stats_of(model, COUNT, [*GEAN[:7], float("nan")])
    with pytest.raises(StageFailed, match="score of expert 7 is NaN"):
        reap(Reap(keep=4, protect="none"), broken, model, context())


def test_a_layer_without_tokens_is_refused(checkpoint, context):
    model = checkpoint()
    with pytest.raises(StageFailed, match="no calibration token was routed to any expert") as caught:
        frequency(Frequency(keep=4, protect="none"), stats_of(model, [0] * 8, [0.0] * 8), model, context())
    assert (caught.value.where, caught.value.hint) == ("layer 0", "calibrate with text, and with more `samples`")


def test_merged_experts_cannot_be_pruned(checkpoint):
    from dataclasses import replace

    facts = replace(checkpoint().facts, experts=6)
    (problem,) = Reap(keep=4, protect="none").problems(facts)
    assert "8 router rows share 6 merged experts" in problem.message
    assert "router/row-drop" in problem.hint


# -- the score zoo


def some_stats(model, seed=0, experts=8):
    """Every routed statistic with random values; expert 1 of every layer saw no token."""
    rng, layers = torch.Generator().manual_seed(seed), {}
    for layer in model.facts.moe_layers:
        count = torch.randint(1, 30, (experts,), generator=rng)
        count[1] = 0
        names = ("prob_sum", "ean_sum", "ean_sq", "gean_sum", "easy")
        extra = {name: torch.rand(experts, generator=rng).double() * (count > 0) for name in names}
        extra["absmax"] = torch.rand(experts, generator=rng) * (count > 0)
        gate = torch.rand(experts, generator=rng).double() * count
        layers[layer] = LayerStats(100, count, gate, extra)
    return CalibrationStats(layers)


ZOO = {
    "frequency": (Frequency, frequency, {}, lambda s, e: s.count_E[e]),
    "gating-score": (GatingScore, gating_score, {}, lambda s, e: s.gate_sum_E[e]),
    "soft-count": (SoftCount, soft_count, {}, lambda s, e: s["prob_sum"][e]),
    "ean": (Ean, ean, {"form": "sum"}, lambda s, e: s["ean_sum"][e]),
    "man": (Ean, ean, {"form": "mean"}, lambda s, e: s["ean_sum"][e] / max(1, s.count_E[e])),
    "msan": (Ean, ean, {"form": "mean_square"}, lambda s, e: s["ean_sq"][e] / max(1, s.count_E[e])),
    "weighted-ean": (Ean, ean, {"form": "weighted_sum"}, lambda s, e: s["gean_sum"][e]),
    "reap": (Reap, reap, {}, lambda s, e: s["gean_sum"][e] / max(1, s.count_E[e])),
    "easy-ep": (EasyEp, easy_ep, {}, lambda s, e: s["easy"][e]),
}


@pytest.mark.parametrize("name", ZOO)
def test_a_score_is_its_formula(name, checkpoint, context):
    options, method, given, formula = ZOO[name]
    model, ctx = checkpoint(), context()
    stats, opt = some_stats(model), options(keep=5, protect="none", **given)
    method(opt, stats=stats, model=model, ctx=ctx)
    for layer, s in stats.items():
        ranked = sorted(range(len(s.count_E)), key=lambda e: (-float(formula(s, e)), e))
        assert ctx.records["kept"][str(layer)] == sorted(ranked[:5])
    assert set(method.needs(opt)) <= {"prob_sum", "ean_sum", "ean_sq", "gean_sum", "easy"}
    assert set(method.needs(options(keep=5, **given))) == {*method.needs(opt), "absmax"}


def test_easy_ep_over_several_domains_lets_each_count_alike(checkpoint, context):
    """A loud domain that wants experts 0 to 3 does not drown a quiet one that wants 4 to 7."""
    model, ctx = checkpoint(), context()
    about = {"model": "m", "dtype": "float32", "model_type": "qwen3_moe"}
    domains = []
    for at, scores in enumerate([[900.0, 300, 200, 100, 0, 0, 0, 0], [0.0, 0, 0, 0, 1, 2, 3, 9]]):
        found = some_stats(model)
        for s in found.values():
            s.extra["easy"] = torch.tensor(scores, dtype=torch.float64)
        domains.append(CalibrationStats(dict(found), about | {"digest": f"text {at}"}))
    easy_ep(EasyEp(keep=4, protect="none"), merged(*domains), model, context("sum"))
    easy_ep(EasyEp(keep=4, protect="none"), merged(*domains, domains=True), model, ctx)
    assert ctx.records["kept"] == {str(layer): [0, 1, 6, 7] for layer in model.facts.moe_layers}
    assert ctx.notes == ["scores are means over 2 domains, each of which counts alike"]


def test_random_keeps_what_the_seed_says(checkpoint, context):
    model = checkpoint()
    stats, kept = some_stats(model), []
    for at, seed in enumerate((0, 0, 1)):
        ctx = context(f"run-{at}")
        ctx.rng.manual_seed(seed)
        random(Random(keep=4, protect="none"), stats, model, ctx)
        kept.append(ctx.records["kept"])
    assert kept[0] == kept[1] != kept[2]
    assert len({tuple(k) for k in kept[0].values()}) > 1, "layers are drawn one by one"


def test_super_experts_stay_whatever_they_score(checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = some_stats(model)
    layer = model.facts.moe_layers[0]
    stats[layer].extra["absmax"][1] = 900.0  # expert 1 scores 0
    reap(Reap(keep=2), stats, model, ctx)
    assert ctx.records["protected"] == {str(layer): [1]}
    assert 1 in ctx.records["kept"][str(layer)]
    assert all(len(kept) == 2 for kept in ctx.records["kept"].values())


def test_more_protected_experts_than_places_stop_the_stage(checkpoint, context, monkeypatch):
    model = checkpoint("deepseek_v3")
    first = model.facts.moe_layers[0]
    assert (model.facts.groups, model.facts.top_k) == (2, 2)
    monkeypatch.setattr("moecli.methods.prune.super_experts", lambda absmax, layers: {first: [0, 1, 2]})
    with pytest.raises(StageFailed, match="leaves no room for all protected Super Experts of one routing group") as e:
        frequency(Frequency(keep=4), some_stats(model), model, context())
    assert (e.value.where, e.value.hint) == (f"layer {first}", "raise `keep`, or write `protect: none`")


def test_flatten_ranks_all_groups_together_and_ends_the_grouping(checkpoint, context):
    model, ctx = checkpoint("deepseek_v3"), context()
    opt = Frequency(keep=3, protect="none", groups="flatten")
    assert list(Frequency(keep=3, protect="none").problems(model.facts))
    assert not list(opt.problems(model.facts))
    frequency(opt, stats_of(model, [9, 8, 7, 6, 1, 2, 3, 4], GEAN), model, ctx)
    pruned = ctx.finish(model)
    assert next(iter(ctx.records["kept"].values())) == [0, 1, 2]
    assert (pruned.facts.groups, pruned.facts.groups_used, pruned.facts.experts) == (1, 1, 3)
    forecast = opt.forecast(sketch_of(model))
    assert forecast.facts == pruned.facts
    assert forecast.specs == {name: pruned.spec(name) for name in pruned.names()}


# -- groups: mask


def naive_mask(scores, keep, groups, floor):
    """The best `floor` of each group, then the best of what is left."""
    size = len(scores) // groups
    ranked = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    kept = [e for g in range(groups) for e in [e for e in ranked if e // size == g][:floor]]
    return sorted(kept + [e for e in ranked if e not in kept][: keep - len(kept)])


@pytest.mark.parametrize("used", [1, 2])
@pytest.mark.parametrize("keep", [4, 5, 7])
def test_mask_ranks_all_groups_together_but_leaves_each_enough(keep, used, checkpoint, context):
    """Two in each of 2 groups: for the 2 picks from one group, and because groups are ranked by their best two."""
    model, ctx = checkpoint("deepseek_v3", topk_group=used), context()
    count = [9, 8, 7, 6, 1, 2, 3, 4]
    opt = Frequency(keep=keep, protect="none", groups="mask")
    assert not list(opt.problems(model.facts))
    frequency(opt, stats_of(model, count, GEAN), model, ctx)
    expected = naive_mask(count, keep, 2, 2)
    assert ctx.records["kept"] == {str(layer): expected for layer in model.facts.moe_layers}
    best = sorted(sorted(range(8), key=lambda e: -count[e])[:keep])
    forced = len(model.facts.moe_layers) * len(set(expected) - set(best))
    said = f"{forced} experts stay although others score more: each routing group keeps 2 or more"
    assert ctx.notes == ([said] if forced else [])


def test_a_masked_router_routes_as_the_source_does_among_those_left(checkpoint, context):
    """Token by token: groups are ranked by their best two survivors, weights are those of the source's own scores."""
    model, ctx = checkpoint("deepseek_v3", experts=12, n_group=3, topk_group=2, top_k=3), context()
    stats = some_stats(model, experts=12)
    opt = Reap(keep=7, protect="none", groups="mask")
    reap(opt, stats, model, ctx)
    pruned, family = ctx.finish(model), family_of(model.config)
    after = family_of(pruned.config)
    assert (pruned.facts.experts, pruned.facts.router_rows, pruned.facts.groups) == (7, 12, 3)
    forecast = opt.forecast(sketch_of(model))
    assert forecast.facts == pruned.facts
    assert forecast.specs == {name: pruned.spec(name) for name in pruned.names()}
    for layer in model.facts.moe_layers:
        kept = ctx.records["kept"][str(layer)]
        x = torch.randn(50, model.facts.hidden, generator=torch.Generator().manual_seed(layer))
        scores = family.router_logits(model, layer, x).sigmoid()
        bias = model.get(family.router_role(model, layer, "correction"))
        routing = after.route_tokens(pruned, layer, x)
        assert pruned.get(after.alias_name(layer))[kept].tolist() == list(range(7))
        for token, score in enumerate(scores):
            choice = {e: float(score[e] + bias[e]) for e in kept}
            best = {g: sum(sorted((c for e, c in choice.items() if e // 4 == g), reverse=True)[:2]) for g in range(3)}
            groups = sorted(best, key=best.get, reverse=True)[:2]
            chosen = sorted((e for e in kept if e // 4 in groups), key=choice.get, reverse=True)[:3]
            total = sum(float(score[e]) for e in chosen)
            found = dict(zip(routing.experts_Tk[token].tolist(), routing.weights_Tk[token].tolist(), strict=True))
            assert set(found) == set(chosen)
            expected = [float(score[e]) / total * model.config["routed_scaling_factor"] for e in chosen]
            assert [found[e] for e in chosen] == pytest.approx(expected, rel=1e-5)


def test_a_masked_model_computes_what_masked_modules_compute(checkpoint, context):
    """Logits against the source in transformers with the same bias of -inf: every expert that is used is there."""
    model, ctx = checkpoint("deepseek_v3"), context()
    reap(Reap(keep=5, protect="none", groups="mask"), some_stats(model), model, ctx)
    source = load_model(model)
    for layer in model.facts.moe_layers:
        dropped = [e for e in range(8) if e not in ctx.records["kept"][str(layer)]]
        source.model.layers[layer].mlp.gate.e_score_correction_bias[dropped] = float("-inf")
    ids = torch.arange(60).view(2, 30) % 100
    with torch.no_grad():
        assert torch.equal(load_model(ctx.finish(model))(ids).logits, source(ids).logits)


def test_what_cannot_be_masked_is_refused(checkpoint, context):
    grouped, plain = checkpoint("deepseek_v3"), checkpoint("qwen3_moe")
    (problem,) = Reap(keep=3, groups="mask").problems(grouped.facts)
    assert problem.message == (
        "the router picks 2 experts per token from 1 of 2 groups, so `mask` keeps 2 in each: "
        "`keep` must be at least 4, got 3"
    )
    assert problem.hint == "use `keep: 4`"
    for refused in (
        lambda: Reap(keep=4, groups="mask").forecast(sketch_of(plain)),
        lambda: reap(Reap(keep=4, groups="mask", protect="none"), some_stats(plain), plain, context()),
    ):
        with pytest.raises(StageFailed, match="needs a router with a correction bias, `qwen3_moe` has none") as caught:
            refused()
        assert caught.value.hint == "leave `groups` out"


def test_a_mask_needs_room_for_protected_experts_and_every_group(checkpoint, context, monkeypatch):
    model = checkpoint("deepseek_v3")
    first = model.facts.moe_layers[0]
    monkeypatch.setattr("moecli.methods.prune.super_experts", lambda absmax, layers: {first: [0, 1, 2]})
    with pytest.raises(StageFailed, match="Super Experts of this layer beside 2 experts of each routing group"):
        frequency(Frequency(keep=4, groups="mask"), some_stats(model), model, context())


def test_keep_must_divide_over_the_devices(checkpoint):
    facts = checkpoint().facts
    assert not list(Reap(keep=6, keep_multiple_of=3).problems(facts))
    (problem,) = Reap(keep=5, keep_multiple_of=3).problems(facts)
    assert (problem.option, problem.hint) == ("keep", "use `keep: 6`")
    assert problem.message == "`keep` must be a multiple of 3 (`keep_multiple_of`), got 5"
    (problem,) = Reap(keep=5, keep_multiple_of=16).problems(facts)
    assert problem.hint is None


def test_protection_leaves_the_statistics_alone(checkpoint, context, monkeypatch):
    """Stages share one artifact: raising a score must not reach it."""
    model = checkpoint()
    stats, first = some_stats(model), model.facts.moe_layers[0]
    before = stats[first]["easy"].clone()
    monkeypatch.setattr("moecli.methods.prune.super_experts", lambda absmax, layers: {first: [1]})
    easy_ep(EasyEp(keep=4), stats, model, context())
    assert torch.equal(stats[first]["easy"], before)
