"""Small floats as formats of quantize/rtn, and whom a quantized model must be servable to."""

import pytest
import torch

import moecli  # noqa: F401  the loader of compact models registers itself
from moecli.core.artifacts import BitPlan
from moecli.core.errors import MoecliError, UsageError
from moecli.families import form_of, linears_of
from moecli.families.adapter import load_model
from moecli.families.count import count_of
from moecli.io.formats import DenseView, packed_weights, schemes_of
from moecli.io.servable import CHANNEL
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.floats import dequantize_fp8, dequantize_mxfp4, quantize_fp8, quantize_mxfp4
from moecli.runner.export import choose, export, why_not_exported
from moecli.runner.open import sketch_of
from moecli.runner.verify import verify

ORACLES = {
    "fp8": lambda w: dequantize_fp8(*quantize_fp8(w)),
    "fp8_block": lambda w: dequantize_fp8(*quantize_fp8(w, blocks=True), blocks=True),
    "mxfp4": lambda w: dequantize_mxfp4(*quantize_mxfp4(w), w.dtype),
}
WIDE = {"hidden_size": 256, "moe_intermediate_size": 160}
"""Blocks of 128, and smaller ones at an edge."""


def made(model, ctx, **options):
    rtn(Rtn(**options), model, None, ctx)
    return ctx.finish(model)


@pytest.mark.parametrize("format", list(ORACLES))
def test_weights_read_as_rounded_and_as_large_as_forecast(format, checkpoint, context):
    model = checkpoint("qwen3_moe", dtype="bfloat16", **WIDE)
    packed = made(model, context(), format=format)
    view, specs = DenseView(packed), sketch_of(packed).specs
    targets = [x for x in linears_of(model.config, sketch_of(model).specs) if x.role not in ("router", "head")]
    assert packed_weights(specs) == {linear.name for linear in targets}
    for linear in targets:
        expected = ORACLES[format](model.get(linear.name))
        assert view.spec(linear.name) == model.spec(linear.name)
        assert torch.equal(view.get(linear.name), expected)
        rows = len(expected)
        assert torch.equal(view.rows(linear.name, 3, rows - 2), expected[3 : rows - 2])
        assert view.bits(linear.name) == (4 if format == "mxfp4" else 8)
        assert view.group_size(linear.name) == {"fp8": expected.shape[1], "fp8_block": 128, "mxfp4": 32}[format]
    forecast = Rtn(format=format).forecast(sketch_of(model))
    assert dict(forecast.specs) == dict(specs)
    assert forecast.config == packed.config
    form = form_of(forecast)
    assert (form.format, form.mix, form.stacked) == (format, "none", False)
    count = count_of(sketch_of(packed))
    dense = count_of(sketch_of(model))
    assert count.layers[0].expert[0].inputs == dense.layers[0].expert[0].inputs
    assert count.stored_bytes == sketch_of(packed).bytes < dense.stored_bytes


def test_the_library_reads_the_config(checkpoint, context):
    from compressed_tensors.quantization import QuantizationConfig

    model = checkpoint("qwen3_moe", dtype="bfloat16")
    for format, strategy in {"fp8": "channel", "fp8_block": "block", "mxfp4": "group"}.items():
        packed = Rtn(format=format).forecast(sketch_of(model)).config["quantization_config"]
        weights = QuantizationConfig.model_validate(packed).config_groups["group_0"].weights
        assert (weights.type, weights.strategy) == ("float", strategy)
        (group,) = schemes_of({"quantization_config": packed})
        assert (group.format, group.group_size) == (format, {"fp8": CHANNEL, "fp8_block": 128, "mxfp4": 32}[format])


@pytest.mark.parametrize(
    ("model_type", "format"),
    [("qwen3_moe", "fp8"), ("mixtral", "mxfp4"), ("deepseek_v3", "fp8"), ("deepseek_v3", "mxfp4")],
)
def test_a_stranger_computes_the_same(model_type, format, checkpoint, context, tmp_path):
    model = checkpoint(model_type, dtype="bfloat16", **({"moe_intermediate_size": 64} if "deep" in model_type else {}))
    options = {"attention_bits": 16} if model_type == "deepseek_v3" and format == "mxfp4" else {}
    packed = made(model, context(), format=format, servable="hf", **options)
    assert choose(packed) == "stock"
    export(packed, tmp_path / "model")
    found = verify(tmp_path / "model", packed)
    assert found.problems == () and found.status == "passed"
    assert next(check for check in found.checks if check.name == "packing").status == "passed"


def test_fp8_in_blocks_has_no_stock_and_no_compact_form(checkpoint, context, tmp_path):
    packed = made(checkpoint("qwen3_moe", dtype="bfloat16", **WIDE), context(), format="fp8_block")
    sketch = sketch_of(packed)
    problem = why_not_exported(sketch, "auto")
    assert problem.message == (
        "there is no stock form of this model: its experts are packed to FP8 in blocks of 128, and transformers "
        "multiplies each weight with a scale of another shape"
    )
    assert problem.hint == "write `export: research`, or write `format: fp8`"
    with pytest.raises(UsageError, match="the compact form packs integers only, this model has weights in fp8"):
        export(packed, tmp_path / "model", "compact")
    assert why_not_exported(sketch, "research") is None


