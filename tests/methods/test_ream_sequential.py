"""REAM layer by layer: each layer is judged on what the merged layers before it give."""

from __future__ import annotations

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, CalibrationText, LayerStats, sketch_of
from moecli.core.errors import StageFailed
from moecli.engine.data import batches_of
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.methods.cluster.ream import Ream as Cluster
from moecli.methods.cluster.ream import ream as cluster
from moecli.methods.merge.ream import Ream as Merge
from moecli.methods.merge.ream import ream as merge
from moecli.methods.merge.ream_sequential import ReamSequential, ream_sequential
from tests.engine import oracle

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss"]
NAMES = ("gean_sum", "gy_mean", "logit_gram", "tok_reservoir")


def text():
    ids = torch.randint(4, 100, (4, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return CalibrationText(ids, mask, "random")


def seen_by(model, checkpoint):
    """Statistics of a whole model in transformers, token by token, under the names of the catalogue."""
    found = oracle.statistics(model, checkpoint, batches_of(text(), 2))
    return CalibrationStats({
        layer: LayerStats(int(s["tokens"]), s["count"].long(), s["gate_sum"], {name: s[name] for name in NAMES})
        for layer, s in found.items()
    })  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_layer_is_planned_and_merged_behind_the_merged_ones(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context("sequential")
    opt = ReamSequential(keep=4, limit=3, batch_size=2)
    assert not list(opt.problems(model.facts))
    ream_sequential(opt, text(), model, ctx)
    made = ctx.finish(model)
    forecast = opt.forecast(sketch_of(model))
    assert (forecast.facts, forecast.specs) == (made.facts, {n: made.spec(n) for n in made.names()})

    first, second = model.facts.moe_layers
    whole = load_model(model).eval()
    original = seen_by(load_model(model).eval(), model)
    whole.model.layers[first] = load_model(made).eval().model.layers[first]
    behind = seen_by(whole, model)
    assert not torch.allclose(behind[second]["gean_sum"], original[second]["gean_sum"], rtol=1e-3)

    stats = CalibrationStats({first: original[first], second: behind[second]})
    within = "keep" if model.facts.groups > 1 else "span"
    plan_opt = Cluster(keep=4, limit=3, protect="none", routing_groups=within)
    plan = cluster(plan_opt, stats, model, context("plan"))
    assert ctx.records["groups"] == {str(layer): p.group_E.tolist() for layer, p in plan.items()}
    assert ctx.records["leads"] == {str(layer): p.lead_K.tolist() for layer, p in plan.items()}

    apart, family = context("apart"), family_of(made.config)
    merge(Merge(), plan, model, stats, apart)
    alias = apart.finish(model)
    for layer in (first, second):
        found, expected = family.read_experts(made, layer), family_of(alias.config).read_experts(alias, layer)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine is theirs is None or torch.allclose(mine, theirs, atol=1e-5)
        for name, axis in family.router_tensors(made, layer).items():
            assert torch.equal(made.get(name), model.get(name).index_select(axis, plan[layer].lead_K))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_stopped_stage_goes_on_behind_what_is_written(model_type, checkpoint, context, monkeypatch):
    model, opt = checkpoint(model_type), ReamSequential(keep=4, batch_size=2)
    whole, broken = context("whole"), context("broken")
    ream_sequential(opt, text(), model, whole)
    expected = whole.finish(model)
    from moecli.methods.merge import ream_sequential as module

    plans, plan = [], module._plan

    def once(*args):
        plans.append(args[1])
        if len(plans) == 2:
            raise KeyboardInterrupt
        return plan(*args)

    monkeypatch.setattr(module, "_plan", once)
    with pytest.raises(KeyboardInterrupt):
        ream_sequential(opt, text(), model, broken)
    ream_sequential(opt, text(), model, broken)
    found = broken.finish(model)
    first, second = model.facts.moe_layers
    assert plans == [first, second, second], "the first layer is not planned again"
    assert all(torch.equal(found.get(name), expected.get(name)) for name in expected.names())
    assert broken.records["groups"] == whole.records["groups"]


def test_what_cannot_be_merged_is_refused(checkpoint, context):
    facts = checkpoint("deepseek_v3").facts
    (problem,) = ReamSequential(keep=5).problems(facts)
    assert problem.hint == "use `keep: 4`"
    (problem,) = ReamSequential(keep=2, limit=3).problems(checkpoint().facts)
    assert (problem.message, problem.hint) == (
        "2 groups of at most 3 cannot hold 8 experts", "write `limit: 4` or more",
    )  # fmt: skip
    model = checkpoint()
    silent = CalibrationText(text().ids, torch.zeros_like(text().ids), "none")
    with pytest.raises(StageFailed, match="no calibration token was routed to any expert") as caught:
        ream_sequential(ReamSequential(keep=4), silent, model, context("silent"))
    assert caught.value.where == "layer 0"
    stats = CalibrationStats({})
    with pytest.raises(StageFailed, match="no text of their own"):
        ream_sequential(ReamSequential(keep=4), stats, model, context("bare"))
