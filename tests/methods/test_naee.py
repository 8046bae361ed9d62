"""NAEE against the model itself: the loss of a set is the error of a really pruned layer."""

import itertools
import math

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import StageFailed
from moecli.families import family_of
from moecli.methods.prune import naee as module
from moecli.methods.prune.naee import Naee, naee


def stats_of(model, tokens=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    layers, experts = {}, model.facts.experts
    for layer in model.facts.moe_layers:
        x = torch.randn(tokens, model.facts.hidden, generator=rng)
        ones = torch.ones(experts, dtype=torch.int64)
        layers[layer] = LayerStats(tokens, ones, ones.double(), {"tok_reservoir": x, "absmax": ones.float()})
    return CalibrationStats(layers)


def routed_sum(family, checkpoint, layer, x_TD):
    """The routed sum of a layer, one token and one expert at a time."""
    weights_Tk, experts_Tk = family.route_tokens(checkpoint, layer, x_TD)
    out_TD = torch.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        for g, e in zip(weights_Tk[t], experts_Tk[t].tolist(), strict=True):
            out_TD[t] += g * family.expert_forward(family.read_expert(checkpoint, layer, e), x[None])[0]
    return out_TD


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3"])
def test_the_loss_of_a_set_is_the_error_of_the_pruned_layer(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    stats, keep = stats_of(model), model.facts.experts - 2
    opt = Naee(keep=keep, protect="none", groups="flatten")
    assert not list(opt.problems(model.facts))
    naee(opt, stats, model, ctx)
    pruned = ctx.finish(model)
    family, after = family_of(model.config), family_of(pruned.config)
    for layer, s in stats.items():
        replay = module._Replay(family, model, layer, s["tok_reservoir"], torch.device("cpu"))
        x = s["tok_reservoir"]
        whole, cut = routed_sum(family, model, layer, x), routed_sum(after, pruned, layer, x)
        kept = ctx.records["kept"][str(layer)]
        error = float((whole - cut).square().sum())
        assert float(replay.loss(torch.tensor([kept]))) == pytest.approx(error, rel=1e-4)
        assert ctx.records["relative_error"][str(layer)] == pytest.approx(error / float(whole.square().sum()), rel=1e-4)


def test_exhaustive_finds_the_best_set_and_greedy_none_better(checkpoint, context):
    model = checkpoint("mixtral")
    stats = stats_of(model)
    layer, experts = model.facts.moe_layers[0], model.facts.experts
    replay = module._Replay(family_of(model.config), model, layer, stats[layer]["tok_reservoir"], torch.device("cpu"))
    sets = list(itertools.combinations(range(experts), 3))
    losses = [float(replay.loss(torch.tensor([s]))) for s in sets]
    found = {}
    for search in ("auto", "greedy", "beam"):
        ctx = context(search)
        naee(Naee(keep=3, protect="none", search=search), stats, model, ctx)
        found[search] = losses[sets.index(tuple(ctx.records["kept"][str(layer)]))]
    assert found["auto"] == min(losses) <= found["beam"] <= found["greedy"] < max(losses)


def test_a_protected_expert_is_in_the_set(checkpoint, context, monkeypatch):
    model = checkpoint("mixtral")
    stats, first = stats_of(model), model.facts.moe_layers[0]
    for search in ("exhaustive", "greedy"):
        free, bound = context(f"free-{search}"), context(f"bound-{search}")
        naee(Naee(keep=3, protect="none", search=search), stats, model, free)
        lost = next(e for e in range(8) if e not in free.records["kept"][str(first)])
        monkeypatch.setattr("moecli.methods.prune.super_experts", lambda absmax, layers, lost=lost: {first: [lost]})
        naee(Naee(keep=3, search=search), stats, model, bound)
        replay = module._Replay(
            family_of(model.config), model, first, stats[first]["tok_reservoir"], torch.device("cpu")
        )
        sets = [s for s in itertools.combinations(range(8), 3) if lost in s]
        kept = tuple(bound.records["kept"][str(first)])
        assert kept in sets
        if search == "exhaustive":
            assert kept == min(sets, key=lambda s: float(replay.loss(torch.tensor([s]))))


def test_skip_thresholds_are_medians_of_the_second_weight_over_the_first(checkpoint, context):
    model, ctx = checkpoint("mixtral"), context()
    stats, family = stats_of(model, tokens=20), family_of(model.config)
    naee(Naee(keep=6, protect="none", tokens=11), stats, model, ctx)
    for layer, s in stats.items():
        pairs = family.route_tokens(model, layer, s["tok_reservoir"][:11]).weights_Tk
        ratios = sorted(float(min(p) / max(p)) for p in pairs)
        assert ctx.records["skip_thresholds"][str(layer)] == pytest.approx(ratios[5], rel=1e-6)


def test_what_cannot_be_searched_is_refused(checkpoint, context):
    grouped, plain = checkpoint("deepseek_v3").facts, checkpoint("mixtral").facts
    (problem,) = Naee(keep=4).problems(grouped)
    assert (problem.option, problem.hint) == ("groups", "write `groups: flatten`")
    from dataclasses import replace

    wide = replace(plain, experts=128, router_rows=128)
    (problem,) = Naee(keep=64, search="exhaustive").problems(wide)
    assert f"{math.comb(128, 64):.1e}" in problem.message
    with pytest.raises(StageFailed, match="no token was sampled"):
        naee(Naee(keep=4), stats_of(checkpoint("mixtral"), tokens=0), checkpoint("mixtral"), context())
