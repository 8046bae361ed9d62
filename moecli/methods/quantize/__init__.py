"""Fewer bits per weight: what methods that write integers share. Which weights, the format, what the config says.

Written as compressed-tensors `pack-quantized`, symmetric, one scale per group of inputs; experts that one tensor a
layer holds (granitemoe, gpt_oss) in the stacked form of `io.formats`, which loads as `export: compact`. Routers, gates
of shared experts, embeddings and the head stay as they are. All routed experts have one width: mixed ones load
wrongly in transformers without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import PositiveInt

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import MoecliError, Problem
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.core.stage import Options
from moecli.families import Linear, family_of, linears_of
from moecli.io.formats import Group, packed_specs, quantization_config

Bits = Literal[2, 3, 4, 8]
KEPT = 16
"""Stands for a weight that stays as it is."""


class Quantize(Options):
    """Options of a quantizing method."""

    bits: Bits = 4
    """Bits per weight of the routed experts, and of everything that has no own number below. vLLM runs 4 and 8."""
    attention_bits: Literal[2, 3, 4, 8, 16] | None = None
    """Bits of attention and of dense layers; 16 leaves them as they are, nothing: as `bits`."""
    shared_bits: Literal[2, 3, 4, 8, 16] | None = None
    """Bits of shared experts; 16 leaves them as they are, nothing: as `bits`."""
    group_size: PositiveInt = 128
    """Inputs that share a scale; must divide every quantized width."""

    def of_role(self, role: str) -> int:
        """Bits of weights in this role; KEPT for those that stay."""
        if role in ("attention", "dense"):
            return self.attention_bits or self.bits
        if role == "shared":
            return self.shared_bits or self.bits
        return self.bits if role == "expert" else KEPT

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
        for linear in targets(self, model.config, specs):
            spec = specs.pop(linear.name)
            specs |= packed_specs(linear.name, spec, self.of_role(linear.role), self.group_size, linear.transposed)
        return replace(model, specs=specs, facts=replace(model.facts, quantized="compressed-tensors"))


def targets(opt: Quantize, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> list[Linear]:
    """The weights that are quantized. MoecliError when `group_size` does not divide the inputs of one."""
    found = [linear for linear in linears_of(config, specs) if opt.of_role(linear.role) != KEPT]
    for linear in found:
        width = specs[linear.name].shape[-2 if linear.transposed else -1]
        if width % opt.group_size:
            raise MoecliError(
                f"`group_size` {opt.group_size} does not divide the input width {width} of `{linear.name}`",
                hint="write `group_size: 32`" if width % 32 == 0 else None,
            )
    return found


def packed_config(opt: Quantize, model: Checkpoint, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """config.json of the quantized model: one scheme, and a group of exact names for each other number of bits."""
    linears = list(linears_of(model.config, specs))
    left = [linear for linear in linears if opt.of_role(linear.role) == KEPT]
    family = family_of(model.config)
    # The plain target `Linear` matches modules. A tied head has no tensor on disk, and some routers are linears
    # of another name in memory (phimoe).
    routers = [family.router_module(linear.layer) for linear in left if linear.role == "router"]
    ignored = dict.fromkeys([*(_module(linear) for linear in left), *routers, "lm_head"])
    others = sorted({opt.of_role(linear.role) for linear in linears} - {opt.bits, KEPT})
    groups = [
        Group(tuple(_module(x) for x in linears if opt.of_role(x.role) == bits), bits, opt.group_size)
        for bits in others
    ]
    return dict(model.config) | {
        "quantization_config": quantization_config(opt.bits, opt.group_size, list(ignored), groups)
    }


def _module(linear: Linear) -> str:
    return linear.name.removesuffix(".weight")
