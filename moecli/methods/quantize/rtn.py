"""Round every linear weight to the nearest of 2^bits levels, one scale per group of inputs. No calibration.

scale = max|w| / ((2^bits - 1) / 2) per group, q = clamp(round(w / scale)); symmetric. Routers, gates of shared
experts, embeddings and the head stay as they are. Written as compressed-tensors `pack-quantized`; experts that
one tensor a layer holds (granitemoe, gpt_oss) in the stacked form of `io.formats`, which loads as `export: compact`.

Source: the usual baseline; grid and layout as compressed-tensors has them.

- run: quantize/rtn
  with: {bits: 4, group_size: 128}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from moecli.core.artifacts import Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.errors import MoecliError, Problem
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.core.stage import Options, stage
from moecli.families import Linear, family_of, linears_of
from moecli.io.formats import packed_specs, put_packed, put_packed_stack, quantization_config
from moecli.ops.pack import pack_rows, quantize_rtn

QUANTIZED_ROLES = frozenset({"expert", "shared", "attention", "dense"})
BATCH_ELEMENTS = 1 << 26
"""Weights rounded in one go: 1 GiB of fp32 temporaries."""


class Rtn(Options):
    """Options of `quantize/rtn`."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    group_size: PositiveInt = 128
    """Inputs that share a scale; must divide every quantized width."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.quantized:
            yield Problem(
                "", f"the model is quantized already ({model.quantized})", hint="set `model` to a bfloat16 copy of it"
            )
        named = {"model width": model.hidden, "expert width": model.expert_width, "shared width": model.shared_width}
        widths = {name: width for name, width in named.items() if width}
        wrong = [f"{name} {width}" for name, width in widths.items() if width % self.group_size]
        if wrong:
            fits = [g for g in (128, 64, 32, 16) if all(width % g == 0 for width in widths.values())]
            message = f"`group_size` {self.group_size} does not divide the {' and the '.join(wrong)}"
            yield Problem("group_size", message, hint=f"write `group_size: {fits[0]}`" if fits else None)

    def forecast(self, model: ModelSketch) -> ModelSketch:
        specs = dict(model.specs)
        for linear in _targets(model.config, specs):
            spec = specs.pop(linear.name)
            _check(self, linear, spec)
            specs |= packed_specs(linear.name, spec, self.bits, self.group_size, linear.transposed)
        return replace(model, specs=specs, facts=replace(model.facts, quantized="compressed-tensors"))


@stage("quantize/rtn", version=2)
def rtn(opt: Rtn, model: Checkpoint, ctx: Context) -> Checkpoint:
    specs = {name: model.spec(name) for name in model.names()}
    targets = _targets(model.config, specs)
    for linear in targets:
        _check(opt, linear, specs[linear.name])
    with ctx.writer(model, config=_packed_config(opt, model, specs)) as out:
        for layer in ctx.track(sorted({linear.layer for linear in targets}), "rounding"):

            def write(part: PartWriter, layer: int = layer) -> None:
                mine = [linear for linear in targets if linear.layer == layer]
                matrices = [linear.name for linear in mine if len(specs[linear.name].shape) == 2]
                for names in _batches(matrices, specs):
                    weight_BNK = torch.stack([model.get(name, ctx.device) for name in names])
                    codes_BNK, scale_BNG = quantize_rtn(weight_BNK, opt.bits, opt.group_size)
                    for name, codes, scale in zip(names, codes_BNK, scale_BNG, strict=True):
                        put_packed(part, name, codes, scale, opt.bits)
                for linear in mine:
                    if linear.name not in matrices:
                        _write_stack(opt, part, model, linear, specs[linear.name], ctx.device)

            out.part(f"layer-{layer:03d}", write)
    return out.checkpoint


def _write_stack(
    opt: Rtn, part: PartWriter, model: Checkpoint, linear: Linear, spec: TensorSpec, device: torch.device
) -> None:
    """Pack all experts of a layer, so many at a time that BATCH_ELEMENTS are not exceeded."""
    experts = spec.shape[0]
    step = max(1, BATCH_ELEMENTS * experts // spec.numel)
    packed, scales = [], []
    for start in range(0, experts, step):
        weight = model.rows(linear.name, start, min(start + step, experts)).to(device)
        weight_ENK = weight.mT.contiguous() if linear.transposed else weight
        codes_ENK, scale_ENG = quantize_rtn(weight_ENK, opt.bits, opt.group_size)
        packed.append(pack_rows(codes_ENK, opt.bits).cpu())
        scales.append(scale_ENG.cpu())
    put_packed_stack(part, linear.name, torch.cat(packed), torch.cat(scales), spec.shape, opt.bits, linear.transposed)


def _packed_config(opt: Rtn, model: Checkpoint, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    left = [linear for linear in linears_of(model.config, specs) if linear.role not in QUANTIZED_ROLES]
    family = family_of(model.config)
    # The plain target `Linear` matches modules. A tied head has no tensor on disk, and some routers are linears
    # of another name in memory (phimoe).
    routers = [family.router_module(linear.layer) for linear in left if linear.layer is not None]
    ignored = dict.fromkeys([*(linear.name.removesuffix(".weight") for linear in left), *routers, "lm_head"])
    return dict(model.config) | {
        "quantization_config": quantization_config(opt.bits, opt.group_size, ignore=list(ignored))
    }


def _batches(names: Sequence[str], specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    """Weights of one shape and dtype together, at most BATCH_ELEMENTS at a time."""
    alike: dict[TensorSpec, list[str]] = {}
    for name in names:
        alike.setdefault(specs[name], []).append(name)
    for spec, some in alike.items():
        size = max(1, BATCH_ELEMENTS // spec.numel)
        yield from (some[start : start + size] for start in range(0, len(some), size))


def _targets(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> list[Linear]:
    return [linear for linear in linears_of(config, specs) if linear.role in QUANTIZED_ROLES]


def _check(opt: Rtn, linear: Linear, spec: TensorSpec) -> None:
    width = spec.shape[-2 if linear.transposed else -1]
    if width % opt.group_size:
        raise MoecliError(
            f"`group_size` {opt.group_size} does not divide the input width {width} of `{linear.name}`",
            hint="write `group_size: 32`" if width % 32 == 0 else None,
        )
