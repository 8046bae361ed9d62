"""Samples of tokens. Which tokens is decided by a hash of their running number in the text alone: the s with the
smallest hash. So the sample is uniform, the same for every layer, collector, micro-batch size and number of ranks, and
two samples join to that of both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moecli.engine.collectors.base import Collector, LayerShape
from moecli.engine.collectors.grouped import Grouped
from moecli.engine.fetch import fetched


def token_key(token_T: Tensor) -> Tensor:
    """A number in [0, 2^63) for each token that looks random and never changes, int64; on the CPU. What SplitMix64
    answers at that step from 0, without the last bit.
    """
    value = (token_T.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((value ^ (value >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


class Sample(Collector):
    """Rows of s tokens, by rising key, and their keys (int64 [s], `<name>_key`); fewer than s of a shorter text."""

    reduce = "sample"
    routed = False
    tokens: ClassVar[int]
    """s"""
    dim: ClassVar[int] = 0
    """Dimension of the result that counts tokens."""

    def start(self, shape: LayerShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._key_S = torch.empty(0, dtype=torch.int64)
        self._rows: Tensor | None = None

    def update(self, grouped: Grouped) -> None:
        """Decided on the CPU: only rows that enter the sample are computed, and the device is not waited for."""
        key_T, held = token_key(grouped.token_T), len(self._key_S)
        enter = key_T < self._key_S[-1] if held == self.tokens else torch.ones_like(key_T, dtype=torch.bool)
        below = enter.nonzero().flatten()
        if len(below) == 0:
            return
        key_A = torch.cat([self._key_S, key_T[below]])
        keep_S = key_A.argsort(stable=True)[: self.tokens]
        self._key_S = key_A[keep_S]
        new = (keep_S >= held).nonzero().flatten()
        picked_T = self._there(below[keep_S[new] - held])
        values = self.of(grouped, grouped.hidden_TD.index_select(0, picked_T))
        rows = values if self._rows is None else torch.cat([self._rows, values])
        source_S = keep_S.clone()
        source_S[new] = held + torch.arange(len(new))
        self._rows = rows.index_select(0, self._there(source_S))

    def _there(self, index: Tensor) -> Tensor:
        if self._device.type == "cuda":
            index = index.pin_memory()
        return index.to(self._device, non_blocking=True)

    @abstractmethod
    def of(self, grouped: Grouped, x_SD: Tensor) -> Tensor:
        """What is kept of tokens with these inputs, tokens first."""

    @classmethod
    @abstractmethod
    def row(cls, shape: LayerShape) -> tuple[int, ...]:
        """Shape of what is kept of one token."""

    def result(self) -> dict[str, Tensor]:
        rows = torch.empty(0, *self.row(self._shape)) if self._rows is None else self._rows
        return {self.name: fetched(rows.movedim(0, self.dim).contiguous()), f"{self.name}_key": self._key_S.clone()}

    @classmethod
    def held_bytes(cls, shape: LayerShape) -> int:
        return 2 * 2 * cls.tokens * torch.Size(cls.row(shape)).numel()


class TokReservoir(Sample):
    """Inputs x of 4,096 tokens, routed wherever. [s, D] in the model's dtype, joined by key. NAEE (2402.14800),
    MergeMoE, router refits.
    """

    name = "tok_reservoir"
    tokens = 4096

    @classmethod
    def row(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.hidden,)

    def of(self, grouped: Grouped, x_SD: Tensor) -> Tensor:
        return x_SD


class ActSample(Sample):
    """h = act(gate) * up of *every* expert for the same 256 tokens, routed there or not. [E, s, F] in the model's
    dtype, joined by key. REAM, alignment of neurons by activations. Only tokens that enter the sample are computed.
    """

    name = "act_sample"
    tokens = 256
    dim = 1

    @classmethod
    def row(cls, shape: LayerShape) -> tuple[int, ...]:
        return (shape.experts, shape.width)

    def of(self, grouped: Grouped, x_SD: Tensor) -> Tensor:
        return grouped.of_all(grouped.run_inner, x_SD).transpose(0, 1)


def joined_samples(kind: type[Sample], first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows with the smallest keys of both."""
    key = f"{kind.name}_key"
    keys = torch.cat([first[key], second[key]])
    keep = keys.argsort(stable=True)[: kind.tokens]
    rows = torch.cat([first[kind.name], second[kind.name]], kind.dim).index_select(kind.dim, keep)
    return {kind.name: rows, key: keys[keep]}
