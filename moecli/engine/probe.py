"""What an observed layer shows of its tokens: hooks on its parts, and the groups that collectors read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moecli.core.errors import StageFailed
from moecli.engine.collectors import CATALOGUE, Collector, Grouped, LayerShape, needs_of
from moecli.engine.fused import FusedLayer, inner_of, is_plain, outputs_of
from moecli.families import adapter
from moecli.families.alias import ALIAS_MAP

CHUNK_BYTES = 256 << 20
"""Largest expert output held at a time, counted in fp32."""


class Probe:
    """Hooks on one MoE layer: the three inputs of `experts` (the same in every version and family), their
    sum, and, when asked for, the router's logits, the residual stream and what the block adds to it.
    """

    def __init__(self, layer: nn.Module, parts: adapter.MoeParts | None, needs: frozenset[str], index: int) -> None:
        self._layer, self._parts, self._needs, self._index = layer, parts, needs, index
        self._norms: list[tuple[Tensor, Tensor]] = []
        self.logits: Tensor | None = None
        self.residual: Tensor | None = None
        self.block: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> Probe:
        if self._parts is None:
            return self
        experts = self._parts.experts
        self._on(experts.register_forward_hook(self._see_experts, with_kwargs=True))
        if "logits" in self._needs:
            self._on(self._parts.router.register_forward_hook(self._see_router))
        if "block" in self._needs:
            self._on(self._parts.block.register_forward_hook(self._see_sum))
        if "residual" in self._needs:
            self._on(self._parts.block.register_forward_pre_hook(self._see_block, with_kwargs=True))
            for child in self._layer.children():
                self._on(child.register_forward_hook(self._see_child, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._norms.clear()

    def _on(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _see_experts(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        hidden, index, weight = [*args, *kwargs.values()]
        self.hidden, self.index, self.weight = _rows(hidden), _rows(index), _rows(weight)
        self.routed = _rows(out)

    def _see_sum(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.block = _rows(out[0] if isinstance(out, tuple) else out)

    def _see_router(self, module: nn.Module, args: tuple, out: Any) -> None:
        """Logits come first or last, never next to weights alone: they stand at the end opposite the
        integers.
        """
        values = out if isinstance(out, tuple) else (out,)
        last = not values[0].is_floating_point()
        self.logits = _rows(values[-1] if last else values[0])

    def _see_child(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        inputs = [*args, *kwargs.values()]
        if isinstance(out, Tensor) and inputs and isinstance(inputs[0], Tensor):
            self._norms.append((inputs[0], out))

    def _see_block(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The stream is the input of the norm whose output the block takes."""
        taken = next(iter([*args, *kwargs.values()]))
        self.residual = next((before for before, after in self._norms if after is taken), None)

    def route(self, rows: Tensor | None) -> Tensor:
        """int16 [T, k], stored expert of each slot of the batch's tokens without padding."""
        index = self.index if rows is None else self.index.index_select(0, rows)
        weight = self.weight if rows is None else self.weight.index_select(0, rows)
        return _coalesced(self._parts.experts, index, weight)[0].to(torch.int16)

    def tokens(
        self, rows: Tensor | None, seen: int, shape: LayerShape, fast: FusedLayer, before_Tk: Tensor | None
    ) -> Grouped:
        """The batch's tokens without padding; `seen` tokens came before, and `before_Tk` starts with theirs."""
        self._refuse_blind(shape)
        pick = (lambda x: x) if rows is None else (lambda x: x.index_select(0, rows))
        experts = self._parts.experts
        hidden, choice = pick(self.hidden), pick(self.index)
        index, weight = _coalesced(experts, choice, pick(self.weight))
        scale = getattr(self._layer, "residual_multiplier", 1.0)
        alias_E, visits = getattr(experts, ALIAS_MAP, None), fast.take()
        return Grouped(
            shape=shape, hidden_TD=hidden, index_Tk=index, weight_Tk=weight,
            token_T=torch.arange(seen, seen + len(hidden)),
            run_experts=lambda x_SD, expert_S: run_experts(experts, x_SD, expert_S),
            run_inner=lambda x_SD, expert_S: inner_of(experts, x_SD, expert_S),
            choice_Tk=choice, alias_E=alias_E,
            before_Tk=None if before_Tk is None else before_Tk[: len(hidden)],
            logits_TE=None if self.logits is None else pick(self.logits),
            residual_TD=None if self.residual is None else pick(_rows(self.residual)),
            routed_TD=pick(self.routed) if scale == 1 else pick(self.routed) * scale,
            block_TD=None if self.block is None else pick(self.block) if scale == 1 else pick(self.block) * scale,
            visits=visits,
            place_Tk=None if visits is None else pick(visits.groups.place_Tk),
            whole=rows is None and alias_E is None,
            sum_experts=None if fast.experts is None else fast.sum_all,
        )  # fmt: skip

    def _refuse_blind(self, shape: LayerShape) -> None:
        where = f"layer {self._index}"
        if "logits" in self._needs and (self.logits is None or self.logits.shape[-1] != shape.rows):
            raise StageFailed(
                f"the router does not show the logits of its {shape.rows} rows",
                where=where,
                hint=f"leave {_reading('logits')} out of `statistics`",
            )
        if "residual" in self._needs and self.residual is None:
            raise StageFailed(
                "no norm feeds the MoE block, so its input cannot be compared with the stream",
                where=where,
                hint=f"leave {_reading('residual')} out of `statistics`",
            )


