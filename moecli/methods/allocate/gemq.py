"""Bits where the loss notices: one program over all layers, errors weighed with the loss's gradient (GEMQ).

An expert e of layer l at b bits costs c = sum over tokens and channels of (G * (Z - Z_eb))^2, G = dl/dh at the output
of decoder layer l for the next-token cross entropy l, Z the output of the MoE block and Z_eb the same with e alone
rounded to b bits: the second-order change of the loss, with the squared gradient in place of its curvature. Costs of
different layers compare, so the solver spends `average` over the whole model.

Takes a way back through all layers (`engine.backward`). Only the expert's own tokens are run again
(`engine.rounding`), which is exact; gradients and outputs are in the model's dtype, squares in fp32, sums in fp64.
Rounding is to nearest, on the symmetric grid that `quantize/...` writes, unless options say otherwise. Published is
also a fine-tuning of the router after quantization, for which `router/kd` is here, and repeating the whole at falling
averages, which is not.

Source: arXiv 2605.23078. `at_least: upper_two` is its option "c2c3".

- run: allocate/gemq
  with: {average: 2.5, bits: [1, 2, 3, 4], shrink: true}     # and `shrink: true` in `quantize/gptq` below
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import BitPlan, CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import RunSetting, stage
from moecli.engine.backward import backward_sweep
from moecli.engine.data import batches_of
from moecli.engine.rounding import SlopedRoundingErrors
from moecli.methods.allocate import Measuring, measured, solve


class Gemq(Measuring):
    """Options of `allocate/gemq`."""

    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""


@stage("allocate/gemq", version=1)
def gemq(opt: Gemq, text: CalibrationText, model: Checkpoint, ctx: Context) -> BitPlan:
    return solve(measured(lambda: _costs(opt, text, model, ctx), opt, text, ctx, what="slopes"), opt, model, ctx)


def _costs(opt: Gemq, text: CalibrationText, model: Checkpoint, ctx: Context) -> dict[int, Tensor]:
    """{layer: sum of (G * (Z - Z_eb))^2, float64 [E, levels]}"""
    batches = batches_of(text, opt.batch_size)
    swept = backward_sweep(model, batches, device=ctx.device, track=ctx.track, statistics=opt.held())
    one_block = torch.tensor([text.ids.numel()])
    found = {}
    for layer in swept.back():
        if layer.is_moe:
            errors = SlopedRoundingErrors(layer.parts.experts, opt.levels(), opt.rounding_of(layer), one_block)
            found[layer.index] = layer.observe([errors])[errors.name][0]
    for line in swept.report():
        ctx.note(line)
    return dict(sorted(found.items()))
