"""GPTQ as a stage: every family, codes against the plain algorithm on hooked inputs, experts with few tokens."""

import pytest
import torch

from moecli.core.artifacts import CalibrationText
from moecli.families import FAMILIES, adapter, family_of, linears_of
from moecli.io.formats import DenseView, is_packed
from moecli.methods.quantize.gptq import Gptq, gptq
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.pack import dequantize, group_scale
from moecli.runner.open import sketch_of
from tests.ops.test_gptq import plain


def text_for(model, samples=6, tokens=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.facts.vocab, (samples, tokens), generator=rng)
    return CalibrationText(ids, torch.ones_like(ids), "digest")


def quantized(model, ctx, text=None, **options):
    opt = Gptq(group_size=8, **options)
    gptq(opt, text or text_for(model), model, None, ctx)
    return ctx.finish(model), opt


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_packed_and_loads(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    packed, opt = quantized(model, ctx, bits=8)
    specs = sketch_of(model).specs
    for linear in linears_of(model.config, specs):
        assert is_packed(packed, linear.name) == (linear.role not in ("router", "head")), linear
    assert opt.forecast(sketch_of(model)).specs == {name: packed.spec(name) for name in packed.names()}
    loaded = adapter.load_model(packed, "cpu", torch.float32)
    ids = text_for(model).ids[:1]
    whole = adapter.load_model(model, "cpu", torch.float32)
    with torch.no_grad():
        found, wanted = loaded(ids).logits, whole(ids).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.97


def hooked(model, ids):
    """Inputs of some linears of the whole model, by module path; of the routed experts: x, experts, weights."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            handles.append(module.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, args)))
        elif isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, args[0])))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("asymmetric", [0.0, 0.25])
@pytest.mark.parametrize("true_sequential", [False, True])
def test_codes_are_those_of_the_plain_algorithm_on_the_inputs_that_really_come(
    true_sequential, asymmetric, checkpoint, context
):
    model, ctx, text = checkpoint(), context(), None
    text = text_for(model, samples=16, tokens=48)
    packed, _ = quantized(model, ctx, text, true_sequential=true_sequential, asymmetric=asymmetric)
    view, family = DenseView(packed), family_of(model.config)
    others = hooked(adapter.load_model(model, "cpu", torch.float32), text.ids) if asymmetric else None
    reference = adapter.load_model(model, "cpu", torch.float32)
    state = reference.state_dict()
    for layer in model.facts.moe_layers:
        seen = hooked(reference, text.ids)
        path = f"model.layers.{layer}.self_attn.o_proj"
        x = seen[path].flatten(0, 1)
        same(view, f"{path}.weight", model, x, others and others[path].flatten(0, 1))
        if true_sequential:
            for part in ("q", "k", "v", "o"):
                name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
                state[name].copy_(view.get(name))
            seen = hooked(reference, text.ids)
        hidden, index, _ = seen[f"model.layers.{layer}.mlp.experts"]
        for expert in range(model.facts.experts):
            mine = (index == expert).any(-1).flatten()
            own = hidden.reshape(-1, hidden.shape[-1])[mine]
            if len(own) < 256:
                continue
            gate, _, down = family.expert_names(layer, expert)
            weights = family.read_expert(view if true_sequential else model, layer, expert)
            other = inner = None
            if asymmetric:  # the same tokens, whatever the unquantized model would have done with them
                other = others[f"model.layers.{layer}.mlp.experts"][0].reshape(-1, hidden.shape[-1])[mine]
                inner = family.inner(family.read_expert(model, layer, expert), other)
            same(view, gate, model, own, other)
            same(view, down, model, family.inner(weights, own), inner)
        for name in view.names():  # what the next layer sees
            if name.startswith(f"model.layers.{layer}.") and name in state:
                state[name].copy_(view.get(name))
        experts = reference.model.layers[layer].mlp.experts
        for e in range(model.facts.experts):
            new = family.read_expert(view, layer, e)
            experts.gate_up_proj.data[e].copy_(torch.cat([new.gate_FD, new.up_FD]))
            experts.down_proj.data[e].copy_(new.down_DF)


def same(view, name, model, x, other=None):
    """Whether a matrix was rounded as the plain algorithm does on these inputs; ties move what follows in a row."""
    weight, x = model.get(name).float(), x.double()
    scale = group_scale(weight, 4, 8)
    drift = None if other is None else (other.double() - x).T @ x
    codes = plain(weight, x.T @ x, scale, 4, drift_CC=drift)
    wrong = (dequantize(codes, scale) != view.get(name)).any(-1).float().mean()
    assert wrong <= 0.15, f"{name}: {wrong:.0%} of the rows differ"


def test_the_output_is_closer_than_that_of_rounding(checkpoint, context):
    model, text = checkpoint(), None
    text = text_for(model, samples=16, tokens=48)
    ids = text_for(model, samples=4, tokens=48, seed=1).ids
    with torch.no_grad():
        wanted = adapter.load_model(model, "cpu", torch.float32)(ids).logits
        by_gptq, _ = quantized(model, context("gptq"), text, bits=3)
        ctx = context("rtn")
        rtn(Rtn(bits=3, group_size=8), model, None, ctx)
        found = [adapter.load_model(c, "cpu", torch.float32)(ids).logits for c in (by_gptq, ctx.finish(model))]
    errors = [(logits - wanted).norm() / wanted.norm() for logits in found]
    assert errors[0] < 0.95 * errors[1]


def test_an_expert_without_tokens_is_quantized_on_the_layers_mean(checkpoint, context):
    model, ctx = checkpoint(experts=8), context()
    text = CalibrationText(torch.full((1, 6), 9), torch.ones(1, 6, dtype=torch.int64), "digest")
    packed, _ = quantized(model, ctx, text)
    view, family = DenseView(packed), family_of(model.config)
    classes = ctx.records["classes"]
    experts = 3 * model.facts.experts
    for layer in model.facts.moe_layers:
        found = classes[str(layer)]
        assert found["pooled"] == experts and found["own"] == 4, "four projections of attention"
        for expert in range(model.facts.experts):
            for mine, source in zip(
                family.read_expert(view, layer, expert)[:3], family.read_expert(model, layer, expert)[:3], strict=True
            ):
                assert torch.nn.functional.cosine_similarity(mine.flatten(), source.flatten(), dim=0) > 0.97
    (note,) = [note for note in ctx.notes if "calibrated" in note]
    assert f"{experts * len(model.facts.moe_layers)} pooled" in note


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next"])
@pytest.mark.parametrize("hessian", ["affinity", "all"])
def test_the_unquantized_model_runs_beside_in_every_kind_of_layer(model_type, hessian, checkpoint, context):
    model, found = checkpoint(model_type), []
    for name, asymmetric in (("drift", 0.25), ("none", 0.0)):
        packed, opt = quantized(model, context(name), hessian=hessian, asymmetric=asymmetric, bits=2)
        assert opt.forecast(sketch_of(model)).specs == {name: packed.spec(name) for name in packed.names()}
        found.append(packed)
    layers = {name.split(".")[2] for name in packed.names() if "packed" in name and ".layers." in name}
    differ = {name.split(".")[2] for name in packed.names() if not torch.equal(found[0].get(name), found[1].get(name))}
    assert differ == layers - {"0"}, "nothing has drifted before the first layer"


@pytest.mark.parametrize("asymmetric", [0.0, 0.25])
def test_padding_is_no_input(asymmetric, checkpoint, context):
    model = checkpoint()
    plain_text = text_for(model, samples=4, tokens=20)
    ids = torch.cat([plain_text.ids, torch.full((4, 7), 3)], 1)
    mask = torch.cat([plain_text.mask, torch.zeros(4, 7, dtype=torch.int64)], 1)
    one, _ = quantized(model, context("one"), plain_text, asymmetric=asymmetric)
    two, _ = quantized(model, context("two"), CalibrationText(ids, mask, "padded"), asymmetric=asymmetric)
    for name in one.names():
        assert torch.equal(one.get(name), two.get(name)), name


@pytest.mark.parametrize(
    "options", [{"hessian": "affinity"}, {"hessian": "all"}, {"attention_bits": 8}, {"shrink": True}]
)
def test_options_change_what_they_name(options, checkpoint, context):
    model, text = checkpoint(), None
    text = text_for(model, samples=16, tokens=48)
    base, _ = quantized(model, context("base"), text)
    other, opt = quantized(model, context("other"), text, **options)
    changed = {linear.role for linear in linears_of(model.config, sketch_of(model).specs)
               if linear.layer == 0 and is_packed(base, linear.name)
               and not torch.equal(DenseView(base).get(linear.name), DenseView(other).get(linear.name))}  # fmt: skip
    wanted = {"hessian": {"expert"}, "attention_bits": {"attention"}, "shrink": {"expert", "attention"}}
    assert changed == wanted[next(iter(options))]
    assert opt.forecast(sketch_of(model)).specs == {name: other.spec(name) for name in other.names()}


def test_attention_may_stay_as_it_is(checkpoint, context):
    model, ctx = checkpoint(), context()
    packed, _ = quantized(model, ctx, attention_bits=16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(packed.get(name), model.get(name))
    assert name.removesuffix(".weight") in packed.config["quantization_config"]["ignore"]
    adapter.load_model(packed, "cpu", torch.float32)


@pytest.mark.parametrize("asymmetric", [0.0, 0.25])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(asymmetric, checkpoint, context):
    model, text = checkpoint(), None
    text = text_for(model)
    whole, opt = quantized(model, context("whole"), text, asymmetric=asymmetric)
    ctx = context("cut")
    part, calls = ctx.part, []

    def cut(name, kind, make):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return part(name, kind, make)

    ctx.part = cut
    with pytest.raises(KeyboardInterrupt):
        gptq(opt, text, model, None, ctx)
    ctx.part = part
    gptq(opt, text, model, None, ctx)
    again = ctx.finish(model)
    assert set(whole.names()) == set(again.names())
    for name in whole.names():
        assert torch.equal(whole.get(name), again.get(name)), name
