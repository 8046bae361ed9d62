"""What goes into the linears of a layer that are no routed experts: Gram matrices of their inputs, mean sizes, and
whether it is what a norm has just made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moecli.engine.collectors import Collector, Grouped, LayerShape
from moecli.engine.sweep import SweptLayer
from moecli.ops import gram


class InputGrams(Collector):
    """Sum over all tokens of x x^T for the input x of each of some linears, [C, C] on the device, padding left out.

    Linears that are fed the same tensor one after the other (q, k, v; gate, up) share one matrix. As a collector it
    only starts anew when the others do, and sees the text of one process; `watching` puts the hooks in place.
    """

    name = "input_grams"
    routed = False

    def __init__(self, layer: SweptLayer, modules: Mapping[str, nn.Module]) -> None:
        self._layer, self._modules = layer, modules
        self._totals: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def start(self, shape: LayerShape | None, device: torch.device) -> None:
        self.total = torch.zeros(())
        self._totals, self._leader, self._last = {}, {}, None

    def update(self, grouped: Grouped) -> None:
        self._last = None

    def result(self) -> dict[str, Tensor]:
        return {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self._modules.items():
                handle = module.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0]))
                hooks.callback(handle.remove)
            yield
        self._last = None

    def _see(self, name: str, x: Tensor) -> None:
        if self._last is not None and self._last[1] is x:
            self._leader[name] = self._last[0]
            return
        self._last, self._leader[name] = (name, x), name
        rows = x.reshape(-1, x.shape[-1])
        if self._layer.rows is not None:
            rows = rows[self._layer.rows]
        self._add(name, rows)

    def _add(self, name: str, rows_TC: Tensor) -> None:
        width, device = rows_TC.shape[-1], rows_TC.device
        if name not in self._totals:
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            self._totals[name] = torch.zeros(1, width, width, dtype=dtype, device=device)
        end_1 = torch.full((1,), len(rows_TC), dtype=torch.int32, device=device)
        gram.add(self._totals[name], rows_TC, None, end_1)

    def sharing(self) -> dict[str, list[str]]:
        """First of the linears that share an input -> all of them, in the order they ran."""
        found: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            found.setdefault(leader, []).append(name)
        return found

    def matrix(self, leader: str) -> Tensor:
        """float32 [C, C]"""
        return gram.whole(self._totals[leader])[0].float()


class InputSizes(InputGrams):
    """Mean over all tokens of |x| for the input x of each linear, as `InputGrams` otherwise."""

    name = "input_sizes"

    def start(self, shape: LayerShape | None, device: torch.device) -> None:
        super().start(shape, device)
        self._tokens: Counter[str] = Counter()

    def _add(self, name: str, rows_TC: Tensor) -> None:
        self._totals[name] = self._totals.get(name, 0) + rows_TC.abs().sum(0, dtype=torch.float64)
        self._tokens[name] += len(rows_TC)

    def vector(self, leader: str) -> Tensor:
        """float64 [C]"""
        return self._totals[leader] / self._tokens[leader]


EXPERTS = "experts"
"""Stands for the routed experts of a layer among its linears."""


class Feeds:
    """Which of a layer's norms makes what goes into each of some linears, seen while the layer runs.

    What else reads a norm's output is not seen.
    """

    def __init__(self, layer: SweptLayer, norms: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> None:
        self._layer, self._norms, self._linears = layer, norms, dict(linears)
        if layer.parts is not None:
            self._linears[EXPERTS] = layer.parts.experts
        self.norm_of: dict[str, str] = {}
        """linear, or EXPERTS -> norm, by the names that were given"""
        self._made: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks:

            def on(handle: Any) -> None:
                hooks.callback(handle.remove)

            on(self._layer.module.register_forward_pre_hook(lambda *_: self._made.clear()))
            for name, module in self._norms.items():
                on(module.register_forward_hook(lambda m, args, out, name=name: self._make(name, out)))
            for name, module in self._linears.items():
                see = partial(self._see, name)
                on(module.register_forward_pre_hook(see, with_kwargs=True))
            yield
        self._made.clear()

    def _make(self, name: str, out: Tensor) -> None:
        # The tensor is held so that nothing else can take its place in memory before the layer has run.
        self._made[out.data_ptr()] = name, out

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = [*args, *kwargs.values()][0]
        made = self._made.get(x.data_ptr())
        if made is not None and made[1].numel() == x.numel() and made[1].shape[-1] == x.shape[-1]:
            self.norm_of[name] = made[0]
