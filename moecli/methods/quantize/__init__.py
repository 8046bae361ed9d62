"""Fewer bits per weight: what methods that write integers share. Which weights, the format, what the config says.

Written as compressed-tensors `pack-quantized`, symmetric, one scale per group of inputs (`quantize/rtn` knows small
floats as well, MXFP4 also for gpt_oss); experts that one tensor a
layer holds (granitemoe, gpt_oss) in the stacked form of `io.formats`, which loads as `export: compact`. Routers, gates
of shared experts, embeddings and the head stay as they are. All routed experts have the same bits, unless a stage above
(`allocate/...`) gives each its own: such a mix is exported as `compact`, for stock transformers would read it wrongly
without a word. Experts that share a tensor must have the same bits.

1 bit is for routed experts alone: the mean size of its group with a weight's own sign. No stock loader reads that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import BitPlan, Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.errors import MoecliError, Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch, PlannedBits, TensorSpec
from moecli.core.stage import Options, RunSetting
from moecli.families import ALIAS_KEY, FACTORED, FACTORED_HINT, WIDTHS_KEY, Linear, family_of, form_of, linears_of
from moecli.io.formats import (
    FLOATS,
    Group,
    float_specs,
    packed_specs,
    put_floats,
    put_packed,
    put_packed_stack,
    quantization_config,
)
from moecli.io.gpt_oss_layout import CONFIG as BLOCKS_CONFIG
from moecli.io.gpt_oss_layout import blocks_specs, put_blocks
from moecli.io.servable import Format, Servable, in_words, why_not
from moecli.ops.pack import INT_BITS, pack_rows

Bits = Literal[1, 2, 3, 4, 8]
KEPT = 16
"""Stands for a weight that stays as it is."""
BATCH_ELEMENTS = 1 << 26
"""Weights rounded in one go: 1 GiB of fp32 temporaries."""


class Quantize(Options):
    """Options of a quantizing method."""

    bits: Bits = 4
    """Bits per weight of the routed experts, unless a plan (`allocate/...`) gives each its own, and of everything that
    has no own number below; 1 for experts only. vLLM runs 4 and 8."""
    attention_bits: Literal[2, 3, 4, 8, 16] | None = None
    """Bits of attention and of dense layers; 16 leaves them as they are, nothing: as `bits`."""
    shared_bits: Literal[2, 3, 4, 8, 16] | None = None
    """Bits of shared experts; 16 leaves them as they are, nothing: as `bits`."""
    group_size: PositiveInt = 128
    """Inputs that share a scale; must divide every quantized width."""
    servable: Annotated[Servable, RunSetting()] = "research"
    """Who must be able to load the result and compute the same, by the table of docs/formats.md: stock transformers
    (`hf`), vLLM as well (`vllm`), or nobody: `research` allows everything, and what stock transformers cannot read is
    exported as `compact`."""

    def stored_as(self) -> Format:
        """Format of everything that is quantized."""
        return "int"

    def of_role(self, role: str) -> int:
        """Bits of weights in this role; KEPT for those that stay."""
        if role in ("attention", "dense"):
            return self.attention_bits or self.bits
        if role == "shared":
            return self.shared_bits or self.bits
        return self.bits if role == "expert" else KEPT

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if model.quantized:
            hint = FACTORED_HINT if model.quantized == FACTORED else "set `model` to a bfloat16 copy of it"
            yield Problem("", f"the model is quantized already ({model.quantized})", hint=hint)
        named = {"model width": model.hidden, "expert width": model.expert_width, "shared width": model.shared_width}
        widths = {name: width for name, width in named.items() if width}
        wrong = [f"{name} {width}" for name, width in widths.items() if width % self.group_size]
        others = ["attention_bits", *(["shared_bits"] if model.shared_width else [])]
        if self.bits == 1 and (left := [name for name in others if getattr(self, name) is None]):
            hint = f"write {' and '.join(f'`{name}: 4`' for name in left)}"
            yield Problem("bits", "1 bit is for routed experts, and `bits` holds for the rest too", hint=hint)
        if wrong and self.stored_as() not in ("fp8", "fp8_block"):
            fits = [g for g in (128, 64, 32, 16) if all(width % g == 0 for width in widths.values())]
            message = f"`group_size` {self.group_size} does not divide the {' and the '.join(wrong)}"
            yield Problem("group_size", message, hint=f"write `group_size: {fits[0]}`" if fits else None)

    def forecast(self, model: ModelSketch) -> ModelSketch:
        work = Packing(self, model.config, model.specs, model.planned_bits)
        facts = replace(model.facts, quantized="compressed-tensors")
        return replace(model, specs=work.specs(), config=work.config(), facts=facts, planned_bits=None)


class Packing:
    """Which weights of a model are quantized, and to how many bits.

    MoecliError when `group_size` does not divide the inputs of one, for a plan of another model, for a plan that gives
    experts in one tensor different bits, for small floats where there is no form of them, and when the result is not
    `servable` as asked for.
    """

    def __init__(
        self, opt: Quantize, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], plan: PlannedBits | None
    ) -> None:
        self._opt, self._config, self._specs, self._plan = opt, config, specs, plan
        self._linears = linears_of(config, specs)
        self.bits = {linear.name: opt.of_role(linear.role) for linear in self._linears}
        """Of every weight that multiplies, by on-disk name; KEPT where it stays."""
        if plan and specs:
            self.bits |= _planned(plan, config, specs)
        self.targets = [linear for linear in self._linears if self.bits[linear.name] != KEPT]
        """The weights that are quantized."""
        for linear in self.targets:
            width = specs[linear.name].shape[-2 if linear.transposed else -1]
            if opt.stored_as() in ("int", "mxfp4") and width % opt.group_size:
                raise MoecliError(
                    f"`group_size` {opt.group_size} does not divide the input width {width} of `{linear.name}`",
                    hint="write `group_size: 32`" if width % 32 == 0 else None,
                )

        self._blocks = opt.stored_as() == "mxfp4" and any(stack.blocks for stack in family_of(config).row.stacked)
        self._refuse_formless()
        self._refuse_unservable()

    def _refuse_formless(self) -> None:
        opt = self._opt
        if opt.stored_as() == "int":
            return
        if self._plan:
            raise MoecliError("a plan of bits is for integers", hint="write `format: int`")
        if self._blocks:
            if others := [x.name for x in self.targets if x.role != "expert"]:
                message = f"in MXFP4 stock readers of this model know its experts packed, but not `{others[0]}`"
                raise MoecliError(message, hint=f"write `attention_bits: {KEPT}`")
            if self._config.get(ALIAS_KEY):
                raise MoecliError(
                    "router rows share experts, and MXFP4 has no form for that", hint="write `format: int`"
                )
            return
        if stacked := [x.name for x in self.targets if len(self._specs[x.name].shape) == 3]:
            message = f"`format: {opt.stored_as()}` has no form for `{stacked[0]}`, which holds all experts of a layer"
            raise MoecliError(message, hint="write `format: int`")

    def _refuse_unservable(self) -> None:
        asked = self._opt.servable
        if asked == "research":
            return
        if self._config.get(ALIAS_KEY) or self._config.get(WIDTHS_KEY):
            what = "router rows share experts" if self._config.get(ALIAS_KEY) else "experts have different widths"
            hint = "put `- run: router/row-drop` below the merge" if self._config.get(ALIAS_KEY) else None
            raise MoecliError(
                f"`servable: {asked}` cannot be kept: {what}, which only `export: compact` holds", hint=hint
            )
        form = form_of(ModelSketch(family_of(self._config).facts, self.config(), self.specs()))
        if form and (row := why_not(form, asked)):
            message = f"`servable: {asked}` cannot be kept: experts packed to {in_words(form)}, {row.loader} {row.note}"
            raise MoecliError(
                message, hint=f"{row.hint}, or leave `servable` out" if row.hint else "leave `servable` out"
            )

    def specs(self) -> dict[str, TensorSpec]:
        """What stands on disk afterwards, by name."""
        opt, specs = self._opt, dict(self._specs)
        for linear in self.targets:
            spec, bits = specs.pop(linear.name), self.bits[linear.name]
            if self._blocks:
                specs |= blocks_specs(linear.name, spec)
                continue
            specs |= (
                packed_specs(linear.name, spec, bits, opt.group_size, linear.transposed)
                if opt.stored_as() == "int"
                else float_specs(linear.name, spec, opt.stored_as())
            )
        return specs

    def config(self) -> dict[str, Any]:
        """config.json of the quantized model: one scheme, and a group of exact names for each other number of bits.

        The one scheme is that of most experts: it is where transformers looks for all of them.
        """
        if self._blocks:
            return dict(self._config) | {"quantization_config": dict(BLOCKS_CONFIG)}
        opt, bits = self._opt, self.bits
        left = [linear for linear in self._linears if bits[linear.name] == KEPT]
        family = family_of(self._config)
        # The plain target `Linear` matches modules. A tied head has no tensor on disk, and some routers are linears
        # of another name in memory (phimoe).
        routers = [family.router_module(linear.layer) for linear in left if linear.role == "router"]
        ignored = dict.fromkeys([*(_module(linear) for linear in left), *routers, "lm_head"])
        of_experts = Counter(bits[linear.name] for linear in self._linears if linear.role == "expert")
        most = of_experts.most_common(1)[0][0] if of_experts else opt.bits
        groups = [
            Group(tuple(_module(x) for x in self._linears if bits[x.name] == other), other, opt.group_size)
            for other in sorted(set(bits.values()) - {most, KEPT})
        ]
        format = opt.stored_as()
        group_size = opt.group_size if format == "int" else FLOATS[format][1]
        packed = quantization_config(most, group_size, list(ignored), groups, format)
        return dict(self._config) | {"quantization_config": packed}

    def report(self, ctx: Context) -> None:
        """How many routed experts got how many bits, where a plan decided; their bytes with and without scales."""
        if self._plan is None:
            return
        pairs = {layer: Counter(map(_words, pairs)) for layer, pairs in self._plan.items()}
        total = sum(pairs.values(), Counter())
        experts = [linear for linear in self._linears if linear.role == "expert"]
        weights = sum(self._specs[x.name].numel for x in experts)
        plain = sum(self._specs[x.name].numel * self.bits[x.name] for x in experts)
        stored = sum(
            spec.bytes
            for x in experts
            for spec in packed_specs(
                x.name, self._specs[x.name], self.bits[x.name], self._opt.group_size, x.transposed
            ).values()
        )
        ctx.record("bits", {str(layer): dict(sorted(counts.items())) for layer, counts in pairs.items()})
        words = ", ".join(f"{count} have {bits}" for bits, count in sorted(total.items()))
        ctx.note(
            f"bits of {total.total()} routed experts: {words}; {plain / weights:.3f} a weight, "
            f"{8 * stored / weights:.3f} as stored with their scales"
        )


def _words(pair: tuple[int, int]) -> str:
    """`3`, or `2 and 4` where the down projection has bits of its own."""
    return " and ".join(dict.fromkeys(map(str, pair)))


def _planned(plan: PlannedBits, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Bits of the routed experts' weights by on-disk name."""
    family = family_of(config)
    layers, found = family.facts.moe_layers, dict[str, int]()
    if set(plan) != set(layers):
        message = f"the plan is for {len(plan)} layers with experts, the model has {len(layers)}"
        raise MoecliError(message, hint=_AGAIN)
    for layer in layers:
        pairs, experts, form = plan[layer], family.experts_in(layer), family.layout(specs, layer)
        if len(pairs) != experts:
            message = f"the plan is for {len(pairs)} experts, the model has {experts}"
            raise MoecliError(message, where=f"layer {layer}", hint=_AGAIN)
        if unknown := sorted({bits for pair in pairs for bits in pair} - set(INT_BITS)):
            message = f"there is no packed form of {unknown[0]} bits, only of {', '.join(map(str, INT_BITS))}"
            raise MoecliError(message, where=f"layer {layer}")
        inner = 1 if form.names_of(0) == form.names_of(1) else 2  # one tensor for gates and ups, or two
        for expert, (inward, outward) in enumerate(pairs):
            names = form.names_of(expert)[: inner + 1]
            for name, bits in zip(names, [*[inward] * inner, outward], strict=True):
                if found.setdefault(name, bits) != bits:
                    raise MoecliError(
                        f"`{name}` holds all experts of the layer, which the plan gives {found[name]} and {bits} bits",
                        where=f"layer {layer}", hint="allocate with `servable: vllm`: one number of bits a layer",
                    )  # fmt: skip
    return found


