"""Experts with bits of their own: what RTN and GPTQ write under a plan, what loads, and which plans are refused."""

import json
from dataclasses import replace

import pytest
import torch

from moecli.core.artifacts import BitPlan, Packed
from moecli.core.errors import MoecliError
from moecli.families import FAMILIES, adapter, family_of
from moecli.io.formats import DenseView
from moecli.methods.quantize import gptq as gptq_module
from moecli.methods.quantize.gptq import Gptq, gptq
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.pack import INT_BITS
from moecli.runner.export import choose, export
from moecli.runner.open import sketch_of
from tests.methods.test_gptq import text_for

STACKED = ("granitemoe", "gpt_oss")


def mixed(model, seed=0):
    """Bits 1, 2, 3, 4 and 8 in some order, gate and up apart from down."""
    rng = torch.Generator().manual_seed(seed)
    levels = torch.tensor(INT_BITS)
    shape = (model.facts.experts, 2)
    return BitPlan({layer: levels[torch.randint(5, shape, generator=rng)] for layer in model.facts.moe_layers})


def even(model, *bits):
    """Layer by layer one number of bits."""
    layers = model.facts.moe_layers
    return BitPlan({layer: torch.full((model.facts.experts, 2), b) for layer, b in zip(layers, bits, strict=True)})


def by_rtn(model, ctx, plan, **options):
    opt = Rtn(group_size=16, **{"attention_bits": 8} | options)
    rtn(opt, model, plan, ctx)
    return ctx.finish(model), opt


def by_gptq(model, ctx, plan, **options):
    opt = Gptq(group_size=16, attention_bits=8, **options)  # layers before are the same in all
    gptq(opt, text_for(model, samples=16, tokens=48), model, plan, ctx)
    return ctx.finish(model), opt


def test_a_plan_survives_packing_and_checks_itself(checkpoint):
    plan = mixed(checkpoint())
    tensors, meta = plan.pack()
    back = BitPlan.unpack(Packed(tensors, json.loads(json.dumps(meta))))
    assert back.pairs() == plan.pairs() and list(back) == list(plan)
    with pytest.raises(ValueError, match="between 1 and 16"):
        BitPlan({0: torch.tensor([[2, 0]])})
    with pytest.raises(ValueError, match=r"whole numbers \[E, 2\]"):
        BitPlan({0: torch.tensor([2, 3])})


@pytest.mark.parametrize("quantize", [by_rtn, by_gptq])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_each_expert_is_what_it_is_when_all_have_its_bits(model_type, quantize, checkpoint, context, monkeypatch):
    # two matrices at a time, so that groups are cut
    monkeypatch.setattr(gptq_module, "SLAB_BYTES", 2 * 4 * (6 * 64 * 64 + 5 * 64 * 64))
    model = checkpoint(model_type)
    plan, family = mixed(model), family_of(model.config)
    found, opt = quantize(model, context("mix"), plan)
    whole = {bits: DenseView(quantize(model, context(str(bits)), None, bits=bits)[0]) for bits in INT_BITS}
    view = DenseView(found)
    first = model.facts.moe_layers[0]  # later layers of GPTQ see what the mix makes
    for layer in model.facts.moe_layers if quantize is by_rtn else [first]:
        for expert, (inward, outward) in enumerate(plan.pairs()[layer]):
            gate, up, down = family.expert_names(layer, expert)
            for name, bits in ((gate, inward), (up, inward), (down, outward)):
                assert view.bits(name) == bits
                assert torch.equal(view.get(name), whole[bits].get(name)), (name, bits)
    sketch = sketch_of(model)
    forecast = opt.forecast(replace(sketch, planned_bits=plan.pairs()))
    assert forecast.specs == {name: found.spec(name) for name in found.names()}
    assert forecast.config == found.config and forecast.planned_bits is None


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_mix_is_exported_compact_and_loads_as_it_is_in_memory(model_type, checkpoint, context, tmp_path):
    import moecli.runtime.compact_model  # noqa: F401  registers the loader

    model = checkpoint(model_type)
    found, _ = by_rtn(model, context(), mixed(model))
    assert choose(found) == "compact"
    export(found, tmp_path / "model")
    from transformers import AutoModelForCausalLM

    ids = text_for(model).ids[:1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, adapter.load_model(DenseView(found), "cpu", torch.float32)(ids).logits)


