"""Scales of a layer's inputs that something in the layer takes up to the bit: what methods share that move large
inputs into norms and up projections before weights are rounded. It stands beside the kinds, as `matrices` does.

W diag(s) fed with x / s computes what W fed with x does. Scales are powers of two, so that no mantissa changes, and a
layer must compute the same bits with them: scales that do not (a norm whose output something else reads, or that adds 1
to its weight) are taken back. E experts, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.engine.linears import Feeds
from moecli.engine.sweep import SweptLayer
from moecli.families import family_of, linears_of


class Stack(NamedTuple):
    """A projection of all experts."""

    names: Sequence[str]
    """On-disk name of each expert's, or of the one tensor that holds all."""
    into: str
    """What goes in: `x` the layer's input, `h` what up and gate made of it."""
    transposed: bool


class Scales(NamedTuple):
    """One set of scales and what it does."""

    name: str
    loss: tuple[float, float]
    """Squared output error of plain rounding and of rounding with them, where the method looks at it."""
    values: Mapping[str, Tensor]
    """Factors by on-disk name, to be broadcast over the weight."""


class ScaledLayer:
    """One layer and what its weights become under scales."""

    def __init__(self, layer: SweptLayer, model: Checkpoint) -> None:
        self.layer, self.model = layer, model
        specs = {name: model.spec(name) for name in model.names()}
        self.specs = {name: spec for name, spec in specs.items() if name.startswith(f"model.layers.{layer.index}.")}
        self.linears = [x for x in linears_of(model.config, specs) if x.layer == layer.index]
        self.others = [x for x in self.linears if x.role != "expert"]
        """What multiplies and is no routed expert: the router too."""
        self.dense: dict[str, Tensor] = {}
        """New values by on-disk name."""
        self.taken_back: list[str] = []
        """Names of the scales that would have changed what the layer computes."""

    def norms(self) -> list[str]:
        return [n for n, spec in self.specs.items() if len(spec.shape) == 1 and n.endswith("norm.weight")]

    def modules(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: self.layer.linear(name) for name in names}

    def stacks(self) -> list[Stack]:
        """Gate, up and down of all experts, or the two tensors that hold them; none in a dense layer."""
        by_name = {x.name: x for x in self.linears if x.role == "expert"}
        if not by_name:
            return []
        family = family_of(self.model.config)
        form = family.layout(by_name, self.layer.index)
        first = form.names_of(0)
        if len(self.specs[first[0]].shape) == 3:
            return [Stack([name], into, by_name[name].transposed) for name, into in zip(first, "xh", strict=False)]
        names = [form.names_of(expert) for expert in range(family.experts_in(self.layer.index))]
        return [Stack([each[i] for each in names], into, False) for i, into in enumerate("xxh")]

    def of_norm(self, norm: str, feeds: Feeds, experts: Sequence[Stack], scale_C: Tensor) -> dict[str, Tensor]:
        """Factors for a norm (with its bias) that takes up 1/s, and s for the columns of everything that it feeds;
        `experts` are the stacks among that.
        """
        biased = (norm, f"{norm.removesuffix('weight')}bias")
        values = {name: 1 / scale_C for name in biased if name in self.specs}
        values |= {x.name: scale_C for x in self.others if feeds.norm_of.get(x.name) == norm}
        return values | {n: scale_C[:, None] if s.transposed else scale_C for s in experts for n in s.names}

    def scale(self, found: Sequence[Scales], before: Tensor) -> list[Scales]:
        """The scales of these with which the layer still makes `before` of the first batch, bit for bit. They are in
        `dense` and in the layer; the others are in `taken_back`.
        """
        if self._same(before, found):
            return list(found)
        exact = [scales for scales in found if self._same(before, [scales])]
        # Exact alone is exact together, but for numbers that leave the range of their type.
        exact = exact if self._same(before, exact) else []
        self.taken_back = [scales.name for scales in found if scales not in exact]
        self._same(before, exact)
        return exact

    def _same(self, before: Tensor, found: Sequence[Scales]) -> bool:
        """Whether the layer computes the same bits with these scales; it has them afterwards, and no others."""
        self.dense = {name: self.original(name) for name in self.dense}
        for scales in found:
            for name, factor in scales.values.items():
                value = self.now(name)
                self.dense[name] = (value * factor).to(value.dtype)
        self.layer.rewrite(self.dense)
        return torch.equal(self.layer.outputs()[0], before)

    def values(self, names: Sequence[str], transposed: bool, some: slice = slice(None)) -> Tensor:
        """Some matrices of a stack, or one matrix, as they were, [E, R, C]."""
        if len(names) > 1:
            return torch.stack([self.original(name) for name in names[some]])
        value = self.original(names[0])
        return value[None] if value.dim() == 2 else (value.mT if transposed else value)[some]

    def original(self, name: str) -> Tensor:
        return self.model.get(name, next(self.layer.module.parameters()).device)

    def now(self, name: str) -> Tensor:
        return self.dense[name] if name in self.dense else self.original(name)
