"""EAQuant's smoothing as a stage: nothing but rounding can see it, and its scales are those of the formula."""

from dataclasses import replace

import pytest
import torch

from moecli.core.errors import StageFailed
from moecli.families import FAMILIES, adapter, facts_of, family_of
from moecli.methods.quantize import eaquant_smooth as module
from moecli.methods.quantize.eaquant_smooth import EaquantSmooth, eaquant_smooth
from moecli.ops.awq import power_of_two
from moecli.runner.open import sketch_of
from tests.methods.test_awq import logits_of, uneven  # noqa: F401
from tests.methods.test_gptq import hooked, text_for

ADDS_ONE = ("qwen3_next",)
"""Families whose norms add 1 to their weights."""


def smoothed(model, ctx, text=None, **options):
    opt = EaquantSmooth(**options)
    eaquant_smooth(opt, text or text_for(model, samples=8, tokens=40), model, ctx)
    return ctx.finish(model), opt


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ADDS_ONE])
def test_every_family_computes_the_same_bits(model_type, uneven, context):  # noqa: F811
    model, ctx = uneven(model_type), context()
    found, opt = smoothed(model, ctx)
    ids = text_for(model).ids[:2]
    assert torch.equal(logits_of(found, ids), logits_of(model, ids))
    assert opt.forecast(sketch_of(model)) == sketch_of(found) == sketch_of(model)
    assert ctx.records["scales"].keys() == {str(layer) for layer in model.facts.moe_layers}
    changed = {name for name in model.names() if not torch.equal(found.get(name), model.get(name))}
    assert any("norm" in name for name in changed) and not any("down_proj" in name for name in changed)


@pytest.mark.parametrize("model_type", ADDS_ONE)
def test_norms_that_add_one_are_refused(model_type, checkpoint, context):
    with pytest.raises(StageFailed, match="no norm can take up scales: the layer computes something else"):
        smoothed(checkpoint(model_type), context())


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("merge", ["max", "sum1"])
def test_the_scales_are_those_of_the_formula_on_the_inputs_that_really_come(merge, router, uneven, context):  # noqa: F811
    model, text = uneven("qwen2_moe"), None
    text = text_for(model, samples=8, tokens=40)
    found, _ = smoothed(model, context(), text, merge=merge, router=router)
    family = family_of(model.config)
    seen = hooked(adapter.load_model(model, "cpu", torch.float32), text.ids)
    for layer in model.facts.moe_layers:
        hidden, index, _ = seen[f"model.layers.{layer}.mlp.experts"]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        each, counts = [], []
        for expert in range(model.facts.experts):
            own = hidden[(index == expert).any(-1).flatten()]
            gate, up, _ = family.expert_names(layer, expert)
            w = torch.maximum(model.get(gate).abs().amax(0), model.get(up).abs().amax(0)).clamp(min=1e-5)
            x = own.abs().amax(0) if len(own) else torch.zeros_like(w)
            each.append((x**0.6 / w**0.4).clamp(min=1e-5))
            counts.append(len(own))
        each = torch.stack(each)
        wanted = each.amax(0) if merge == "max" else torch.tensor(counts) / sum(counts) @ each
        path = f"model.layers.{layer}"
        gate = model.get(f"{path}.mlp.gate.weight")
        if router:
            wanted = torch.maximum(wanted, hidden.abs().amax(0) ** 0.6 / gate.abs().amax(0) ** 0.4)
        norm = f"{path}.post_attention_layernorm.weight"
        scale = model.get(norm) / found.get(norm)
        assert torch.equal(scale, scale.log2().round().exp2()), "powers of two"
        # Where the logarithm of the formula's scale is halfway between two, either is right.
        assert (scale == power_of_two(wanted)).float().mean() > 0.95
        for name in ("gate", "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj",
                     "experts.1.gate_proj", "experts.1.up_proj"):  # fmt: skip
            name = f"{path}.mlp.{name}.weight"
            assert torch.equal(found.get(name), model.get(name) * scale), name
        for name in ("mlp.experts.1.down_proj", "self_attn.q_proj", "input_layernorm"):
            assert torch.equal(found.get(f"{path}.{name}.weight"), model.get(f"{path}.{name}.weight"))


def test_a_stopped_run_goes_on_with_what_it_had(checkpoint, context, monkeypatch):
    model = checkpoint()
    whole_ctx, stopped = context("whole"), context("stopped")
    text = text_for(model, samples=8, tokens=40)
    whole, opt = smoothed(model, whole_ctx, text)
    choose, calls = module._Layer.choose, []

    def stop(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        choose(self)

    with monkeypatch.context() as patch:
        patch.setattr(module._Layer, "choose", stop)
        with pytest.raises(KeyboardInterrupt):
            eaquant_smooth(opt, text, model, stopped)
    eaquant_smooth(opt, text, model, stopped)
    assert stopped.records == whole_ctx.records and stopped.notes == whole_ctx.notes
    again = stopped.finish(model)
    assert all(torch.equal(again.get(name), whole.get(name)) for name in whole.names())


def test_a_quantized_model_is_refused(checkpoint):
    facts = facts_of(checkpoint().config)
    (problem,) = EaquantSmooth().problems(replace(facts, quantized="compressed-tensors"))
    assert "quantized already" in problem.message and "above" in problem.hint