@pytest.mark.parametrize(
    ("options", "option", "hint"),
    [
        ({"format": "fp8", "bits": 4}, "bits", "leave `bits` out"),
        ({"format": "mxfp4", "group_size": 16}, "group_size", "leave `group_size` out"),
        ({"format": "mxfp4", "attention_bits": 8}, "attention_bits", "leave `attention_bits` out, or write"),
        ({"format": "fp8", "shared_bits": 4}, "shared_bits", "leave `shared_bits` out, or write"),
        ({"format": "fp8", "shrink": True}, "shrink", "leave `shrink` out"),
    ],
)
def test_what_a_format_decides_itself(options, option, hint, checkpoint):
    (problem,) = Rtn(**options).problems(checkpoint().facts)
    assert problem.option == option
    assert problem.hint.startswith(hint)


def test_a_format_brings_its_bits():
    assert (Rtn(format="fp8").bits, Rtn(format="fp8_block").group_size) == (8, 128)
    assert (Rtn(format="mxfp4").bits, Rtn(format="mxfp4").group_size) == (4, 32)
    assert Rtn.model_validate(Rtn(format="mxfp4").model_dump()) == Rtn(format="mxfp4")


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss"])
def test_stacked_experts_have_no_floats(model_type, checkpoint):
    with pytest.raises(MoecliError, match=r"`format: fp8` has no form for .*, which holds all experts of a layer"):
        Rtn(format="fp8").forecast(sketch_of(checkpoint(model_type)))


def test_a_plan_of_bits_is_for_integers(checkpoint, context):
    model = checkpoint()
    plan = BitPlan(dict.fromkeys((0, 1), torch.full((8, 2), 4)))
    with pytest.raises(MoecliError, match="a plan of bits is for integers"):
        rtn(Rtn(format="fp8"), model, plan, context())


MIXES = {
    "expert": {layer: torch.tensor([[2, 2]] * 4 + [[4, 4]] * 4) for layer in (0, 1)},
    "layer": {0: torch.full((8, 2), 2), 1: torch.full((8, 2), 4)},
    "projection": dict.fromkeys((0, 1), torch.tensor([[4, 8]] * 8)),
}


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("servable", ["hf", "vllm"])
def test_a_mix_that_transformers_misreads_is_refused(mix, servable, checkpoint, context):
    model = checkpoint()
    with pytest.raises(MoecliError) as caught:
        rtn(Rtn(group_size=32, servable=servable), model, BitPlan(MIXES[mix]), context())
    low, high = (4, 8) if mix == "projection" else (2, 4)
    assert caught.value.message == (
        f"`servable: {servable}` cannot be kept: experts packed to {low} and {high} bits in groups of 32, which differ "
        f"by {mix}, transformers reads one packing for all experts and says so only where shapes disagree"
    )
    assert caught.value.hint == "give all experts the same bits and group size, or leave `servable` out"


@pytest.mark.parametrize("mix", list(MIXES))
def test_the_table_is_right_about_mixes(mix, checkpoint, context, tmp_path):
    """Written all the same, stock transformers computes something else or fails."""
    from transformers import AutoModelForCausalLM

    from moecli.io.writer import export_folder

    model, ctx = checkpoint(), context()
    rtn(Rtn(group_size=32), model, BitPlan(MIXES[mix]), ctx)
    packed = ctx.finish(model)
    export_folder(packed, tmp_path / "model")
    tokens = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        meant = load_model(DenseView(packed))(tokens).logits
        try:
            found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits
        except RuntimeError:
            return
    assert (found - meant).norm() > 0.05 * meant.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3, "group_size": 32}, "3 bits in groups of 32, vllm needs its Humming backend for 2 and 3 bits"),
        ({"group_size": 16}, "4 bits in groups of 16, vllm runs 4 and 8 bits in groups of 32, 64 or 128 only"),
        ({"format": "fp8"}, "FP8 in rows, vllm runs FP8 experts with rounded inputs only"),
    ],
)
def test_what_vllm_does_not_run_is_refused_from_headers_alone(options, message, checkpoint):
    sketch = sketch_of(checkpoint())
    with pytest.raises(MoecliError, match=message):
        Rtn(servable="vllm", **options).forecast(sketch)
    Rtn(servable="hf", **options).forecast(sketch)


def test_stacked_experts_are_not_servable(checkpoint):
    with pytest.raises(MoecliError, match="has no packed form for experts that one tensor a layer holds") as caught:
        Rtn(servable="hf", group_size=16).forecast(sketch_of(checkpoint("granitemoe")))
    assert caught.value.hint == "leave `servable` out"


def test_the_promise_is_no_part_of_the_result():
    from moecli.runner.plan import option_identity

    assert option_identity(Rtn(servable="hf")) == option_identity(Rtn())
