"""Round every linear weight to the nearest of 2^bits levels, one scale per group of inputs. No calibration.

scale = max|w| / ((2^bits - 1) / 2) per group, q = clamp(round(w / scale)); symmetric. What is quantized and how it is
written, every method of the kind has in common: `moecli methods quantize`. With an `allocate/...` stage above, each
routed expert has the bits that it decided.

`format` chooses small floats in place of integers, for the weights alone; inputs stay as they are:

    fp8         e4m3, scale = max|w| / 448 of each output channel
    fp8_block   e4m3, the same of each block of 128 x 128; no stock loader reads it without rounding inputs too, so
                it is exported as `research` or `expanded`
    mxfp4       e2m1 with one power of two for 32 inputs; gpt_oss's experts as its publishers write them, beside
                `attention_bits: 16`

Source: the usual baseline; grids and layouts as compressed-tensors has them, floats as in OFP8 and the OCP Microscaling
Formats specification 1.0.

- run: quantize/rtn
  with: {bits: 4, group_size: 128}
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from moecli.core.artifacts import BitPlan, Checkpoint
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.io.formats import FLOATS
from moecli.io.servable import CHANNEL, Format
from moecli.methods.quantize import KEPT, Quantize, code_each
from moecli.ops.floats import quantize_fp8, quantize_mxfp4
from moecli.ops.pack import quantize_rtn


class Rtn(Quantize):
    """Options of `quantize/rtn`."""

    any_width: ClassVar[bool] = True

    shrink: bool = False
    """Search each scale among 80 smaller ones for the least |error|^2.4, in place of the largest weight's."""
    format: Literal["int", "fp8", "fp8_block", "mxfp4"] = "int"
    """What codes are. Small floats decide `bits` and `group_size` themselves, so leave these out: 8 bits for `fp8` and
    `fp8_block`, 4 in groups of 32 for `mxfp4`. `group_size` plays no part in `fp8` and `fp8_block`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """A format brings its bits and group size."""
        if not isinstance(values, dict) or (fixed := _fixed(values.get("format"))) is None:
            return values
        bits, group_size = fixed
        return {"bits": bits, **({"group_size": group_size} if group_size != CHANNEL else {}), **values}

    def stored_as(self) -> Format:
        return self.format

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if (fixed := _fixed(self.format)) is None:
            return
        bits, group_size = fixed
        for name in ("attention_bits", "shared_bits"):
            if getattr(self, name) not in (None, bits, KEPT):
                message = f"everything that is quantized is {self.format}, which has {bits} bits"
                yield Problem(name, message, hint=f"leave `{name}` out, or write `{name}: {KEPT}`")
        if self.bits != bits:
            yield Problem("bits", f"`{self.format}` has {bits} bits, got {self.bits}", hint="leave `bits` out")
        if self.format == "mxfp4" and self.group_size != group_size:
            message = f"`mxfp4` has groups of {group_size}, got {self.group_size}"
            yield Problem("group_size", message, hint="leave `group_size` out")
        if self.shrink:
            yield Problem("shrink", f"`{self.format}` has no search for scales", hint="leave `shrink` out")


def _fixed(format: Any) -> tuple[int, int] | None:
    """Bits and group size of a format that has no choice of them."""
    return FLOATS.get(format) if isinstance(format, str) else None


@stage("quantize/rtn", version=3)
def rtn(opt: Rtn, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> Checkpoint:
    return code_each(opt, model, plan, partial(_code, opt), ctx)


def _code(opt: Rtn, weight_BNK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if opt.format == "mxfp4":
        return quantize_mxfp4(weight_BNK)
    if opt.format != "int":
        return quantize_fp8(weight_BNK, blocks=opt.format == "fp8_block")
    return quantize_rtn(weight_BNK, bits, opt.group_size, opt.shrink)
