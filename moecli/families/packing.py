"""How the routed experts of a model are packed, read from its config and headers: what `io.servable` is asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moecli.core.model import ModelSketch, TensorSpec
from moecli.families.family import Family, family_of
from moecli.io.formats import Group, Schemes, packed_names, packed_weights, scheme_of, schemes_of
from moecli.io.gpt_oss_layout import as_packed_specs
from moecli.io.servable import CHANNEL, Form, Mix

DENSE = Group((), 16, CHANNEL)
"""Stands for an expert that is not packed."""


def form_of(model: ModelSketch) -> Form | None:
    """How all routed experts are stored; None when none is packed, or when there are no headers to tell.

    SurroundingsError for a quantization that is not ours to read.
    """
    model = replace(model, specs=as_packed_specs(model.specs))
    packed = packed_weights(model.specs)
    schemes = schemes_of(model.config)
    if not packed or not schemes:
        return None
    # Of a packed weight only name and rank count here, and the packed words have the same rank.
    names = {name: packed_names(name).packed for name in packed}
    specs = {**model.specs, **{name: model.specs[word] for name, word in names.items() if word in model.specs}}
    family = family_of(model.config)
    layers = {layer: _layer(family, layer, specs, packed, schemes) for layer in family.facts.moe_layers}
    every = {scheme for rows in layers.values() for row in rows for scheme in row}
    if every == {DENSE}:
        return None
    used = every - {DENSE} or every
    formats = {scheme.format for scheme in used}
    stacked = any(len(specs[name].shape) == 3 for name in packed)
    return Form(
        format=formats.pop() if len(formats) == 1 else "int",
        bits=tuple(sorted({scheme.bits for scheme in every})),
        groups=tuple(sorted({scheme.group_size for scheme in used})),
        mix=_mix(layers),
        stacked=stacked,
        dtype=family.facts.dtype,
    )


def _layer(
    family: Family, layer: int, specs: Mapping[str, TensorSpec], packed: set[str], schemes: Schemes
) -> list[list[Group]]:
    """[expert][projection], without the targets."""
    form = family.layout(specs, layer)
    names = [form.names_of(expert) for expert in range(family.experts_in(layer))]
    return [[_bare(name, packed, schemes) for name in row if not name.endswith("bias")] for row in names]


def _bare(name: str, packed: set[str], schemes: Schemes) -> Group:
    return scheme_of(name, schemes)._replace(targets=()) if name in packed else DENSE


def _mix(layers: Mapping[int, list[list[Group]]]) -> Mix:
    """What schemes differ by, the coarsest that is true."""
    if len({scheme for rows in layers.values() for row in rows for scheme in row}) == 1:
        return "none"
    if all(len({scheme for row in rows for scheme in row}) == 1 for rows in layers.values()):
        return "layer"
    alike = all(len({tuple(row) for row in rows}) == 1 for rows in layers.values())
    return "projection" if alike else "expert"
