"""Checkpoints that live in memory, so that tests can hand the engine any set of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moecli.core.artifacts import Checkpoint, Packed, PartWriter
from moecli.core.model import TensorSpec
from moecli.families import ALIAS_KEY, facts_of, family_of
from moecli.io.reader import FolderCheckpoint


class MemoryCheckpoint(Checkpoint):
    """Tensors by on-disk name, and a config."""

    def __init__(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], files: Mapping[str, str] | None = None
    ):
        self.tensors, self.config, self.files = dict(tensors), dict(config), dict(files or {})
        self.facts = facts_of(config)

    @classmethod
    def of(cls, source: Checkpoint) -> Self:
        """A copy that may be changed."""
        return cls({n: source.get(n) for n in source.names()}, source.config, source.side_files())

    def names(self) -> list[str]:
        return list(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        tensor = self.tensors[name]
        return TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        return self.tensors[name].to(device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]

    def side_files(self) -> Mapping[str, str]:
        return self.files

    def pack(self) -> Packed:
        raise NotImplementedError

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        raise NotImplementedError


class _Part(PartWriter):
    def __init__(self, target: MemoryCheckpoint) -> None:
        self.target = target

    def put(self, name: str, tensor: Tensor) -> None:
        self.target.tensors[name] = tensor

    def rename(self, name: str, parent_name: str) -> None:
        raise NotImplementedError

    def drop(self, name: str, reason: str) -> None:
        del self.target.tensors[name]


def open_folder(folder: Path) -> FolderCheckpoint:
    return FolderCheckpoint(folder, facts_of)


def aliased(source: Checkpoint, leads: Sequence[int], alias: Sequence[int]) -> tuple[Checkpoint, Checkpoint]:
    """One function stored twice: with an alias map onto the experts `leads`, and expanded to E copies."""
    small, large = MemoryCheckpoint.of(source), MemoryCheckpoint.of(source)
    family = family_of(source.config)
    for layer in source.facts.moe_layers:
        experts = [family.read_expert(source, layer, lead) for lead in leads]
        family.write_experts(_Part(large), source, layer, [experts[index] for index in alias])
        family.write_experts(_Part(small), source, layer, experts)
        small.tensors[family.alias_name(layer)] = torch.tensor(alias)
    counts = {str(layer): len(leads) for layer in source.facts.moe_layers}
    return MemoryCheckpoint(small.tensors, {**source.config, ALIAS_KEY: counts}), large
