"""Which part of which model tensor each on-disk tensor becomes, for layouts that are plain copies.

Most families store experts one by one and run them fused: transformers stacks and concatenates what was read, which
holds a layer's weights up to three times. Where its own conversion table says "stack, then concatenate" or "as it
is", every on-disk tensor is one contiguous part of its target, so a loader may write it there directly. Everything
else (transposed, interleaved, reordered) is left to `adapter.load_layer`. Beside `adapter`, the one module that reads
transformers' conversion table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.families import adapter


class Slot(NamedTuple):
    """An on-disk tensor and its place."""

    name: str
    """On disk."""
    target: str
    """In the model."""
    part: tuple[int, int, int] | None
    """Expert, first row and end of its rows inside a fused [E, rows, columns]; None: the whole target."""

    def of(self, target: Tensor) -> Tensor:
        """The part of the target, contiguous."""
        return target if self.part is None else target[self.part[0], self.part[1] : self.part[2]]


class Slots:
    """Places of all tensors of a model, found layer by layer."""

    def __init__(self, model: Any, checkpoint: Checkpoint, names: adapter.TensorMap) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = adapter._conversions(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: entry for entry in self._converters for p in entry.source_patterns}
        self._checkpoint, self._names, self._prefix = checkpoint, names, model.base_model_prefix
        self._state = model.state_dict()
        self._dtypes = _dtypes(model, self._state)

    def empty(self, layer: int, device: torch.device) -> dict[str, Tensor]:
        """Unwritten memory for each parameter and saved buffer of a layer."""
        prefix = self._layer(layer)
        return {
            name: torch.empty(value.shape, dtype=self._dtypes[name], device=device)
            for name, value in self._state.items()
            if name.startswith(prefix)
        }

    def of(self, layer: int) -> list[Slot] | None:
        """Every on-disk tensor of a layer with its place; None unless they fill every target by plain copies."""
        by_target: dict[str, list[str]] = {}
        for name in self._names.layers[layer]:
            by_target.setdefault(self._names.targets[name], []).append(name)
        if by_target.keys() != {name for name in self._state if name.startswith(self._layer(layer))}:
            return None
        found = [self._fill(target, sources) for target, sources in by_target.items()]
        return None if any(part is None for part in found) else [slot for part in found for slot in part or ()]

    def _layer(self, layer: int) -> str:
        return f"{self._names.prefix}.{layer}."

    def _fill(self, target: str, sources: Sequence[str]) -> list[Slot] | None:
        """Places of the sources of one target, None when they are more than copied."""
        patterns = {name: self._pattern(name) for name in sources}
        kinds = set(patterns.values())
        if kinds == {None}:
            plain = len(sources) == 1 and self._shape(sources[0]) == tuple(self._state[target].shape)
            return [Slot(sources[0], target, None)] if plain else None
        converters = {id(self._by_pattern.get(kind)): self._by_pattern.get(kind) for kind in kinds}
        converter = next(iter(converters.values()))
        if None in kinds or len(converters) != 1 or not _stacks_and_concatenates(converter):
            return None
        return self._stacked(target, converter.source_patterns, patterns)

    def _stacked(self, target: str, order: Sequence[str], patterns: Mapping[str, str]) -> list[Slot] | None:
        from transformers.core_model_loading import dot_natural_key

        shape = tuple(self._state[target].shape)
        found, first = [], 0
        for pattern in order:
            names = sorted((n for n, kind in patterns.items() if kind == pattern), key=dot_natural_key)
            shapes = {self._shape(name) for name in names}
            if len(shape) != 3 or len(names) != shape[0] or len(shapes) != 1:
                return None
            rows, *columns = shapes.pop()
            if tuple(columns) != shape[2:]:
                return None
            found += [Slot(name, target, (expert, first, first + rows)) for expert, name in enumerate(names)]
            first += rows
        return found if first == shape[1] else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._checkpoint.spec(name).shape)

    def _pattern(self, name: str) -> str | None:
        """The source pattern of the converter that takes this tensor."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        return pattern if target == self._names.targets[name] else None


def _stacks_and_concatenates(converter: Any) -> bool:
    """Stack along the first dimension, then perhaps concatenate along the rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    whole = [(MergeModulelist, 0), (Concatenate, 1)]
    one = len(converter.source_patterns) == 1 and steps == whole[:1]
    return (one or steps == whole) and len(converter.target_patterns) == 1


def _dtypes(model: Any, state: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """As transformers loads: the model's own plan for some names, else what the empty tensor has."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(model.dtype if model.config.dtype is None else model.config.dtype)
    found = {name: value.dtype for name, value in state.items()}
    if plan:
        search, names_of_groups, _ = build_glob_alternation(list(plan))
        for name in found:
            if match := search.search(name):
                found[name] = plan[names_of_groups[match.lastgroup]]
    return found


def install(module: nn.Module, prefix: str, values: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Put loaded tensors, named with `prefix`, in the place of a layer's empty ones; buffers follow to the device."""
    for name, value in values.items():
        path, _, last = name.removeprefix(prefix).rpartition(".")
        owner = module.get_submodule(path)
        if last in owner._buffers:
            owner._buffers[last] = value
        else:
            owner._parameters[last] = nn.Parameter(value, requires_grad=False)
    adapter._move_buffers(module, device)
