"""Round every linear weight to the nearest of 2^bits levels, one scale per group of inputs. No calibration.

scale = max|w| / ((2^bits - 1) / 2) per group, q = clamp(round(w / scale)); symmetric. What is quantized and how it is
written, every method of the kind has in common: `moecli methods quantize`. With an `allocate/...` stage above, each
routed expert has the bits that it decided.

Source: the usual baseline; grid and layout as compressed-tensors has them.

- run: quantize/rtn
  with: {bits: 4, group_size: 128}
"""

from __future__ import annotations

from functools import partial

from moecli.core.artifacts import BitPlan, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.quantize import Quantize, code_each
from moecli.ops.pack import quantize_rtn


class Rtn(Quantize):
    """Options of `quantize/rtn`."""

    shrink: bool = False
    """Search each scale among 80 smaller ones for the least |error|^2.4, in place of the largest weight's."""


@stage("quantize/rtn", version=3)
def rtn(opt: Rtn, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> Checkpoint:
    code = partial(quantize_rtn, group_size=opt.group_size, shrink=opt.shrink)
    return code_each(opt, model, plan, code, ctx)
