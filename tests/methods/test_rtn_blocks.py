"""MXFP4 as gpt_oss has it, against transformers' own reader of it."""

import pytest
import torch

from moecli.core.errors import MoecliError
from moecli.families import form_of
from moecli.families.count import count_of
from moecli.io.formats import DenseView
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.floats import dequantize_mxfp4, quantize_mxfp4
from moecli.runner.export import choose, export, why_not_exported
from moecli.runner.open import sketch_of
from moecli.runner.verify import verify, verify_folder

OPTIONS = {"format": "mxfp4", "attention_bits": 16}
DOWN = "model.layers.1.mlp.experts.down_proj"


def made(model, ctx, **options):
    rtn(Rtn(**OPTIONS, **options), model, None, ctx)
    return ctx.finish(model)


def test_experts_are_what_transformers_reads(checkpoint, context):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = checkpoint("gpt_oss", dtype="bfloat16")
    packed = made(model, context())
    view = DenseView(packed)
    for name in (DOWN, DOWN.replace("down", "gate_up")):
        weight = model.get(name)
        blocks, scales = packed.get(f"{name}_blocks"), packed.get(f"{name}_scales")
        experts, inputs, outputs = weight.shape
        assert (list(blocks.shape), list(scales.shape)) == (
            [experts, outputs, inputs // 32, 16],
            [experts, outputs, inputs // 32],
        )
        assert torch.equal(view.get(name), convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))
        rounded = [dequantize_mxfp4(*quantize_mxfp4(one.T.contiguous()), torch.bfloat16).T for one in weight]
        assert torch.equal(view.get(name), torch.stack(rounded))
        assert torch.equal(view.rows(name, 2, 5), view.get(name)[2:5])
        assert view.spec(name) == model.spec(name)


def test_config_and_tensors_are_as_forecast(checkpoint, context):
    model = checkpoint("gpt_oss", dtype="bfloat16")
    packed, forecast = made(model, context()), Rtn(**OPTIONS).forecast(sketch_of(model))
    assert dict(forecast.specs) == dict(sketch_of(packed).specs)
    assert forecast.config == packed.config
    assert packed.config["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
    }  # fmt: skip
    form = form_of(forecast)
    assert (form.format, form.stacked, form.mix) == ("mxfp4", True, "none")
    assert count_of(sketch_of(packed)).stored_bytes == sketch_of(packed).bytes


@pytest.mark.parametrize("servable", ["hf", "vllm"])
def test_a_stranger_computes_the_same(servable, checkpoint, context, tmp_path):
    packed = made(checkpoint("gpt_oss", dtype="bfloat16"), context(), servable=servable)
    assert choose(packed) == "stock"
    export(packed, tmp_path / "model")
    for found in (verify(tmp_path / "model", packed), verify_folder(tmp_path / "model", packed.source)):
        assert (found.problems, found.status) == ((), "passed")
        assert found.checks[-2 if found.checks[-1].name != "logits" else -1].detail.startswith("largest difference 0,")


def test_there_is_no_other_packed_form(checkpoint, context):
    sketch = sketch_of(made(checkpoint("gpt_oss", dtype="bfloat16"), context()))
    assert "weights in mxfp4" in why_not_exported(sketch, "compact").message
    assert "weights in mxfp4" in why_not_exported(sketch, "gptq").message
    assert "those of gpt_oss's own layout are exported as they are" in why_not_exported(sketch, "research").message
    assert why_not_exported(sketch, "auto") is why_not_exported(sketch, "expanded") is None


def test_packed_attention_and_other_families_are_refused(checkpoint):
    with pytest.raises(MoecliError, match=r"in MXFP4 stock readers of this model know its experts packed, but not "):
        Rtn(format="mxfp4").forecast(sketch_of(checkpoint("gpt_oss")))
    with pytest.raises(MoecliError, match=r"`format: mxfp4` has no form for .*, which holds all experts of a layer"):
        Rtn(**OPTIONS).forecast(sketch_of(checkpoint("granitemoe")))
