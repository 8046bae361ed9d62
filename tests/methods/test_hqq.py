"""HQQ as a stage: packed like every quantized model, closer than rounding, with a plan's bits."""

import pytest
import torch

from moecli.families import linears_of
from moecli.io.formats import DenseView, is_packed
from moecli.methods.quantize.hqq import Hqq, hqq
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.ops.halfquad import quantize_hqq
from moecli.ops.pack import dequantize
from moecli.runner.open import sketch_of


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_weights_are_those_of_the_grid(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    opt = Hqq(bits=3, group_size=8, attention_bits=8)
    hqq(opt, model, None, ctx)
    packed = ctx.finish(model)
    assert opt.forecast(sketch_of(model)).specs == {name: packed.spec(name) for name in packed.names()}
    view = DenseView(packed)
    for linear in linears_of(model.config, sketch_of(model).specs):
        assert is_packed(packed, linear.name) == (linear.role not in ("router", "head")), linear
        if is_packed(packed, linear.name):
            weight = model.get(linear.name)
            weight = weight.mT.contiguous() if linear.transposed else weight
            wanted = dequantize(*quantize_hqq(weight, 8 if linear.role == "attention" else 3, 8))
            assert torch.equal(view.get(linear.name), wanted.mT if linear.transposed else wanted)


def test_experts_are_closer_than_rounded_ones(checkpoint, context):
    model, views = checkpoint(), []
    for run, options in ((hqq, Hqq), (rtn, Rtn)):
        ctx = context(run.name.replace("/", "-"))
        run(options(bits=2, group_size=16), model, None, ctx)
        views.append(DenseView(ctx.finish(model)))
    for linear in linears_of(model.config, sketch_of(model).specs):
        if linear.role == "expert":
            errors = [(view.get(linear.name) - model.get(linear.name)).abs().pow(0.7).sum() for view in views]
            assert errors[0] < errors[1]