_AGAIN = "put the `allocate/...` stage below the stages that change experts"


def _module(linear: Linear) -> str:
    return linear.name.removesuffix(".weight")


Code = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(weights [.., N, K], bits) -> int8 codes [.., N, K] and scales [.., N, G] in the weights' dtype, or what `ops.floats`
makes of 2-D weights"""


def code_each(opt: Quantize, model: Checkpoint, plan: BitPlan | None, code: Code, ctx: Context) -> Checkpoint:
    """The model with every target packed as `code` says, which knows a weight alone and no inputs. Many at a time."""
    specs = {name: model.spec(name) for name in model.names()}
    work = Packing(opt, model.config, specs, plan and plan.pairs())
    with ctx.writer(model, config=work.config()) as out:
        for layer in ctx.track(sorted({linear.layer for linear in work.targets}), "rounding"):

            def write(part: PartWriter, layer: int = layer) -> None:
                mine = [linear for linear in work.targets if linear.layer == layer]
                matrices = {x.name: work.bits[x.name] for x in mine if len(specs[x.name].shape) == 2}
                for names, bits in _batches(matrices, specs):
                    weight_BNK = torch.stack([model.get(name, ctx.device) for name in names])
                    codes_BNK, scale_BNG = code(weight_BNK, bits)
                    for name, codes, scale in zip(names, codes_BNK, scale_BNG, strict=True):
                        if opt.stored_as() == "int":
                            put_packed(part, name, codes, scale, bits)
                        else:
                            put_floats(part, name, codes, scale, opt.stored_as())
                for linear in mine:
                    if linear.name not in matrices:
                        _write_stack(part, model, linear, work.bits[linear.name], code, ctx.device)

            out.part(f"layer-{layer:03d}", write)
    work.report(ctx)
    return out.checkpoint


def _write_stack(
    part: PartWriter, model: Checkpoint, linear: Linear, bits: int, code: Code, device: torch.device
) -> None:
    """Pack all experts of a layer, so many at a time that BATCH_ELEMENTS are not exceeded."""
    spec = model.spec(linear.name)
    experts = spec.shape[0]
    step = max(1, BATCH_ELEMENTS * experts // spec.numel)
    packed, scales = [], []
    for start in range(0, experts, step):
        weight = model.rows(linear.name, start, min(start + step, experts)).to(device)
        weight_ENK = weight.mT.contiguous() if linear.transposed else weight
        codes_ENK, scale_ENG = code(weight_ENK, bits)
        packed.append((codes_ENK if codes_ENK.dtype == torch.uint8 else pack_rows(codes_ENK, bits)).cpu())
        scales.append(scale_ENG.cpu())
    if packed[0].dtype == torch.uint8:  # MXFP4 comes packed
        put_blocks(part, linear.name, torch.cat(packed), torch.cat(scales))
        return
    put_packed_stack(part, linear.name, torch.cat(packed), torch.cat(scales), spec.shape, bits, linear.transposed)


def _batches(bits_of: Mapping[str, int], specs: Mapping[str, TensorSpec]) -> Iterator[tuple[list[str], int]]:
    """Weights of one shape, dtype and number of bits together, at most BATCH_ELEMENTS at a time."""
    alike: dict[tuple[TensorSpec, int], list[str]] = {}
    for name, bits in bits_of.items():
        alike.setdefault((specs[name], bits), []).append(name)
    for (spec, bits), some in alike.items():
        if not spec.numel:
            raise StageFailed(
                f"`{some[0]}` is empty: its expert has lost all channels",
                hint="write `floor: 1` in the `slim/...` stage above",
            )
        size = max(1, BATCH_ELEMENTS // spec.numel)
        yield from ((some[start : start + size], bits) for start in range(0, len(some), size))
