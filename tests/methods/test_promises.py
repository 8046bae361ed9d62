"""What holds for every way of dropping and merging experts, on one family of each kind of router.

Softmax renormalised (qwen3_moe), softmax as it is (olmoe; qwen2_moe with a shared expert), sigmoid with a correction
bias, groups and a shared expert (deepseek_v3), top-k before softmax with a logit bias (gpt_oss).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, ExpertPlan, LayerPlan, sketch_of
from moecli.engine.collectors import collectors
from moecli.engine.data import Batch
from moecli.engine.stats import merged
from moecli.engine.sweep import sweep
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.ops.averaging import shares
from moecli.runner import lookup

FAMILIES = ("qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss")
EXPERTS = 8
PRUNING = [name for name in lookup.names() if name.startswith("prune/")]
CLUSTERING = [name for name in lookup.names() if name.startswith("cluster/")]
MERGING = [name for name in lookup.names() if name.startswith("merge/") and "plan" in lookup.find(name).inputs]


@pytest.fixture(scope="module")
def observed(tiny_model):
    """`observed("olmoe")`: statistics of all kinds that these stages read, on random tokens."""
    from moecli.families import facts_of
    from moecli.io.reader import FolderCheckpoint

    made = {}

    def get(family, some=slice(None), **options):
        if (key := (family, str(some), str(options))) not in made:
            model = FolderCheckpoint(tiny_model(family, **options), facts_of)
            names = sorted({n for name in PRUNING + CLUSTERING + MERGING for n in needs(name)})
            found = {
                layer.index: layer.observe(collectors(names))
                for layer in sweep(model, batches()[some])
                if layer.index in model.facts.moe_layers
            }
            made[key] = CalibrationStats(found, {"digest": str(some)})
        return made[key]

    return get


def needs(name):
    stage = lookup.find(name)
    return stage.needs(options_of(name, 4))


def options_of(name, keep, **more):
    kind = lookup.find(name).options
    given = {"keep": keep, **more} if "keep" in kind.model_fields else more
    if name == "prune/naee":
        given["groups"] = "flatten"
    if name == "cluster/sub-moe":
        given["alloc"] = "uniform"
    return kind(**given)


def batches():
    rng = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, 100, (2, 20), generator=rng) for _ in range(4)]
    return [Batch(part, torch.ones_like(part)) for part in ids]


def apply(name, opt, ctx, **artifacts):
    stage = lookup.find(name)
    return stage(opt, **{n: artifacts[n] for n in stage.inputs}, ctx=ctx)


def logits(checkpoint):
    with torch.no_grad():
        return load_model(checkpoint).eval()(batches()[0].input_ids).logits


# -- nothing left out is nothing changed


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_experts_changes_no_bit(family, name, checkpoint, context, observed):
    model, ctx = checkpoint(family), context()
    opt = options_of(name, EXPERTS, protect="none")
    if name == "prune/naee":  # ends the grouping, which does change the routing of a grouped router
        model = checkpoint(family, n_group=1, topk_group=1) if family == "deepseek_v3" else model
    apply(name, opt, ctx, model=model, stats=observed(family))
    pruned = ctx.finish(model)
    assert all(torch.equal(pruned.get(n), model.get(n)) for n in model.names())
    assert torch.equal(logits(pruned), logits(model))


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_one_change_no_bit(family, name, checkpoint, context, observed):
    model, ctx = checkpoint(family), context()
    opt = options_of("cluster/m-smoe", EXPERTS, protect="none")
    plan = apply("cluster/m-smoe", opt, context("plan"), model=model, stats=observed(family))
    apply(name, options_of(name, EXPERTS), ctx, model=model, plan=plan, stats=observed(family))
    alias = ctx.finish(model)
    assert all(torch.equal(alias.get(n), model.get(n)) for n in model.names())
    assert torch.equal(logits(alias), logits(model))


# -- alias maps


GROUPS = torch.tensor([0, 1, 1, 0, 2, 3, 2, 2])
LEADS = torch.tensor([0, 2, 4, 5])


def grouped(model, count_E=None, group_E=GROUPS, lead_K=LEADS):
    count_E = torch.arange(1.0, 9) if count_E is None else count_E
    share_E = shares(count_E, group_E, len(lead_K))
    return ExpertPlan({layer: LayerPlan(group_E, share_E, lead_K) for layer in model.facts.moe_layers})


def with_equal_members(model, ctx):
    """The model with every expert replaced by its group's lead."""
    family = family_of(model.config)
    with ctx.writer(model) as out:
        for layer in model.facts.moe_layers:
            experts = [family.read_expert(model, layer, int(LEADS[g])) for g in GROUPS]
            out.part(f"{layer}", lambda part, i=layer, some=experts: family.write_experts(part, model, i, some))
    return ctx.finish(model)


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_merge_without_loss_and_their_weights_add(family, name, checkpoint, context, observed):
    """Some tokens choose two members of one group: the merged expert then counts with the sum of both weights."""
    model = checkpoint(family)
    equal, ctx = with_equal_members(model, context("equal")), context("merged")
    kind = family_of(model.config)
    twice = 0
    for layer in model.facts.moe_layers:
        x = observed(family)[layer]["tok_reservoir"].float()
        chosen = GROUPS[kind.route_tokens(equal, layer, x).experts_Tk]
        twice += int((chosen[:, 0] == chosen[:, 1]).sum())
    assert twice > 0
    options = {"ridge": 1e3} if name == "merge/merge-moe" else {}
    apply(name, options_of(name, 4, **options), ctx, model=equal, plan=grouped(model), stats=observed(family))
    assert (logits(ctx.finish(equal)) - logits(equal)).abs().max() < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_than_the_router_picks_work_behind_an_alias_map(family, checkpoint, context):
    """One expert, two picks: it gets the sum of the weights, whatever was picked."""
    model, ctx = checkpoint(family), context()
    everyone = torch.zeros(EXPERTS, dtype=torch.int64)
    plan = grouped(model, group_E=everyone, lead_K=torch.tensor([2]))
    apply("merge/weighted", options_of("merge/weighted", 1), ctx, model=model, plan=plan, stats=None)
    alias, kind = ctx.finish(model), family_of(model.config)
    assert (alias.facts.experts, alias.facts.top_k) == (1, 2)
    loaded, seen = load_model(alias).eval(), {}
    for layer in model.facts.moe_layers:
        experts = loaded.get_submodule(kind.experts_module(layer))
        experts.register_forward_hook(lambda m, args, out, i=layer: seen.update({i: (args, out)}))
    with torch.no_grad():
        loaded(batches()[0].input_ids)
    for layer, ((x, _, weights), out) in seen.items():
        only = family_of(alias.config).read_expert(alias, layer, 0)
        expected = weights.sum(-1, keepdim=True) * kind.expert_forward(only, x)
        assert torch.allclose(out, expected.view(out.shape), atol=1e-5)


