"""Rounding: what is packed, what is left alone, and that compressed-tensors reads the same numbers."""

import pytest
import torch

from moecli.core.errors import MoecliError
from moecli.families import linears_of
from moecli.io.formats import DenseView, is_packed
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.runner.open import sketch_of


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_every_linear_but_routers_and_head_is_packed(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    rtn(Rtn(bits=4, group_size=8), model, ctx)
    packed = ctx.finish(model)
    for linear in linears_of(model.config, sketch_of(model).specs):
        assert is_packed(packed, linear.name) == (linear.role not in ("router", "head")), linear


def test_the_dense_view_is_within_half_a_step_of_the_source(checkpoint, context):
    model, ctx = checkpoint(), context()
    rtn(Rtn(bits=8, group_size=16), model, ctx)
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
    rtn(Rtn(bits=4, group_size=16), model, ctx)
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


def test_stacked_experts_are_refused_before_anything_is_written(checkpoint):
    with pytest.raises(MoecliError, match="holds all experts of a layer in one tensor"):
        Rtn(group_size=16).forecast(sketch_of(checkpoint("granitemoe")))
