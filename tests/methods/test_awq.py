"""AWQ as a stage: scales that nothing but rounding can see, and that help where inputs are uneven."""

import pytest
import torch

from moecli.families import FAMILIES, adapter, family_of, linears_of
from moecli.io.formats import DenseView, is_packed
from moecli.methods.quantize import awq as awq_module
from moecli.methods.quantize.awq import Awq, awq
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.awq import candidates, rounded, weight_sizes
from moecli.ops.pack import dequantize, quantize_rtn
from moecli.runner.open import sketch_of
from tests.methods.test_gptq import hooked, text_for


def scaled(model, ctx, text=None, **options):
    opt = Awq(**{"bits": 3, "group_size": 8} | options)
    awq(opt, text or text_for(model, samples=8, tokens=40), model, None, ctx)
    return ctx.finish(model), opt


@torch.no_grad()
def logits_of(model, ids):
    return adapter.load_model(model, "cpu", torch.float32)(ids).logits


@pytest.fixture
def uneven(checkpoint, context):
    """`uneven("mixtral")`: a model whose inputs are large in few channels, as those of trained ones are."""

    def make(model_type="qwen3_moe"):
        model, ctx = checkpoint(model_type), context(f"uneven-{model_type}")
        rng = torch.Generator().manual_seed(3)

        def write(part):
            for name in model.names():
                value = model.get(name)
                if "norm" in name and name.endswith(".weight"):
                    part.put(name, value * torch.where(torch.rand(value.shape, generator=rng) < 0.1, 8.0, 1.0))
                if name.endswith("up_proj.weight") and value.dim() == 2:
                    part.put(name, value * torch.where(torch.rand(len(value), 1, generator=rng) < 0.1, 8.0, 1.0))

        with ctx.writer(model) as out:
            out.part("all", write)
        return ctx.finish(model)

    return make


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_computes_the_same_bits_until_it_is_rounded(model_type, uneven, context):
    model, ctx = uneven(model_type), context()
    found, opt = scaled(model, ctx, form="scaled")
    ids = text_for(model).ids[:2]
    assert torch.equal(logits_of(found, ids), logits_of(model, ids))
    assert set(found.names()) == set(model.names()) and opt.forecast(sketch_of(model)) == sketch_of(model)
    scales = ctx.records["scaled"]
    assert all(loss["scaled"] <= loss["plain"] for layer in scales.values() for loss in layer.values())
    if model_type != "qwen3_next":  # its norms add 1 to their weights
        assert any("norm" in name and v["scaled"] < v["plain"] for x in scales.values() for name, v in x.items())
    packed, opt = scaled(model, context("packed"), bits=8)
    assert opt.forecast(sketch_of(model)).specs == {name: packed.spec(name) for name in packed.names()}
    for linear in linears_of(model.config, sketch_of(model).specs):
        assert is_packed(packed, linear.name) == (linear.role not in ("router", "head")), linear
    close = torch.nn.functional.cosine_similarity(logits_of(packed, ids).flatten(), logits_of(model, ids).flatten(), 0)
    assert close > 0.97


def test_what_feeds_what_in_a_layer_with_shared_experts(uneven, context):
    model, ctx = uneven("qwen2_moe"), context()
    found, _ = scaled(model, ctx, form="scaled")
    layer = "model.layers.0"
    assert ctx.records["scaled"]["0"].keys() == {f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "up"}

    def ratio(name):
        return found.get(name) / model.get(name)

    for norm, fed in {
        "input_layernorm": [f"self_attn.{x}_proj" for x in "qkv"],
        "post_attention_layernorm": [
            "mlp.gate", "mlp.shared_expert_gate", "mlp.experts.3.gate_proj",
            "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj",
        ],
    }.items():  # fmt: skip
        scale = 1 / ratio(f"{layer}.{norm}.weight")
        assert (scale != 1).any()
        for name in fed:
            weight = model.get(f"{layer}.{name}.weight")
            assert torch.equal(found.get(f"{layer}.{name}.weight"), weight * scale), name
    for name in ("self_attn.o_proj", "mlp.shared_expert.down_proj"):
        assert torch.equal(found.get(f"{layer}.{name}.weight"), model.get(f"{layer}.{name}.weight"))
    down = ratio(f"{layer}.mlp.experts.3.down_proj.weight")
    up = ratio(f"{layer}.mlp.experts.3.up_proj.weight") / scale
    assert torch.equal(down, down[:1].expand_as(down)) and torch.equal(up, 1 / down[0][:, None].expand_as(up))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_scales_are_the_best_of_the_candidates_on_the_inputs_that_really_come(layer, uneven, context):
    """Of q, k and v, by running them; the slow way. The second layer sees what the rounded first one makes."""
    model, ctx = uneven(), context()
    text = text_for(model, samples=8, tokens=40)
    found, _ = scaled(model, ctx, text)
    path, norm = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.input_layernorm"
    chosen = model.get(f"{norm}.weight") / found.get(f"{norm}.weight")
    x = hooked(adapter.load_model(found, "cpu", torch.float32), text.ids)[f"{path}q_proj"].flatten(0, 1) * chosen
    weights = [model.get(f"{path}{part}_proj.weight") for part in "qkv"]
    rows = torch.cat([weight_sizes(weight[None], 8) for weight in weights]).mean(0)
    errors = {}
    for scale in candidates(x.abs().mean(0)[None], rows[None]):
        errors[tuple(scale[0].tolist())] = sum(
            float((x.double() @ (rounded(w[None], scale, 3, 8)[0] - w).double().T).square().sum()) for w in weights
        )
    plain, least = errors[(1.0,) * len(chosen)], min(errors.values())
    assert errors[tuple(chosen.tolist())] <= least * (1 + 1e-6) < 0.97 * plain
    assert ctx.records["scaled"][str(layer)][norm] == pytest.approx({"plain": plain, "scaled": least}, rel=1e-4)