def _reading(need: str) -> str:
    return ", ".join(f"`{name}`" for name, kind in CATALOGUE.items() if need in kind.needs)


def update(wanted: Sequence[Collector], seen: Grouped) -> None:
    """Show these tokens to the collectors, in chunks as large as what is made of them allows: k rows a token, or all E.
    What the layer's own pass left, and sums over tokens that it can take, need no chunks.
    """
    slots, experts, (hidden, width) = seen.index_Tk.shape[1], seen.shape.experts, (seen.shape.hidden, seen.shape.width)
    sums = [c for c in wanted if "all_sums" in c.needs]
    pairs = [c for c in wanted if "all_outputs" in c.needs]
    light = [c for c in wanted if c not in sums and c not in pairs]
    whole = seen.visits is not None or needs_of(light).isdisjoint({"outputs", "inner"})
    if seen.sum_experts is None:
        sums, pairs = [], [*sums, *pairs]
    for some, held, values_per_token in (
        (light, whole, slots * max(hidden, width)), (sums, True, 0), (pairs, False, experts * hidden),
    ):  # fmt: skip
        for chunk in _chunks(seen, values_per_token, held) if some else ():
            for collector in some:
                collector.update(chunk)


def _chunks(seen: Grouped, values_per_token: int, held: bool) -> Iterator[Grouped]:
    if held:
        yield seen
        return
    size = max(1, CHUNK_BYTES // (values_per_token * 4))
    none: dict[str, Any] = {"visits": None, "place_Tk": None, "whole": False, "sum_experts": None}
    for start in range(0, seen.tokens, size):
        values = {name: getattr(seen, name) for name in _PER_TOKEN}
        cut = {name: v if v is None else v[start : start + size] for name, v in values.items()}
        yield replace(seen, **cut, **none)


_PER_TOKEN = (
    "hidden_TD", "index_Tk", "weight_Tk", "token_T", "choice_Tk", "before_Tk", "logits_TE", "residual_TD", "routed_TD",
    "block_TD", "slope_TD",
)  # fmt: skip


def run_experts(experts: nn.Module, x_SD: Tensor, expert_S: Tensor) -> Tensor:
    """Un-gated y of each row, rows sorted by expert: grouped where that fits, else by the stock module with one slot of
    weight 1. Alias modules are entered below their map.
    """
    if is_plain(experts):
        return outputs_of(experts, x_SD, expert_S)
    stock = getattr(type(experts), "stock", type(experts))
    one = torch.ones(len(x_SD), 1, dtype=x_SD.dtype, device=x_SD.device)
    index_S1 = expert_S.clamp(max=experts.num_experts - 1).long()[:, None]
    return stock.forward(experts, x_SD, index_S1, one)


def _coalesced(experts: nn.Module, index_Tk: Tensor, weight_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Router rows to stored experts: slots of a token on the same expert become one, with the sum of the
    weights.
    """
    alias_E = getattr(experts, ALIAS_MAP, None)
    if alias_E is None:
        return index_Tk, weight_Tk
    index_Tk = alias_E[index_Tk]
    first_Tk = (index_Tk[:, :, None] == index_Tk[:, None, :]).int().argmax(-1)
    slot_k = torch.arange(index_Tk.shape[1], device=index_Tk.device)
    summed_Tk = torch.zeros_like(weight_Tk).scatter_add_(1, first_Tk, weight_Tk)
    return index_Tk.where(first_Tk == slot_k, index_Tk.new_tensor(-1)), summed_Tk


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
