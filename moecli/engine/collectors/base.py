"""What every statistic is: a collector that sees a layer's tokens in chunks, and a rule how results combine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moecli.core.model import ScoreRule
from moecli.engine.collectors.grouped import Grouped

Need = Literal[
    "outputs", "inner", "all_sums", "all_outputs", "logits", "residual", "block", "before", "slope", "gradients"
]  # fmt: skip
"""What a collector reads of `Grouped`: `outputs` routed y, `inner` what the down projections of routed experts take,
`all_sums` sums over tokens of what every expert makes of every token (E/k times the work), `all_outputs` each of these
outputs, `logits` router logits, `residual` the stream before the block and the routed sum, `block` what the whole block
adds, `before` the experts of the layer before, `slope` the loss's gradient at the layer's output, of a backward
sweep. `gradients` are not in `Grouped`: a backward sweep finds them
(`engine.pullback.Pulled`).
"""
Reduce = Literal["sum", "max", "sample", "trace"]
"""How results over different text combine: added, the larger, the rows with the smallest keys, one after the other."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of the layer that is observed."""

    experts: int
    """Stored experts: E, or M of an alias checkpoint."""
    rows: int
    """Router rows: E"""
    hidden: int
    """D"""
    score: ScoreRule
    width: int
    """F"""
    slots: int
    """k"""
    before: int
    """Stored experts of the MoE layer before; 0 when this is the first."""


class Collector(ABC):
    """One statistic of one layer: `start` once, `update` for every chunk, `result` at the end."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    reduce: ClassVar[Reduce] = "sum"
    """How results of several runs combine, see `joined`."""
    total: Tensor
    """Of a sum or a maximum: all there is of it, on the device. Processes combine it before `result`."""
    routed: ClassVar[bool]
    """True when entry i depends on the tokens routed to expert i alone, False when on others too."""

    @abstractmethod
    def start(self, shape: LayerShape, device: torch.device) -> None: ...

    @abstractmethod
    def update(self, grouped: Grouped) -> None: ...

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Statistic by name, on the device or the CPU; names are the collector's own or start with it and `_`. Only now
        may the device be waited for.
        """

    @classmethod
    def held_bytes(cls, shape: LayerShape) -> int:
        """Device memory held while a layer is observed, for the memory plan; 0 when it is small."""
        return 0


class Total(Collector):
    """A collector that holds one tensor: sums in fp64 (int64 for counts), maxima in fp32."""

    dtype: ClassVar[torch.dtype] = torch.float64

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts,)

    @abstractmethod
    def of(self, grouped: Grouped) -> Tensor:
        """This chunk's share."""

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self.total = torch.zeros(self.size(shape), dtype=self.dtype, device=device)

    def update(self, grouped: Grouped) -> None:
        share = self.of(grouped)
        if self.reduce == "max":
            torch.maximum(self.total, share, out=self.total)
        else:
            self.total += share

    def result(self) -> dict[str, Tensor]:
        return {self.name: self.total}

    @classmethod
    def held_bytes(cls, shape: LayerShape) -> int:
        return math.prod(cls.size(shape)) * cls.dtype.itemsize