def test_rounding_costs_less_than_without_scales(uneven, context):
    uneven = uneven()
    ids = text_for(uneven, samples=4, tokens=48, seed=1).ids
    ctx = context("rtn")
    rtn(Rtn(bits=4, group_size=32), uneven, None, ctx)
    plain = ctx.finish(uneven)
    ctx = context("awq")
    found, _ = scaled(uneven, ctx, bits=4, group_size=32)
    wanted, *others = (logits_of(some, ids) for some in (uneven, plain, found))
    errors = [float((logits - wanted).norm() / wanted.norm()) for logits in others]
    assert errors[1] < 0.97 * errors[0]
    assert any("of the squared output error of plain rounding" in note for note in ctx.notes)


def test_what_is_packed_is_the_scaled_weight_rounded(uneven, context):
    """Of the first layer, whose inputs do not depend on what was rounded."""
    model = uneven()
    text = text_for(model, samples=8, tokens=40)
    (packed, _), (whole, _) = (scaled(model, context(form), text, form=form) for form in ("packed", "scaled"))
    view = DenseView(packed)
    for linear in linears_of(model.config, sketch_of(model).specs):
        if linear.layer == 0 and linear.role != "router":
            wanted = dequantize(*quantize_rtn(whole.get(linear.name), 3, 8))
            assert torch.equal(view.get(linear.name), wanted)
    for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate"):
        name = f"model.layers.0.{name}.weight"
        assert torch.equal(packed.get(name), whole.get(name))


def test_weights_that_stay_are_scaled_and_not_rounded(uneven, context):
    model = uneven("qwen2_moe")
    found, opt = scaled(model, context(), shared_bits=16, attention_bits=16)
    assert opt.forecast(sketch_of(model)).specs == {name: found.spec(name) for name in found.names()}
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(found.get(name), model.get(name) * (model.get(norm) / found.get(norm)))
    assert torch.equal(
        found.get("model.layers.0.input_layernorm.weight"), model.get("model.layers.0.input_layernorm.weight")
    )


def test_scales_that_would_change_the_layer_are_taken_back(uneven, context, monkeypatch):
    """As where a norm's output has a reader that nobody knows of: here queries, which are not scaled along."""
    model, ctx, feeds = uneven(), context(), awq_module.Feeds

    class Blind(feeds):
        def __init__(self, layer, norms, linears):
            super().__init__(layer, norms, {n: m for n, m in linears.items() if "q_proj" not in n})

    monkeypatch.setattr(awq_module, "Feeds", Blind)
    found, _ = scaled(model, ctx, form="scaled")
    ids = text_for(model).ids[:2]
    assert torch.equal(logits_of(found, ids), logits_of(model, ids))
    layers = len(model.facts.moe_layers)
    assert any(note.startswith(f"{layers} sets of scales were taken back") for note in ctx.notes)
    for layer in ctx.records["scaled"].values():
        assert len(layer) == 2 and not any("input_layernorm" in name for name in layer)


@pytest.mark.parametrize("form", ["packed", "scaled"])
def test_a_stopped_run_goes_on_with_what_it_had(form, checkpoint, context, monkeypatch):
    model = checkpoint()
    whole_ctx, stopped = context("whole"), context("stopped")
    whole, opt = scaled(model, whole_ctx, form=form)
    choose, calls = awq_module._Layer.choose, []

    def stop(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        choose(self)

    text = text_for(model, samples=8, tokens=40)
    with monkeypatch.context() as patch:
        patch.setattr(awq_module._Layer, "choose", stop)
        with pytest.raises(KeyboardInterrupt):
            awq(opt, text, model, None, stopped)
    awq(opt, text, model, None, stopped)
    assert stopped.records == whole_ctx.records and stopped.notes == whole_ctx.notes
    again = stopped.finish(model)
    assert all(torch.equal(again.get(name), whole.get(name)) for name in whole.names())


def test_experts_without_tokens_lean_on_the_others(checkpoint, context):
    model, ctx = checkpoint(), context()
    found, _ = scaled(model, ctx, text_for(model, samples=1, tokens=6))
    assert all(counts == {"pooled": 2 * model.facts.experts} for counts in ctx.records["classes"].values())
    assert any("pooled" in note for note in ctx.notes)
    view, family = DenseView(found), family_of(model.config)
    assert all(torch.isfinite(view.get(name)).all() for name in family.expert_names(0, 0))
