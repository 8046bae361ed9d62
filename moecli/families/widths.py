"""What becomes of config and shapes when experts get narrower: one width for all routed experts.

Shared experts keep theirs. Families whose config ties the shared width to the routed one (count x width) get another
count, so that the product stays; where no whole count does, the width is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecli.core.errors import MoecliError, Problem
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.families.family import family_of, without_mtp
from moecli.families.sketch import _changed, _unquantized, _without_mtp
from moecli.families.table import TABLE


def width_problem(facts: ModelFacts, width: int) -> Problem | None:
    """Why routed experts of this model cannot be `width` wide in a stock config, or None."""
    if not 0 < width <= facts.expert_width:
        return Problem("", f"experts must keep 1 to {facts.expert_width} channels, got {width}")
    if TABLE[facts.model_type].shared_count_key is None or facts.shared_width % width == 0:
        return None
    return Problem(
        "",
        f"config.json gives the shared experts' width as a multiple of the routed one, and {width} does not divide "
        f"{facts.shared_width}",
    )


def width_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The config of the same model with routed experts of `width` channels, and no MTP layers, which keep theirs.

    Raises MoecliError where `width_problem` finds one.
    """
    family = family_of(config)
    if problem := width_problem(family.facts, width):
        raise MoecliError(problem.message, hint=problem.hint)
    new = without_mtp(config)
    new[family.row.width_key] = width
    if family.row.shared_count_key is not None and family.facts.shared_width:
        new[family.row.shared_count_key] = family.facts.shared_width // width
    return new


def forecast_width(sketch: ModelSketch, width: int) -> ModelSketch:
    """The model with routed experts of `width` channels. Raises MoecliError (`width_config`), SurroundingsError for
    quantized experts.
    """
    family = _unquantized(sketch)
    config = width_config(sketch.config, width)
    specs = _without_mtp(family, sketch.specs)
    if specs:
        for layer in family.facts.moe_layers:
            shapes = family.layout(specs, layer).shapes(family.experts_in(layer), width, family.facts.hidden)
            specs |= {name: TensorSpec(specs[name].dtype, shape) for name, shape in shapes.items()}
    return _changed(sketch, config, specs)