# -- what the router does after rows are gone


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_weights_after_rows_are_dropped(family, checkpoint, context):
    """Renormalised: survivors keep their ratios. Softmax as it is: every weight grows by 1 / (1 - dropped
    probability). Sigmoid: scores stay, only their sum is another.
    """
    model, ctx = checkpoint(family), context()
    kind, kept = family_of(model.config), [0, 1, 3, 4, 6, 7]
    with ctx.writer(model, config=kind.shrink_config(model.config, len(kept))) as out:
        for layer in model.facts.moe_layers:

            def write(part, i=layer):
                kind.keep_experts(part, model, i, kept)
                kind.keep_router_rows(part, model, i, kept)

            out.part(str(layer), write)
    pruned, after = ctx.finish(model), family_of(family_config(ctx, model))
    layer = model.facts.moe_layers[0]
    x = torch.randn(64, model.facts.hidden, generator=torch.Generator().manual_seed(0))
    before, now = kind.route_tokens(model, layer, x), after.route_tokens(pruned, layer, x)
    probability_TE = kind.router_logits(model, layer, x).softmax(-1)
    compared = 0
    for t in range(64):
        old = dict(zip(before.experts_Tk[t].tolist(), before.weights_Tk[t].tolist(), strict=True))
        new = {kept[e]: float(w) for e, w in zip(now.experts_Tk[t].tolist(), now.weights_Tk[t], strict=True)}
        if set(old) != set(new):
            continue
        compared += 1
        grow = 1.0
        if model.facts.score == "softmax" and not model.facts.renormalized:
            grow = 1 / float(probability_TE[t, kept].sum())
        assert [new[e] for e in old] == pytest.approx([grow * w for w in old.values()], rel=1e-4)
    assert compared > 10


