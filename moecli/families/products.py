"""What becomes of names, shapes and config when experts are stored as factors (`io.factors`)."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

from moecli.core.errors import MoecliError
from moecli.core.model import ModelSketch
from moecli.families.family import family_of
from moecli.families.layouts import PerExpert
from moecli.families.sketch import _unquantized
from moecli.io.factors import FACTORS_KEY, factor_specs, layer_entry

Choose = Callable[[int, int], Mapping[str, Any]]
"""(outputs, inputs) of a matrix -> its `rank`, `base` and `rows`."""


def factor_config(config: Mapping[str, Any], names: Container[str], choose: Choose) -> dict[str, Any]:
    """The config of the model with every routed expert's matrices stored as factors.

    `names` are those on disk. MoecliError where the family holds all experts of a layer in one tensor.
    """
    family = family_of(config)
    facts, entries = family.facts, {}
    sizes = [(facts.expert_width, facts.hidden)] * 2 + [(facts.hidden, facts.expert_width)]
    for layer in facts.moe_layers:
        form = family.layout(names, layer)
        if not isinstance(form, PerExpert):
            raise MoecliError(
                f"`{facts.model_type}` holds all experts of a layer in one tensor, which has no form as factors",
                hint="write `form: expanded`",
            )
        projections = [{"name": n, **choose(*size)} for n, size in zip(form.projections, sizes, strict=True)]
        entries[str(layer)] = layer_entry(form.prefix, family.experts_in(layer), projections)
    return {**config, FACTORS_KEY: entries}


def plain_experts(sketch: ModelSketch) -> ModelSketch:
    """The same model, once it is known that its experts will be readable as numbers of one shape. MoecliError."""
    _unquantized(sketch)
    return sketch


def forecast_factors(sketch: ModelSketch, choose: Choose) -> ModelSketch:
    """The model with its experts stored as factors. Raises MoecliError (`factor_config`), SurroundingsError for
    quantized experts.
    """
    plain_experts(sketch)
    config, specs = factor_config(sketch.config, sketch.specs, choose), dict(sketch.specs)
    for entry in config[FACTORS_KEY].values() if specs else ():
        specs = factor_specs(specs, entry)
    return replace(sketch, facts=family_of(config).facts, config=config, specs=specs)
