"""Round every linear weight to the nearest of 2^bits levels, one scale per group of inputs. No calibration.

scale = max|w| / ((2^bits - 1) / 2) per group, q = clamp(round(w / scale)); symmetric. What is quantized and how it is
written, every method of the kind has in common: `moecli methods quantize`. With an `allocate/...` stage above, each
routed expert has the bits that it decided.

Source: the usual baseline; grid and layout as compressed-tensors has them.

- run: quantize/rtn
  with: {bits: 4, group_size: 128}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from moecli.core.artifacts import BitPlan, Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.model import TensorSpec
from moecli.core.stage import stage
from moecli.families import Linear
from moecli.io.formats import put_packed, put_packed_stack
from moecli.methods.quantize import Packing, Quantize
from moecli.ops.pack import pack_rows, quantize_rtn

BATCH_ELEMENTS = 1 << 26
"""Weights rounded in one go: 1 GiB of fp32 temporaries."""


class Rtn(Quantize):
    """Options of `quantize/rtn`."""

    shrink: bool = False
    """Search each scale among 80 smaller ones for the least |error|^2.4, in place of the largest weight's."""


@stage("quantize/rtn", version=3)
def rtn(opt: Rtn, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> Checkpoint:
    specs = {name: model.spec(name) for name in model.names()}
    work = Packing(opt, model.config, specs, plan and plan.pairs())
    with ctx.writer(model, config=work.config()) as out:
        for layer in ctx.track(sorted({linear.layer for linear in work.targets}), "rounding"):

            def write(part: PartWriter, layer: int = layer) -> None:
                mine = [linear for linear in work.targets if linear.layer == layer]
                matrices = {linear.name: work.bits[linear.name] for linear in mine if _is_matrix(specs, linear)}
                for names, bits in _batches(matrices, specs):
                    weight_BNK = torch.stack([model.get(name, ctx.device) for name in names])
                    codes_BNK, scale_BNG = quantize_rtn(weight_BNK, bits, opt.group_size, opt.shrink)
                    for name, codes, scale in zip(names, codes_BNK, scale_BNG, strict=True):
                        put_packed(part, name, codes, scale, bits)
                for linear in mine:
                    if linear.name not in matrices:
                        _write_stack(opt, part, model, linear, work.bits[linear.name], ctx.device)

            out.part(f"layer-{layer:03d}", write)
    work.report(ctx)
    return out.checkpoint


def _is_matrix(specs: Mapping[str, TensorSpec], linear: Linear) -> bool:
    return len(specs[linear.name].shape) == 2


def _write_stack(
    opt: Rtn, part: PartWriter, model: Checkpoint, linear: Linear, bits: int, device: torch.device
) -> None:
    """Pack all experts of a layer, so many at a time that BATCH_ELEMENTS are not exceeded."""
    spec = model.spec(linear.name)
    experts = spec.shape[0]
    step = max(1, BATCH_ELEMENTS * experts // spec.numel)
    packed, scales = [], []
    for start in range(0, experts, step):
        weight = model.rows(linear.name, start, min(start + step, experts)).to(device)
        weight_ENK = weight.mT.contiguous() if linear.transposed else weight
        codes_ENK, scale_ENG = quantize_rtn(weight_ENK, bits, opt.group_size, opt.shrink)
        packed.append(pack_rows(codes_ENK, bits).cpu())
        scales.append(scale_ENG.cpu())
    put_packed_stack(part, linear.name, torch.cat(packed), torch.cat(scales), spec.shape, bits, linear.transposed)


def _batches(bits_of: Mapping[str, int], specs: Mapping[str, TensorSpec]) -> Iterator[tuple[list[str], int]]:
    """Weights of one shape, dtype and number of bits together, at most BATCH_ELEMENTS at a time."""
    alike: dict[tuple[TensorSpec, int], list[str]] = {}
    for name, bits in bits_of.items():
        alike.setdefault((specs[name], bits), []).append(name)
    for (spec, bits), some in alike.items():
        size = max(1, BATCH_ELEMENTS // spec.numel)
        yield from ((some[start : start + size], bits) for start in range(0, len(some), size))