def test_a_plan_with_one_number_of_bits_is_stock_and_that_number_is_the_scheme(checkpoint, context, tmp_path):
    from transformers import AutoModelForCausalLM

    model = checkpoint()
    found, _ = by_rtn(model, context(), even(model, 8, 8), bits=4, attention_bits=4)
    groups = found.config["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [8, 4]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert choose(found) == "stock"
    export(found, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    family, view = family_of(model.config), DenseView(found)
    new = family.read_expert(view, 0, 3)
    assert torch.equal(loaded.model.layers[0].mlp.experts.down_proj[3], new.down_DF)


@pytest.mark.parametrize("quantize", [by_rtn, by_gptq])
@pytest.mark.parametrize("model_type", STACKED)
def test_stacked_experts_take_one_number_of_bits_a_layer(model_type, quantize, checkpoint, context):
    model = checkpoint(model_type)
    found, _ = quantize(model, context("mix"), even(model, 8, 3))
    whole = {bits: DenseView(quantize(model, context(str(bits)), None, bits=bits)[0]) for bits in (3, 8)}
    name = family_of(model.config).layout(model, 0).names_of(0)[0]
    assert torch.equal(DenseView(found).get(name), whole[8].get(name))
    if quantize is by_rtn:
        last = family_of(model.config).layout(model, 1).names_of(0)[1]
        assert torch.equal(DenseView(found).get(last), whole[3].get(last))
    with pytest.raises(MoecliError, match=r"holds all experts of the layer, which the plan gives \d and \d bits"):
        quantize(model, context("refused"), mixed(model))


def test_a_cut_gptq_run_goes_on_under_a_plan_to_the_same_bytes(checkpoint, context):
    model, ctx = checkpoint(), context("cut")
    plan, part, calls = mixed(model), ctx.part, []
    whole, _ = by_gptq(model, context("whole"), plan)

    def cut(name, kind, make):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return part(name, kind, make)

    ctx.part = cut
    with pytest.raises(KeyboardInterrupt):
        by_gptq(model, ctx, plan)
    ctx.part = part
    again, _ = by_gptq(model, ctx, plan)
    for name in whole.names():
        assert torch.equal(whole.get(name), again.get(name)), name


def test_the_report_counts_bits_and_bytes(checkpoint, context):
    model, ctx = checkpoint(), context()
    bits = torch.tensor([[2, 2], [4, 4], [4, 4], [2, 4], [2, 2], [3, 3], [8, 8], [8, 8]])
    found, _ = by_rtn(model, ctx, BitPlan({0: bits, 1: bits}))
    counts = {"2": 2, "2 and 4": 1, "3": 1, "4": 2, "8": 2}
    assert ctx.records["bits"] == {"0": counts, "1": counts}
    family = family_of(model.config)
    names = [n for layer in (0, 1) for e in range(8) for n in family.expert_names(layer, e)]
    weights = sum(model.spec(n).numel for n in names)
    stored = sum(found.spec(f"{n}_{part}").bytes for n in names for part in ("packed", "scale", "shape"))
    mean = (2 * 2 + 2 * 4 + (2 * 2 + 4) / 3 + 3 + 2 * 8) / 8
    assert ctx.notes == [
        "bits of 16 routed experts: 4 have 2, 2 have 2 and 4, 2 have 3, 4 have 4, 4 have 8; "
        f"{mean:.3f} a weight, {8 * stored / weights:.3f} as stored with their scales"
    ]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda m: BitPlan({0: torch.full((8, 2), 4)}), "the plan is for 1 layers with experts, the model has 2"),
        (lambda m: BitPlan(dict.fromkeys((0, 1), torch.full((6, 2), 4))), "the plan is for 6 experts, the model has 8"),
        (lambda m: even(m, 4, 5), "there is no packed form of 5 bits, only of 1, 2, 3, 4, 8"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(plan, message, checkpoint, context):
    model = checkpoint()
    with pytest.raises(MoecliError, match=message):
        by_rtn(model, context(), plan(model))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_takes_a_plan(model_type, checkpoint, context):
    model = checkpoint(model_type)
    experts = model.facts.experts
    layers = model.facts.moe_layers
    plan = BitPlan({layer: torch.full((experts, 2), 3 if i % 2 else 4) for i, layer in enumerate(layers)})
    rtn(Rtn(group_size=8), model, plan, ctx := context())
    view = DenseView(ctx.finish(model))
    for i, layer in enumerate(layers):
        for name in family_of(model.config).layout(model, layer).names_of(0)[:2]:
            assert view.bits(name) == (3 if i % 2 else 4)
