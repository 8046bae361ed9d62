"""What becomes of config and shapes when routed experts get narrower; shared experts keep their width.

One width for all: the config's own field says it. Families whose config ties the shared width to the routed one
(count x width) get another count, so that the product stays; where no whole count does, the width is refused.

Widths by layer or by expert: the config's fields stay, and `moecli_widths` says how many channels each expert has on
disk. `padded` reads such a checkpoint as the one with zeros in the place of what is gone: it computes the same, and
whoever runs models needs no other form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import MoecliError, Problem
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.families.family import WIDTHS_KEY, family_of, without_mtp
from moecli.families.layouts import Layout
from moecli.families.sketch import _changed, _unquantized, _without_mtp
from moecli.families.table import TABLE
from moecli.io.reader import Origin, StoredView, stored
from moecli.io.tensorfile import Entry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Widths = Mapping[int, Sequence[int]]
"""{MoE layer: channels of each expert}"""


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
            form = family.layout(specs, layer)
            shapes = form.shapes([width] * family.experts_in(layer), family.facts.hidden)
            specs |= {name: TensorSpec(specs[name].dtype, shape) for name, shape in shapes.items()}
    return _changed(sketch, config, specs)


def widths_problem(facts: ModelFacts) -> Problem | None:
    """Why experts of one layer of this model cannot differ in width, or None."""
    if TABLE[facts.model_type].projections is not None:
        return None
    return Problem("", f"the experts of a layer of `{facts.model_type}` share a tensor, so they have one width")


def widths_config(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    """The config of the same model with experts of these widths."""
    return without_mtp(config) | {WIDTHS_KEY: {str(layer): list(found) for layer, found in widths.items()}}


def forecast_widths(sketch: ModelSketch, widths: Widths) -> ModelSketch:
    """The model with experts of these widths. Raises SurroundingsError for quantized experts, MoecliError where experts
    of different widths share a tensor.
    """
    family = _unquantized(sketch)
    specs = _without_mtp(family, sketch.specs)
    if specs:
        for layer, found in widths.items():
            shapes = family.layout(specs, layer).shapes(found, family.facts.hidden)
            specs |= {name: TensorSpec(specs[name].dtype, shape) for name, shape in shapes.items()}
    return _changed(sketch, widths_config(sketch.config, widths), specs)


def padded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with all experts as wide as its config's field says; the checkpoint itself where they are."""
    return _Padded(checkpoint) if checkpoint.config.get(WIDTHS_KEY) else checkpoint


class _Padded(StoredView):
    """Narrow experts with zeros behind their channels."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.parent = stored(checkpoint)
        self.facts_of = self.parent.facts_of
        self.config: Mapping[str, Any] = {k: v for k, v in checkpoint.config.items() if k != WIDTHS_KEY}
        self.facts = checkpoint.facts
        family = family_of(checkpoint.config)
        self._width, self._forms = family.facts.expert_width, dict[str, Layout]()
        self._shapes: dict[str, tuple[int, ...]] = {}
        names = set(checkpoint.names())
        for layer in map(int, checkpoint.config[WIDTHS_KEY]):
            form = family.layout(names, layer)
            whole = form.shapes([self._width] * family.experts_in(layer), family.facts.hidden)
            narrow = {name: shape for name, shape in whole.items() if checkpoint.spec(name).shape != shape}
            self._shapes |= narrow
            self._forms |= dict.fromkeys(narrow, form)

    def names(self) -> Iterable[str]:
        return self.parent.names()

    def __contains__(self, name: object) -> bool:
        return name in self.parent

    def spec(self, name: str) -> TensorSpec:
        spec = self.parent.spec(name)
        return replace(spec, shape=self._shapes[name]) if name in self._shapes else spec

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        return self._widened(name, self.parent.get(name, device))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if len(self._shapes.get(name, ())) == 2:  # rows may be channels
            return self.get(name)[start:stop]
        return self._widened(name, self.parent.rows(name, start, stop))

    def _widened(self, name: str, tensor: Tensor) -> Tensor:
        return self._forms[name].widened(name, tensor, self._width) if name in self._forms else tensor

    def origin(self, name: str) -> Origin:
        return ("own", name) if name in self._forms else self.parent.origin(name)

    def entry(self, name: str) -> Entry | None:
        return None if name in self._forms else self.parent.entry(name)
