"""What becomes of names, shapes and config when experts go: `Family` without reading a weight.

Exact to the byte: tests compare with the specs of really changed checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moecli.core.errors import MoecliError, StageFailed, SurroundingsError
from moecli.core.model import ModelSketch, TensorSpec
from moecli.families.family import BF16_HINT, FACTORED, FACTORED_HINT, Family, alias_config, family_of

Specs = dict[str, TensorSpec]


def forecast_keep(sketch: ModelSketch, keep: int) -> ModelSketch:
    """The model pruned to `keep` experts a layer, with their router rows.

    Raises MoecliError for an illegal count and SurroundingsError for quantized experts.
    """
    family = _unquantized(sketch)
    specs = _without_mtp(family, sketch.specs)
    if specs:
        for layer in family.facts.moe_layers:
            _resize_experts(family, specs, layer, keep)
            _resize_router(family, specs, layer, keep)
    return _changed(sketch, family.shrink_config(sketch.config, keep), specs)


def forecast_alias(sketch: ModelSketch, keep: int) -> ModelSketch:
    """The model with its experts merged to `keep` a layer under an alias map; the router keeps its rows.

    Raises SurroundingsError for quantized experts.
    """
    family = _unquantized(sketch)
    specs = _without_mtp(family, sketch.specs)
    if specs:
        for layer in family.facts.moe_layers:
            _resize_experts(family, specs, layer, keep)
            specs[family.alias_name(layer)] = TensorSpec("int64", (family.facts.router_rows,))
    return _changed(sketch, alias_config(sketch.config, dict.fromkeys(family.facts.moe_layers, keep)), specs)


def forecast_row_drop(sketch: ModelSketch) -> ModelSketch:
    """The alias model with one router row for each expert. StageFailed: layers differ in experts."""
    family = family_of(sketch.config)
    counts = {family.experts_in(layer) for layer in family.facts.moe_layers}
    if len(counts) > 1:
        raise StageFailed(
            f"layers keep different numbers of experts ({min(counts)} to {max(counts)}); one count is needed",
            hint="cluster with the same `keep` in every layer",
        )
    specs = dict(sketch.specs)
    if specs:
        for layer in family.facts.moe_layers:
            specs.pop(family.alias_name(layer), None)
            _resize_router(family, specs, layer, family.facts.experts)
    return _changed(sketch, family.shrink_config(sketch.config, family.facts.experts), specs)


def _unquantized(sketch: ModelSketch) -> Family:
    """The family, once it is known that its experts will be readable as numbers."""
    family = family_of(sketch.config)
    if sketch.facts.quantized == FACTORED:
        raise MoecliError(
            "the experts are stored as low-rank factors, and no stage but an evaluation takes such a model",
            hint=FACTORED_HINT,
        )
    if sketch.facts.quantized:
        hint = BF16_HINT if family.quantized else "move this stage above the `quantize/...` stage"
        raise SurroundingsError(f"experts are quantized ({sketch.facts.quantized}) and cannot be read", hint=hint)
    return family


def _without_mtp(family: Family, specs: Mapping[str, TensorSpec]) -> Specs:
    return {name: spec for name, spec in specs.items() if not family.is_extra(name)}


def _resize_experts(family: Family, specs: Specs, layer: int, keep: int) -> None:
    """Cut the layer's specs to `keep` experts in place; widths and dtypes stay as they are."""
    form = family.layout(specs, layer)
    names = form.names_of(0)
    if names == form.names_of(1):
        specs |= {name: _cut(specs[name], 0, keep) for name in names}
    else:
        for expert in range(keep, family.experts_in(layer)):
            for name in form.names_of(expert):
                del specs[name]


def _resize_router(family: Family, specs: Specs, layer: int, keep: int) -> None:
    specs |= {name: _cut(specs[name], t.axis, keep) for name, t in family.router_names(layer, specs).items()}


def _cut(spec: TensorSpec, axis: int, length: int) -> TensorSpec:
    return replace(spec, shape=(*spec.shape[:axis], length, *spec.shape[axis + 1 :]))


def _changed(sketch: ModelSketch, config: Mapping[str, Any], specs: Specs) -> ModelSketch:
    facts = replace(family_of(config).facts, quantized=sketch.facts.quantized)
    return replace(sketch, facts=facts, config=config, specs=specs, planned=None)
