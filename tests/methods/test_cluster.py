"""Which experts are grouped: toy numbers, plain oracles, and experts that must stay alone."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import StageFailed
from moecli.families import family_of
from moecli.methods.cluster import gram
from moecli.methods.cluster.hc_smoe import HcSmoe, hc_smoe
from moecli.methods.cluster.m_smoe import MSmoe, budget, m_smoe
from moecli.methods.cluster.ream import Ream, ream
from moecli.methods.cluster.sub_moe import SubMoe, by_cost, sub_moe
from moecli.ops.kmeans import cost, kernel_kmeans
from moecli.ops.likeness import distances, unit_gram

COUNT = [10, 40, 5, 30, 20, 2, 4, 8]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def stats_of(model, count=COUNT, loud=(), tokens=60, **extra):
    """Every statistic the clusterings read, of random values; `loud` are Super Experts of the first layer."""
    layers = {}
    for layer in model.facts.moe_layers:
        z = torch.randn(tokens, 8, generator=rng(layer), dtype=torch.float64)
        x = torch.randn(tokens, model.facts.hidden, generator=rng(layer + 9))
        absmax = torch.ones(8)
        if layer == model.facts.moe_layers[0]:
            absmax[list(loud)] = 100.0
        values = {
            "logit_gram": z.T @ z,
            "gram_cos": tokens * unit_gram(z.T @ z),
            "gean_sum": torch.arange(8.0, dtype=torch.float64),
            "gy_mean": torch.randn(8, 5, generator=rng(layer + 5), dtype=torch.float64),
            "y_mean": torch.randn(8, 5, generator=rng(layer + 7), dtype=torch.float64),
            "tok_reservoir": x,
            "tok_reservoir_key": torch.arange(tokens),
            "absmax": absmax,
        }
        count_E = torch.tensor(count)
        layers[layer] = LayerStats(tokens, count_E, count_E.double(), values | extra)
    return CalibrationStats(layers)


METHODS = {
    "hc-smoe": (hc_smoe, HcSmoe),
    "m-smoe": (m_smoe, MSmoe),
    "ream": (ream, Ream),
    "sub-moe": (sub_moe, SubMoe),
    "sub-moe uniform": (sub_moe, lambda **o: SubMoe(alloc="uniform", **o)),
    "sub-moe joint_pool": (sub_moe, lambda **o: SubMoe(alloc="joint_pool", **o)),
}


@pytest.mark.parametrize("name", METHODS)
def test_protected_experts_stay_alone(name, checkpoint, context):
    model, (method, options) = checkpoint(layers=4), METHODS[name]
    ctx = context()
    plan = method(options(keep=4), stats_of(model, loud=[3]), model, ctx)
    layer = model.facts.moe_layers[0]
    assert ctx.records["protected"] == {str(layer): [3]}
    assert plan[layer].members(int(plan[layer].group_E[3])) == [3]
    assert sum(p.experts for p in plan.values()) <= 4 * len(plan)


@pytest.mark.parametrize("name", METHODS)
def test_more_protected_than_kept_is_refused(name, checkpoint, context, monkeypatch):
    model, (method, options) = checkpoint(), METHODS[name]
    monkeypatch.setattr(
        "moecli.methods.cluster.super_experts", lambda *a: {i: [1, 2, 3] for i in model.facts.moe_layers}
    )
    with pytest.raises(StageFailed, match=r"leaves 0 groups for \d+ experts beside"):
        method(options(keep=3), stats_of(model), model, context())


@pytest.mark.parametrize("name", METHODS)
def test_every_expert_kept_is_every_expert_alone(name, checkpoint, context):
    model, (method, options) = checkpoint(), METHODS[name]
    plan = method(options(keep=8, protect="none"), stats_of(model), model, context())
    assert all(p.group_E.tolist() == list(range(8)) and p.share_E.tolist() == [1] * 8 for p in plan.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_without_tokens_is_refused(name, checkpoint, context):
    model, (method, options) = checkpoint(), METHODS[name]
    with pytest.raises(StageFailed, match="no calibration token was routed to any expert"):
        method(options(keep=4), stats_of(model, count=[0] * 8), model, context())


def test_the_busiest_lead_and_the_others_join_the_most_alike(checkpoint, context):
    model = checkpoint()
    stats = stats_of(model)
    plan = m_smoe(MSmoe(keep=3, protect="none"), stats, model, context())
    for layer, p in plan.items():
        assert p.lead_K.tolist() == [1, 3, 4]
        z = stats[layer]["logit_gram"]
        for e in range(8):
            best = max([1, 3, 4], key=lambda lead: float(z[e, lead] / (z[e, e] * z[lead, lead]).sqrt()))
            assert int(p.lead_K[p.group_E[e]]) == (e if e in (1, 3, 4) else best)
        for group in range(3):
            total = sum(COUNT[e] for e in p.members(group))
            assert [float(p.share_E[e]) for e in p.members(group)] == pytest.approx(
                [COUNT[e] / total for e in p.members(group)]
            )


def test_the_global_budget_is_met_exactly_in_spite_of_ties():
    def layer(counts):
        count = torch.tensor(counts)
        return LayerStats(100, count, count.double())

    stats = CalibrationStats({0: layer([25, 25, 25, 25]), 1: layer([97, 1, 1, 1]), 2: layer([40, 40, 10, 10])})
    assert budget(stats, 2, {}) == {0: 3, 1: 1, 2: 2}
    assert budget(stats, 1, {}) == {0: 1, 1: 1, 2: 1}
    assert budget(stats, 2, {1: [3]}) == {0: 2, 1: 2, 2: 2}


def test_ream_fills_the_most_salient_groups_first(checkpoint, context):
    """limit 3 and 8 experts: centroids 7, 6, 5 take two, two and one of the rest, by similarity."""
    model = checkpoint()
    stats = stats_of(model, count=[1] * 8)
    plan = ream(Ream(keep=3, limit=3, protect="none"), stats, model, context())
    for layer, p in plan.items():
        s, z = stats[layer]["gy_mean"], stats[layer]["logit_gram"]

        def distance(i, j, z=z):
            return float((2 - 2 * z[i, j] / (z[i, i] * z[j, j]).sqrt()).clamp(min=0).sqrt())

        far = max(distance(i, j) for i in range(8) for j in range(8))

        def alike(i, j, s=s, distance=distance, far=far):
            cosine = float(torch.nn.functional.cosine_similarity(s[i], s[j], dim=0))
            return 0.5 * (cosine + 1) / 2 + 0.5 * (1 - distance(i, j) / far)

        left = set(range(5))
        for centroid in (7, 6, 5):
            taken = sorted(left, key=lambda e, c=centroid: -alike(c, e))[:2]
            left -= set(taken)
            assert p.members(int(p.group_E[centroid])) == sorted([*taken, centroid])
        assert p.lead_K.tolist() == [5, 6, 7]
        weight = {e: float(e) if e else 0.5 for e in range(8)}  # the expert without any gets the least, at most 0.5
        group = p.members(0)
        assert [float(p.share_E[e]) for e in group] == pytest.approx(
            [weight[e] / sum(weight[m] for m in group) for e in group]
        )


def test_groups_too_small_for_all_experts_are_refused(checkpoint):
    (problem,) = Ream(keep=2, limit=3).problems(checkpoint().facts)
    assert problem.message == "2 groups of at most 3 cannot hold 8 experts"
    assert problem.hint == "write `limit: 4` or more"


def test_sub_moe_is_kmeans_on_the_mean_cosine(checkpoint, context):
    model = checkpoint()
    stats = stats_of(model)
    plan = sub_moe(SubMoe(keep=3, alloc="uniform", protect="none", restarts=40), stats, model, context())
    for layer, p in plan.items():
        similarity = stats[layer]["gram_cos"] / stats[layer].tokens
        best = kernel_kmeans(similarity, 3, rng(1), restarts=200).cost
        assert float(cost(similarity, p.group_E)) == pytest.approx(best)
        assert all(COUNT[lead] == max(COUNT[e] for e in p.members(g)) for g, lead in enumerate(p.lead_K.tolist()))


def test_the_cost_curve_spends_groups_where_they_are_missed():
    """Four equal experts need one group, four different ones need four."""
    same, different = torch.ones(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    groups = by_cost([same, different], 5, 10, rng())
    assert [int(g.max()) + 1 for g in groups] == [1, 4]


def test_a_pool_finds_experts_that_are_alike_inside_each_layer(checkpoint, context):
    model = checkpoint()
    ctx = context()
    plan = sub_moe(SubMoe(keep=4, alloc="joint_pool", protect="none"), stats_of(model), model, ctx)
    assert 2 <= sum(p.experts for p in plan.values()) <= 8
    assert all(sorted(set(p.group_E.tolist())) == list(range(p.experts)) for p in plan.values())


def test_reservoirs_of_other_tokens_cannot_be_pooled(checkpoint, context):
    model = checkpoint()
    stats = stats_of(model)
    other = dict(stats[1].extra) | {"tok_reservoir_key": torch.arange(60) + 1}
    stats = CalibrationStats({0: stats[0], 1: LayerStats(60, stats[1].count_E, stats[1].gate_sum_E, other)})
    with pytest.raises(StageFailed, match="hold other tokens"):
        sub_moe(SubMoe(keep=4, alloc="joint_pool", protect="none"), stats, model, context())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_output_and_weight_metrics_are_the_plain_inner_products(model_type, checkpoint, context):
    model = checkpoint(model_type)
    stats, layer = stats_of(model), model.facts.moe_layers[1]
    family, x = family_of(model.config), stats[layer]["tok_reservoir"]
    experts = [family.read_expert(model, layer, e) for e in range(8)]
    outputs = torch.stack([family.expert_forward(w, x).double() for w in experts])
    expected = torch.tensor([[float((a * b).sum(-1).mean()) for b in outputs] for a in outputs], dtype=torch.float64)
    assert torch.allclose(gram("out_l2", layer, stats, model, context()), expected, rtol=1e-4, atol=1e-5)
    flat = [torch.cat([m.flatten().double() for m in w[:3]]) for w in experts]
    cosine = torch.tensor([[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat], dtype=torch.float64)
    assert torch.allclose(gram("weight_cos", layer, stats, model, context()), cosine, atol=1e-6)


def test_distances_come_back_from_inner_products():
    vectors = torch.randn(5, 3, generator=rng(), dtype=torch.float64)
    assert torch.allclose(distances(vectors @ vectors.T), torch.cdist(vectors, vectors), atol=1e-7)


@pytest.mark.parametrize("metric", ["out_cos", "out_l2", "logit_cos", "weight_cos"])
@pytest.mark.parametrize("name", ["hc-smoe", "m-smoe", "sub-moe"])
def test_every_metric_makes_a_plan(name, metric, checkpoint, context):
    model, (method, options) = checkpoint(), METHODS[name]
    plan = method(options(keep=4, metric=metric), stats_of(model), model, context())
    assert sum(p.experts for p in plan.values()) == 4 * len(plan)


@pytest.mark.parametrize("name", ["hc-smoe", "m-smoe", "ream", "sub-moe uniform"])
def test_clusters_may_keep_within_routing_groups(name, checkpoint, context):
    model, (method, options) = checkpoint("deepseek_v3"), METHODS[name]
    plan = method(options(keep=4, routing_groups="keep", protect="none"), stats_of(model), model, context())
    for p in plan.values():
        assert [int(lead) // 4 for lead in p.lead_K] == [0, 0, 1, 1]
        assert all({e // 4 for e in p.members(g)} == {int(lead) // 4} for g, lead in enumerate(p.lead_K))


def test_groups_of_routing_must_divide_what_is_kept(checkpoint):
    (problem,) = MSmoe(keep=5, routing_groups="keep").problems(checkpoint("deepseek_v3").facts)
    assert problem.message == "`keep` must be a multiple of the router's 2 groups (`n_group`), got 5"
    assert problem.hint == "use `keep: 4`"


@pytest.mark.parametrize("options", [MSmoe(keep=4, uniform=False, routing_groups="keep"),
                                     SubMoe(keep=4, routing_groups="keep")])  # fmt: skip
def test_routing_groups_need_one_count(options, checkpoint):
    (problem,) = options.problems(checkpoint("deepseek_v3").facts)
    assert "needs the same number in every layer" in problem.message
