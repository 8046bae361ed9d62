"""Zeros in routed experts: masks against loops, N:M exact in every family, reports, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, CalibrationText, LayerStats
from moecli.core.errors import RecipeError, StageFailed
from moecli.engine.collectors import collectors
from moecli.engine.sweep import sweep
from moecli.families import family_of
from moecli.families.adapter import load_model
from moecli.methods.matrices import MATRICES
from moecli.methods.slim.moe_pruner import MoePruner, moe_pruner
from moecli.methods.slim.sparsegpt import Sparsegpt, sparsegpt
from moecli.methods.slim.wanda import Wanda, wanda
from moecli.ops.gptq import factor
from moecli.ops.sparsity import Pattern, has_pattern
from moecli.ops.sparsity import sparsegpt as solve
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe
from tests import tiny
from tests.engine.texts import random_batches
from tests.methods.test_slim import folder_of

NAMES = ("x2", "h2", "px2", "ph2")


def stats_of(model, names=NAMES):
    layers = sweep(model, random_batches((4, 4)))
    return CalibrationStats({layer.index: layer.observe(collectors(names)) for layer in layers if layer.is_moe})


def text_of(model, samples=8, tokens=32):
    ids = torch.randint(4, model.facts.vocab, (samples, tokens), generator=torch.Generator().manual_seed(7))
    return CalibrationText(ids, torch.ones_like(ids), "digest")


def experts_of(checkpoint, layer):
    return family_of(checkpoint.config).read_experts(checkpoint, layer)


def logits(checkpoint):
    batch = random_batches((3,), seed=5)[0]
    with torch.no_grad():
        return load_model(checkpoint)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def made_up(model, seed=0):
    """Statistics of nothing; expert 0 of every layer saw no token."""
    rng, facts = torch.Generator().manual_seed(seed), model.facts
    layers = {}
    for layer in facts.moe_layers:
        count = torch.randint(1, 50, (facts.experts,), generator=rng)
        count[0] = 0
        sizes = {"x": facts.hidden, "h": facts.expert_width}
        extra = {f"{p}{into}2": torch.rand(facts.experts, size, generator=rng).double() * (count > 0)[:, None]
                 for p in ("", "p") for into, size in sizes.items()}  # fmt: skip
        layers[layer] = LayerStats(100, count, count.double(), extra)
    return CalibrationStats(layers)


METHODS = {
    "wanda": lambda model, sparsity, ctx: wanda(Wanda(sparsity=sparsity), made_up(model), model, ctx),
    "moe-pruner": lambda model, sparsity, ctx: moe_pruner(MoePruner(sparsity=sparsity), made_up(model), model, ctx),
    "sparsegpt": lambda model, sparsity, ctx: sparsegpt(Sparsegpt(sparsity=sparsity), text_of(model), model, ctx),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_is_exact_in_every_family_and_nothing_else_changes(method, family, checkpoint, context):
    model, ctx = checkpoint(family), context(method)
    METHODS[method](model, "2:4", ctx)
    sparse = ctx.finish(model)
    assert {n: sparse.spec(n) for n in sparse.names()} == {n: model.spec(n) for n in model.names()}
    for layer in model.facts.moe_layers:
        before, after = experts_of(model, layer), experts_of(sparse, layer)
        for field in MATRICES:
            values = getattr(after, field)
            assert has_pattern(values, Pattern(2, 4))
            assert float((values == 0).float().mean()) == 0.5
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[3:], after[3:], strict=True))
    experts = {x.name for x in family_of(model.config).linears(model) if x.role == "expert"}
    for name in set(model.names()) - experts:
        if "experts" not in name:
            assert torch.equal(sparse.get(name), model.get(name))
    assert set(ctx.records["sparsity"].values()) == {0.5}
    assert "(50.00%, 2:4 in every row); they take as many bytes as before" in ctx.notes[-1]
    assert not torch.allclose(logits(sparse), logits(model), atol=1e-3)


@pytest.mark.parametrize(("stage", "options", "prefix"), [(wanda, Wanda, ""), (moe_pruner, MoePruner, "p")])
def test_the_mask_is_a_loop_over_rows(stage, options, prefix, checkpoint, context):
    model, ctx = checkpoint(), context()
    stats = stats_of(model)
    stage(options(sparsity=0.3), stats, model, ctx)
    sparse = ctx.finish(model)
    for layer in model.facts.moe_layers:
        before, after = experts_of(model, layer), experts_of(sparse, layer)
        for field, into in MATRICES.items():
            square = stats[layer][f"{prefix}{into}2"]
            for expert in range(model.facts.experts):
                for row, new in zip(getattr(before, field)[expert], getattr(after, field)[expert], strict=True):
                    score = row.abs() * square[expert].sqrt()  # a common factor of a row changes no order
                    gone = score.argsort()[: int(0.3 * len(row))]
                    wanted = row.clone()
                    wanted[gone] = 0
                    assert torch.equal(new, wanted)


def test_a_whole_matrix_may_be_compared(checkpoint, context):
    model, ctx = checkpoint(), context()
    wanda(Wanda(sparsity=0.5, compare="matrix"), stats_of(model), model, ctx)
    down = experts_of(ctx.finish(model), 1).down_DF
    assert (down == 0).flatten(1).sum(1).eq(down[0].numel() // 2).all()
    assert len(set((down == 0).sum(-1).flatten().tolist())) > 1


def test_an_expert_without_tokens_loses_its_smallest_weights(checkpoint, context):
    model, ctx = checkpoint(), context()
    wanda(Wanda(), made_up(model), model, ctx)
    before, after = experts_of(model, 0).gate_FD[0], experts_of(ctx.finish(model), 0).gate_FD[0]
    threshold = before.abs().median(1).values
    assert torch.equal(after, before.masked_fill(before.abs() <= threshold[:, None], 0))
    assert "2 of 16 experts saw no calibration token; their weights were ranked by size" in ctx.notes


def test_sparsegpt_in_one_layer_is_the_solution_for_each_matrix(checkpoint, context):
    """Routed inputs of the first layer, collected by hand in float64; an expert with few tokens leans on the layer."""
    model, ctx = checkpoint(), context()
    text = text_of(model, samples=16)
    sparsegpt(Sparsegpt(sparsity=0.5), text, model, ctx)
    sparse, facts = ctx.finish(model), model.facts
    net, seen = load_model(model), {}
    experts = net.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda _, args, __: seen.update(x=args[0], index=args[1]))
    with torch.no_grad():
        net(input_ids=text.ids)
    x = seen["x"].double()
    rungs = []
    for e in range(facts.experts):
        mine = x[(seen["index"] == e).any(1)]
        n, weight = len(mine), experts_of(model, 0)
        gate, up = (m[e].double() for m in (weight.gate_FD, weight.up_FD))
        h = torch.nn.functional.silu(mine @ gate.T) * (mine @ up.T)
        eye = torch.eye(facts.expert_width, dtype=torch.float64)
        for field, inner, other in (("gate_FD", mine, x.T @ x / len(x)), ("down_DF", h, None)):
            own = inner.T @ inner / n
            size = len(own)
            other = own.diagonal().mean() * eye if other is None else other
            share = size / (size + n) if n < 2 * size else 0.0
            rungs.append(share > 0)
            moment = (1 - share) * own + share * other
            upper = factor(moment[None], 0.01, act_order=False).upper_ECC
            wanted = solve(getattr(weight, field)[e][None].double(), upper, 0.5)[0]
            got = getattr(experts_of(sparse, 0), field)[e].double()
            off = (got == 0) != (wanted == 0)
            assert off.double().mean() < 0.01  # float32 sums decide near ties otherwise
            torch.testing.assert_close(got[~off.any(1)], wanted[~off.any(1)], rtol=1e-3, atol=1e-4)
    assert any(rungs) and not all(rungs)
    said = next(note for note in ctx.notes if "second moments" in note)
    assert f"of {2 * 2 * facts.experts} second moments" in said


class Mixed:
    """A checkpoint with some tensors of another."""

    def __init__(self, source, change):
        self.source, self.config, self.change = source, source.config, change

    def names(self):
        return self.source.names()

    def get(self, name):
        return self.change(name, self.source.get(name))


def test_later_layers_see_the_sparse_ones(checkpoint, context, tmp_path):
    """Behind a first layer that is sparse already, and stays as it is, the second becomes the same."""
    model, ctx = checkpoint(), context("both")
    sparsegpt(Sparsegpt(), text_of(model), model, ctx)
    both = ctx.finish(model)
    mixed = folder_of(Mixed(model, lambda name, old: both.get(name) if ".layers.0." in name else old), tmp_path)
    ctx = context("again")
    sparsegpt(Sparsegpt(), text_of(model), mixed, ctx)
    again = ctx.finish(mixed)
    for layer in (0, 1):
        for old, new in zip(experts_of(both, layer)[:3], experts_of(again, layer)[:3], strict=True):
            assert torch.equal(old, new)


def test_sparsegpt_loses_less_than_wanda_on_the_layer_it_saw(checkpoint, context):
    model = checkpoint()
    text = text_of(model, samples=32)
    losses = {}
    for name in ("wanda", "sparsegpt"):
        ctx = context(name)
        if name == "wanda":
            wanda(Wanda(), stats_of(model), model, ctx)
        else:
            sparsegpt(Sparsegpt(), text, model, ctx)
        outputs = []
        for checkpoint_ in (model, ctx.finish(model)):
            net = load_model(checkpoint_)
            net.model.layers[0].mlp.register_forward_hook(lambda _, __, out, o=outputs: o.append(out))
            with torch.no_grad():
                net(input_ids=text.ids)
        losses[name] = float((outputs[1] - outputs[0]).square().mean() / outputs[0].square().mean())
    assert losses["sparsegpt"] < losses["wanda"]


# -- what is refused


@pytest.mark.parametrize(
    ("sparsity", "message", "hint"),
    [
        ("4:8", "groups of 8 do not divide the model width 60 and the expert width 36", "write `sparsity: 0.5`"),
        ("1:4", None, None),
        (0.01, "0.01 of a row of 36 weights is less than one", "write `sparsity: 0.028` or more"),
    ],
)
def test_a_sparsity_that_cannot_work_is_told_before_anything_runs(sparsity, message, hint, checkpoint):
    facts = dataclasses.replace(checkpoint().facts, hidden=60, expert_width=36)
    found = [(problem.option, problem.message, problem.hint) for problem in Wanda(sparsity=sparsity).problems(facts)]
    assert found == ([("sparsity", message, hint)] if message else [])


@pytest.mark.parametrize("sparsity", [0, 1, 1.5, "half", "0:4", "2:4:8", True])
def test_what_is_no_sparsity_is_refused_with_its_place(sparsity, tiny_model, tmp_path):
    stages = [{"run": "calibrate/text", "with": {"dataset": "nothing.jsonl"}},
              {"run": "slim/sparsegpt", "with": {"sparsity": sparsity}}]  # fmt: skip
    recipe = {"recipe": 1, "model": str(tiny_model("qwen3_moe")), "stages": stages}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError) as caught:
        open_recipe(tmp_path / "r.yaml")
    (found,) = [d for d in caught.value.diagnostics if "sparsity" in d.message]
    assert found.place.line == 1


def test_inputs_that_are_no_numbers_stop_the_stage(checkpoint, context):
    model, stats = checkpoint(), made_up(checkpoint())
    stats[1]["h2"][3, 5] = torch.nan
    with pytest.raises(StageFailed, match=r"sums over input 5 of expert 3 \(h\) are not numbers") as caught:
        wanda(Wanda(), stats, model, context())
    assert caught.value.where == "layer 1"


def test_weights_that_are_no_numbers_stop_sparsegpt(checkpoint, context, tmp_path):
    def spoil(name, value):
        return value.fill_(torch.nan) if name == "model.embed_tokens.weight" else value

    model = folder_of(Mixed(checkpoint(), spoil), tmp_path)
    with pytest.raises(StageFailed, match="hold values that are not numbers") as caught:
        sparsegpt(Sparsegpt(), text_of(model), model, context())
    assert caught.value.where == "layer 0"


def test_statistics_of_another_model_are_refused(checkpoint, context):
    model = checkpoint()
    with pytest.raises(StageFailed, match="the statistics are of 4 experts with 64 inputs, the model has 8 with 64"):
        wanda(Wanda(), made_up(checkpoint(experts=4)), model, context())


# -- whole recipes


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", ["wanda", "moe-pruner", "sparsegpt"])
def test_a_recipe_exports_a_stock_model_with_the_zeros(method, family, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    rows = [json.dumps({"text": f"some words {i} " * 20}) for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    calibrate = {"dataset": str(tmp_path / "text.jsonl"), "samples": 4, "tokens_per_sample": 32}
    stages = [{"run": "calibrate/statistics", "with": calibrate},
              {"run": f"slim/{method}", "with": {"sparsity": "2:4"}}]  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"recipe": 1, "model": str(tiny_model(family)), "stages": stages}))
    opened = open_recipe(tmp_path / "r.yaml")
    result = run_plan(opened, tmp_path / "run")
    assert (result.report.export, result.report.verification.status) == ("stock", "passed")
    modules = AutoModelForCausalLM.from_pretrained(result.model).named_modules()
    experts = [module for name, module in modules if name.endswith(".experts")]
    assert len(experts) == 2
    for some in experts:
        assert has_pattern(some.gate_up_proj, Pattern(2, 4))
        assert has_pattern(some.down_proj, Pattern(2, 4))