def family_config(ctx, model):
    from moecli.io.overlay import OverlayCheckpoint

    return OverlayCheckpoint(ctx.folder.path, model).config


@pytest.mark.parametrize("groups", ["per_group", "flatten", "mask"])
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_a_group_limited_router_never_picks_what_is_gone(groups, shift, checkpoint, context, observed):
    """Also when every correction bias is negative: in the modules of transformers, with scores of -5 and -inf alike."""
    fields = {"experts": 12, "n_group": 3, "topk_group": 2, "top_k": 3}
    model, ctx, moved = checkpoint("deepseek_v3", **fields), context(), context("moved")
    family = family_of(model.config)
    with moved.writer(model) as out:
        for layer in model.facts.moe_layers:
            name = family.router_role(model, layer, "correction")
            out.part(str(layer), lambda part, n=name: part.put(n, model.get(n) + shift))
    shifted = moved.finish(model)
    opt = options_of("prune/reap", 6, protect="none", groups=groups)
    apply("prune/reap", opt, ctx, model=shifted, stats=observed("deepseek_v3", **fields))
    pruned = ctx.finish(shifted)
    loaded, after, seen = load_model(pruned).eval(), family_of(pruned.config), {}
    for layer in model.facts.moe_layers:
        experts = loaded.get_submodule(after.experts_module(layer))
        experts.register_forward_pre_hook(lambda m, args, i=layer: seen.update({i: args}))
    with torch.no_grad():
        loaded(batches()[0].input_ids)
    for layer, (_, index_Tk, weights_Tk) in seen.items():
        kept = ctx.records["kept"][str(layer)]
        allowed = set(kept) if groups == "mask" else set(range(6))
        assert set(index_Tk.flatten().tolist()) <= allowed
        assert (weights_Tk > 0).all()
        assert torch.allclose(weights_Tk.sum(-1), torch.tensor(float(model.config["routed_scaling_factor"])), atol=1e-4)
        if groups == "per_group":
            assert [sum(e // 4 == g for e in kept) for g in range(3)] == [2, 2, 2]
            block_Tk = torch.tensor(kept)[index_Tk] // 4
            assert max(len(set(row)) for row in block_Tk.tolist()) <= 2


# -- one choice, however the text was split


@pytest.mark.parametrize("name", PRUNING + CLUSTERING)
def test_statistics_of_two_halves_choose_what_those_of_the_whole_choose(name, checkpoint, context, observed):
    """Calibration on several machines adds sums in another order; the choice is the same."""
    model, chosen = checkpoint("qwen3_moe"), []
    halves = merged(observed("qwen3_moe", slice(0, 2)), observed("qwen3_moe", slice(2, 4)))
    layers = {i: replace(s, extra=dict(s.extra) | samples(observed("qwen3_moe")[i])) for i, s in halves.items()}
    for at, stats in enumerate((observed("qwen3_moe"), CalibrationStats(layers))):
        ctx = context(f"{at}")
        result = apply(name, options_of(name, 4), ctx, model=model, stats=stats)
        chosen.append(ctx.records.get("kept") or {i: p.group_E.tolist() for i, p in result.items()})
    assert chosen[0] == chosen[1]


def samples(whole):
    """Halves of one text that were collected apart number their tokens alike and so keep other samples."""
    return {name: value for name, value in whole.extra.items() if name.startswith(("tok_reservoir", "act_sample"))}


@pytest.mark.parametrize("name", PRUNING)
def test_a_forecast_is_what_comes_out(name, checkpoint, context, observed):
    model, ctx = checkpoint("deepseek_v3"), context()
    opt = options_of(name, 4)
    apply(name, opt, ctx, model=model, stats=observed("deepseek_v3"))
    pruned = ctx.finish(model)
    forecast = opt.forecast(sketch_of(model))
    assert (forecast.facts, forecast.specs) == (pruned.facts, {n: pruned.spec(n) for n in pruned.names()})
