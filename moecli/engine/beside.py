"""What another model feeds the same parts of a layer for the same tokens, next to every pass of a sweep: the inputs of
the unquantized model beside those that quantized layers make, and how far apart they are.

    for layer, other in zip(sweep(model, ...), sweep(model, ..., plan=the_first's), strict=True):
        beside = Beside(layer, other, names)
        with beside.watching():
            layer.observe([InputDrifts(layer, modules, beside), XDrift(beside), HDrift(beside)])

Rows of D belong to the difference: D = sum of (x~ - x) x^T, x~ of the other model. For routed experts x~ is that of the
same token whatever experts the other model sends it to, and what is inside an expert is made of it by the same expert
of the other model. Each pass of the layer runs the other one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moecli.engine.collectors import Collector, Grouped, LayerShape
from moecli.engine.fused import fused, inner_of
from moecli.engine.linears import EXPERTS, InputGrams
from moecli.engine.sweep import SweptLayer
from moecli.ops import gram


class Beside:
    """The other model's inputs of the micro-batch that runs, padding left out."""

    def __init__(self, layer: SweptLayer, other: SweptLayer, names: Iterable[str]) -> None:
        self._layer, self.other = layer, other
        self._parts: dict[str, nn.Module] = {name: other.linear(name) for name in names}
        if other.parts is not None:
            self._parts[EXPERTS] = other.parts.experts
        self._inputs: dict[str, Tensor] = {}
        self._first = self._tokens = 0

    def rows(self, name: str) -> Tensor:
        """[T, C], what goes into a linear, or into all routed experts (EXPERTS)."""
        x = self._inputs[name]
        x_TC = x.reshape(-1, x.shape[-1])
        return x_TC if self._layer.rows is None else x_TC[self._layer.rows]

    def tokens(self, grouped: Grouped) -> Tensor:
        """[T, D], what goes into the experts for the tokens of this group."""
        start = int(grouped.token_T[0]) - self._first
        return self.rows(EXPERTS)[start : start + grouped.tokens]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            hooks.enter_context(fused(self.other.module, self.other.parts, keep=False))
            handles = [self._layer.module.register_forward_pre_hook(self._run)]
            for name, part in self._parts.items():
                see = self._seer(name)
                handles.append(part.register_forward_pre_hook(see, with_kwargs=True))
            for handle in handles:
                hooks.callback(handle.remove)
            yield
        self._inputs.clear()

    def _seer(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._inputs[name] = next(iter([*args, *kwargs.values()]))

        return see

    def _run(self, *_: Any) -> None:
        """The other layer on its own hidden states of the micro-batch that is about to run."""
        here, there = self._layer._flow, self.other._flow
        while there.sequences > here.sequences:  # memory did not suffice for what runs here
            self.other._halve(self.other.index)
        index, rows = self._layer.running, self._layer.rows
        self._first = 0 if index == 0 else self._first + self._tokens
        self._inputs.clear()
        self.other._forward(index)
        self._tokens = here.batches[index].input_ids.numel() if rows is None else len(rows)


class InputDrifts(InputGrams):
    """D of each of some linears, as `InputGrams` holds their Gram matrices."""

    name = "input_drifts"

    def __init__(self, layer: SweptLayer, modules: Mapping[str, nn.Module], beside: Beside) -> None:
        super().__init__(layer, modules)
        self._beside = beside

    def _add(self, name: str, rows_TC: Tensor) -> None:
        width = rows_TC.shape[-1]
        if name not in self._totals:
            self._totals[name] = _zeros(1, width, rows_TC.device)
        end_1 = torch.tensor([len(rows_TC)])
        apart_TC = self._beside.rows(name).float() - rows_TC.float()
        gram.add_cross(self._totals[name], apart_TC, rows_TC, end_1)

    def matrix(self, leader: str) -> Tensor:
        """float32 [C, C]"""
        return self._totals[leader][0].float()


class _Drift(Collector):
    """D of routed experts over their visits, float32 [E, C, C]; `weighted`: each visit counts its g."""

    routed = True

    def __init__(self, beside: Beside, weighted: bool = False) -> None:
        self._beside, self._weighted = beside, weighted

    def update(self, grouped: Grouped) -> None:
        if grouped.tokens:
            weight_S = grouped.gate_S if self._weighted else None
            own_SC = self.inputs(grouped)
            gram.add_cross(self.total, self.others(grouped).float() - own_SC.float(), own_SC, grouped.end_E, weight_S)

    def inputs(self, grouped: Grouped) -> Tensor:
        return grouped.hidden_TD[grouped.row_S]

    def others(self, grouped: Grouped) -> Tensor:
        return self._beside.tokens(grouped)[grouped.row_S]

    def result(self) -> dict[str, Tensor]:
        return {self.name: self.total.float()}


class XDrift(_Drift):
    """Of their inputs."""

    name = "x_drift"

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self.total = _zeros(shape.experts, shape.hidden, device)


class HDrift(_Drift):
    """Of what their down projections take."""

    name = "h_drift"
    needs = frozenset({"inner"})

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self.total = _zeros(shape.experts, shape.width, device)

    def inputs(self, grouped: Grouped) -> Tensor:
        return grouped.inner_SF

    def others(self, grouped: Grouped) -> Tensor:
        x_SD = self._beside.tokens(grouped)[grouped.row_S]
        return inner_of(self._beside.other.parts.experts, x_SD, grouped.expert_S)


class XDriftPool(Collector):
    """Of the inputs of all experts over all tokens, float32 [1, D, D]."""

    name = "x_drift_pool"
    routed: ClassVar[bool] = False

    def __init__(self, beside: Beside) -> None:
        self._beside = beside

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self.total = _zeros(1, shape.hidden, device)

    def update(self, grouped: Grouped) -> None:
        if grouped.tokens:
            own_TD = grouped.hidden_TD
            end_1 = torch.tensor([grouped.tokens])
            gram.add_cross(self.total, self._beside.tokens(grouped).float() - own_TD.float(), own_TD, end_1)

    def result(self) -> dict[str, Tensor]:
        return {self.name: self.total.float()}


def _zeros(count: int, width: int, device: torch.device) -> Tensor:
    """Sums are fp32 on CUDA and fp64 on the CPU, as those of Gram matrices."""
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    return torch.zeros(count, width, width, dtype=dtype, device=device)
