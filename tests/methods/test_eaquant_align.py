"""Routers on a grid: which values, on which tokens, and what the report says."""

import pytest
import torch

from moecli.families import FAMILIES, adapter, family_of
from moecli.methods.router import Router
from moecli.methods.router.eaquant_align import EaquantAlign, eaquant_align
from moecli.ops.alignment import Inputs, clipped, divergence, joint
from moecli.runner.open import sketch_of
from tests.methods.test_gptq import hooked, quantized, text_for


def aligned(model, ctx, text=None, **options):
    opt = EaquantAlign(**options)
    eaquant_align(opt, text or text_for(model, samples=8, tokens=40), model, ctx)
    return ctx.finish(model), opt


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_rounded_routers_and_nothing_else_changes(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    found, opt = aligned(model, ctx, search="weights")
    assert opt.forecast(sketch_of(model)) == sketch_of(found) == sketch_of(model)
    family = family_of(model.config)
    routers = {family.router_role(model, layer, "weight") for layer in model.facts.moe_layers}
    changed = {name for name in model.names() if not torch.equal(found.get(name), model.get(name))}
    assert changed == routers
    for name in routers:
        rows = found.get(name).float()
        assert all(len(row.unique()) <= 256 for row in rows)
        assert (rows - model.get(name).float()).abs().max() < 0.03 * model.get(name).float().abs().max()
    assert ctx.records["router_kl"].keys() == {str(layer) for layer in model.facts.moe_layers}


@pytest.mark.parametrize("top", [0.0, 0.5, 1.0])
def test_the_ratio_is_the_best_on_the_tokens_that_really_come(top, checkpoint, context):
    """Of the second layer too, which sees what the first rounded router makes."""
    model, ctx = checkpoint("qwen2_moe"), context()
    text = text_for(model, samples=8, tokens=40)
    found, _ = aligned(model, ctx, text, bits=3, top=top)
    state = adapter.load_model(model, "cpu", torch.float32)
    rows, k = model.facts.experts, model.facts.top_k
    for layer in model.facts.moe_layers:
        name = f"model.layers.{layer}.mlp.gate.weight"
        x = hooked(state, text.ids)[f"model.layers.{layer}.mlp.experts"][0].reshape(-1, model.facts.hidden)
        weight = model.get(name)
        logits = x @ weight.float().T
        seen = Inputs(x, None, logits.topk(k + round(top * (rows - k)), -1).indices, logits)
        ratio = joint(weight, seen, 3)
        assert torch.equal(found.get(name), clipped(weight, ratio, 3))
        record = ctx.records["router_kl"][str(layer)]
        assert record["chosen"] == pytest.approx(float(divergence(seen, seen.logits(found.get(name)))), rel=1e-3)
        assert record["plain"] == pytest.approx(
            float(divergence(seen, seen.logits(clipped(weight, torch.ones(rows), 3)))), rel=1e-3
        )
        chosen = [z.topk(k, -1).indices.sort(-1).values for z in (logits, seen.logits(found.get(name)))]
        assert record["moved"] == pytest.approx(float((chosen[0] != chosen[1]).any(-1).float().mean()), abs=0.01)
        state.model.layers[layer].mlp.gate.weight.data.copy_(found.get(name))


def test_each_row_by_itself_never_costs_more_than_all_together(checkpoint, context):
    model, text = checkpoint(), None
    text = text_for(model, samples=8, tokens=40)
    kl = {}
    for search in ("joint", "each"):
        ctx = context(search)
        aligned(model, ctx, text, bits=3, search=search)
        kl[search] = ctx.records["router_kl"][str(model.facts.moe_layers[0])]
    assert kl["each"]["plain"] == kl["joint"]["plain"] >= kl["joint"]["chosen"] > kl["each"]["chosen"]
    assert any("routers rounded to 3 bits" in note for note in ctx.notes)


def test_a_packed_model_keeps_its_packed_weights(checkpoint, context):
    model = checkpoint()
    packed, _ = quantized(model, context("gptq"))
    found, _ = aligned(packed, context("align"))
    changed = {name for name in packed.names() if not torch.equal(found.get(name), packed.get(name))}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in model.facts.moe_layers}
    assert found.config == packed.config
    assert Router(found, 0, torch.device("cpu")).rows["weight"].isfinite().all()
