"""Round weights to 2^bits levels, each scale the one that forgives outliers: half-quadratic splitting (HQQ).

Per group of inputs the scale with the least sum |w - s q|^0.7 that 20 steps find (`ops.halfquad`); of all steps the
best is kept, so none is worse by this norm than `quantize/rtn`. Published HQQ keeps the scale and moves a zero point,
in floating point; the symmetric integers that are written here have none, so it is the scale that moves, and its
numbers are not those of the paper. What is quantized and how it is written, every method of the kind has in common,
plans of bits (`allocate/...`) too.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.

- run: quantize/hqq
  with: {bits: 3, group_size: 64}
"""

from __future__ import annotations

from functools import partial

from moecli.core.artifacts import BitPlan, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.quantize import Quantize, code_each
from moecli.ops.halfquad import quantize_hqq


class Hqq(Quantize):
    """Options of `quantize/hqq`."""


@stage("quantize/hqq", version=1)
def hqq(opt: Hqq, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> Checkpoint:
    return code_each(opt, model, plan, partial(quantize_hqq, group_size=opt.group_size), ctx)
