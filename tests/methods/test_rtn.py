"""Rounding: what is packed, what is left alone, and that compressed-tensors reads the same numbers."""

import pytest
import torch

from moecli.core.errors import MoecliError
from moecli.families import FAMILIES, family_of, linears_of
from moecli.io.formats import DenseView, is_packed
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.pack import dequantize, quantize_rtn
from moecli.runner.export import choose, export, why_not_exported
from moecli.runner.open import sketch_of
from moecli.runner.verify import verify


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_but_routers_and_head_is_packed(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    rtn(Rtn(bits=4, group_size=8), model, None, ctx)
    packed = ctx.finish(model)
    for linear in linears_of(model.config, sketch_of(model).specs):
        assert is_packed(packed, linear.name) == (linear.role not in ("router", "head")), linear


def test_routers_are_ignored_under_both_their_names(checkpoint, context):
    model, ctx = checkpoint("phimoe"), context()
    rtn(Rtn(bits=4, group_size=16), model, None, ctx)
    ignored = ctx.finish(model).config["quantization_config"]["ignore"]
    gates = ["model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"]
    assert ignored == ["lm_head", *gates, "model.layers.0.mlp.router", "model.layers.1.mlp.router"]


def test_the_dense_view_is_within_half_a_step_of_the_source(checkpoint, context):
    model, ctx = checkpoint(), context()
    rtn(Rtn(bits=8, group_size=16), model, None, ctx)
    packed = ctx.finish(model)
    dense = DenseView(packed)
    for linear in linears_of(model.config, sketch_of(model).specs):
        if linear.role != "router":
            weight, again = model.get(linear.name), dense.get(linear.name)
            step = weight.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True) / 127.5
            error = (again - weight).unflatten(-1, (-1, 16)).abs()
            assert (error <= step * 0.5001 + 1e-7).all(), linear.name


def test_compressed_tensors_unpacks_the_same_codes(checkpoint, context):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    model, ctx = checkpoint(), context()
    rtn(Rtn(bits=4, group_size=16), model, None, ctx)
    packed = ctx.finish(model)
    name = next(linear.name for linear in linears_of(model.config, sketch_of(model).specs) if linear.role == "expert")
    shape = torch.Size(packed.get(f"{name}_shape").tolist())
    codes = unpack_from_int32(packed.get(f"{name}_packed"), 4, shape)
    scale = packed.get(f"{name}_scale").repeat_interleave(16, dim=1)
    assert torch.equal(codes.to(scale.dtype) * scale, DenseView(packed).get(name))


def test_a_group_size_that_divides_no_width_is_said_with_one_that_does(checkpoint):
    (problem,) = Rtn(group_size=128).problems(checkpoint().facts)
    assert problem.option == "group_size"
    assert problem.message == "`group_size` 128 does not divide the model width 64 and the expert width 32"
    assert problem.hint == "write `group_size: 32`"


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss"])
@pytest.mark.parametrize("experts_at_once", [1, 3, 8])
def test_stacked_experts_are_rounded_along_their_inputs(model_type, experts_at_once, checkpoint, context, monkeypatch):
    model, ctx = checkpoint(model_type), context()
    # gate and up: 64 inputs and 64 outputs
    monkeypatch.setattr("moecli.methods.quantize.BATCH_ELEMENTS", experts_at_once * 64 * 64)
    rtn(Rtn(bits=4, group_size=16), model, None, ctx)
    packed = ctx.finish(model)
    before, after = (family_of(model.config).read_experts(c, 1) for c in (model, DenseView(packed)))
    for expert in range(8):
        for old, new in zip(before[:3], after[:3], strict=True):
            assert torch.equal(new[expert], dequantize(*quantize_rtn(old[expert], 4, 16)))
    if model_type == "gpt_oss":
        assert torch.equal(before.down_bias_D, after.down_bias_D)


def test_a_group_size_that_does_not_divide_the_inputs_of_a_stack_is_named(checkpoint):
    narrow = checkpoint("gpt_oss", intermediate_size=24)
    with pytest.raises(MoecliError, match=r"16 does not divide the input width 24 of `.*experts\.down_proj`"):
        Rtn(group_size=16).forecast(sketch_of(narrow))


ONE_BIT = {"bits": 1, "attention_bits": 8, "group_size": 16}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_one_bit_is_exported_compact_and_a_fresh_process_computes_the_same(model_type, checkpoint, context, tmp_path):
    model, ctx = checkpoint(model_type), context()
    rtn(Rtn(**ONE_BIT), model, None, ctx)
    packed = ctx.finish(model)
    weight, left = (family_of(model.config).read_expert(c, 1, 3).down_DF for c in (model, DenseView(packed)))
    size = weight.unflatten(-1, (-1, 16)).abs().mean(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
    torch.testing.assert_close(left, torch.where(weight < 0, -size, size))
    assert choose(packed) == "compact"
    export(packed, tmp_path / "model")
    found = verify(tmp_path / "model", packed)
    assert found.problems == () and found.status == "passed"


def test_one_bit_is_for_routed_experts(checkpoint):
    (problem,) = Rtn(bits=1, group_size=16).problems(checkpoint().facts)
    assert (problem.option, problem.hint) == ("bits", "write `attention_bits: 4`")
    assert problem.message == "1 bit is for routed experts, and `bits` holds for the rest too"
    (problem,) = Rtn(bits=1, group_size=8).problems(checkpoint("qwen2_moe").facts)
    assert problem.hint == "write `attention_bits: 4` and `shared_bits: 4`"
    assert not list(Rtn(**ONE_BIT).problems(checkpoint().facts))


@pytest.mark.parametrize("servable", ["hf", "vllm"])
def test_one_bit_is_refused_where_a_stock_loader_must_read_it(servable, checkpoint):
    with pytest.raises(MoecliError) as caught:
        Rtn(**ONE_BIT, servable=servable).forecast(sketch_of(checkpoint()))
    assert caught.value.message == (
        f"`servable: {servable}` cannot be kept: experts packed to 1 bit in groups of 16, transformers decodes 1 bit "
        "to 0 and -1, where it means 1 and -1"
    )
    assert caught.value.hint == "write `bits: 2`, or leave `servable` out"


@pytest.mark.parametrize("bits", [1, 3])
def test_bits_that_few_inputs_do_not_tell_are_refused_in_the_compact_form(bits, checkpoint):
    """A row of 16 codes of 1 or 2 bits is one word, of 3 or 4 bits two."""
    narrow = checkpoint("gpt_oss", intermediate_size=16)
    for export_as in ("auto", "compact"):
        problem = why_not_exported(Rtn(**ONE_BIT | {"bits": bits}).forecast(sketch_of(narrow)), export_as)
        name = "model.layers.0.mlp.experts.down_proj"
        assert problem.message == f"`{name}` has 16 inputs, whose words look alike for {bits} bits and {bits + 1}"
        assert problem.hint == "write `bits: 4` or 8, or `export: expanded`"
    assert why_not_exported(Rtn(**ONE_BIT | {"bits": 4}).forecast(sketch_of(narrow)), "auto") is None
