"""The text between two layers: micro-batches, their hidden states, and what each layer is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecli.engine.data import Batch
from moecli.engine.memory import Plan, Shelf
from moecli.engine.ranks import ALONE, Ranks

Arguments = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """One micro-batch in one layer."""

    arguments: Arguments
    rows: Tensor | None
    """Rows of [B*S] that statistics count: no padding, nothing masked; None when all are."""


@dataclass(frozen=True, slots=True)
class Text:
    """Where the batches of this process stand in the whole text. Only tokens that statistics count are counted."""

    ranks: Ranks
    first: int
    """Running number of the first token here."""
    here: int
    tokens: int
    """In the whole text, over all ranks."""

    @classmethod
    def of(cls, batches: Sequence[Batch], ranks: Ranks = ALONE) -> Text:
        """`batches` are those of all ranks."""
        counts = [int(batch.counted.count_nonzero()) for batch in batches]
        return cls(ranks, sum(counts[: ranks.block(len(counts))[0]]), sum(ranks.split(counts)), sum(counts))


class Flow:
    """Micro-batches on their way through the layers; `sources` says which batch each is part of."""

    def __init__(self, batches: Sequence[Batch], device: torch.device, plan: Plan, text: Text | None = None) -> None:
        self.device = device
        self.text = text or Text.of(batches)
        self.batches: list[Batch] = []
        self.sources: list[int] = []
        self.hidden: list[Tensor] = []
        self.shelf = Shelf(plan.home, device, plan.states)
        self.sequences = plan.sequences
        self._set([(i, part) for i, batch in enumerate(batches) for part in _split(batch, plan.sequences)])

    def _set(self, parts: Sequence[tuple[int, Batch]]) -> None:
        self.sources, self.batches = [i for i, _ in parts], [batch for _, batch in parts]
        self._rows = [_valid_rows(batch, self.device) for batch in self.batches]
        self._arguments: list[list[Arguments]] = []
        self._known: dict[tuple, list[Tensor]] = {}

    def add(self, arguments: Sequence[Arguments]) -> None:
        """What every layer is called with for the next micro-batch. Equal tensors are kept once: without padding all
        micro-batches share them.
        """
        seen: dict[int, Tensor] = {}
        self._arguments.append([mapped(layer, lambda t: self._shared(t, seen)) for layer in arguments])

    def run(self, layer: int, index: int) -> Run:
        return Run(self._arguments[index][layer], self._rows[index])

    def here(self, index: int) -> Tensor:
        """The hidden state of a micro-batch before the layer, on the device."""
        return self.hidden[index].to(self.device, non_blocking=True)

    def advance(self, outputs: list[Tensor]) -> None:
        """What the layer made is what the next one is fed."""
        self.hidden = outputs
        self.shelf.turn()

    def halve(self) -> bool:
        """Half as many sequences at a time from here on, arguments to be added anew; False with one sequence."""
        self.sequences = max(batch.input_ids.shape[0] for batch in self.batches) // 2
        if self.sequences == 0:
            return False
        hidden = [part for state in self.hidden for part in state.split(self.sequences)]
        pairs = zip(self.sources, self.batches, strict=True)
        self._set([(i, part) for i, batch in pairs for part in _split(batch, self.sequences)])
        self.hidden = hidden
        return True

    def joined(self, values: Sequence[Tensor]) -> list[Tensor]:
        """One value per batch, from one per micro-batch."""
        groups: dict[int, list[Tensor]] = {}
        for source, value in zip(self.sources, values, strict=True):
            groups.setdefault(source, []).append(value)
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in groups.values()]

    def _shared(self, tensor: Tensor, seen: dict[int, Tensor]) -> Tensor:
        if id(tensor) not in seen:
            known = self._known.setdefault((tensor.shape, tensor.dtype), [])
            mine = self._kept(tensor)
            equal = next((other for other in reversed(known[-4:]) if torch.equal(other, mine)), None)
            if equal is None:
                known.append(mine)
            seen[id(tensor)] = mine if equal is None else equal
        return seen[id(tensor)]

    def _kept(self, tensor: Tensor) -> Tensor:
        if self.shelf.home == "device":
            return tensor.to(self.device)
        return tensor.cpu().pin_memory() if self.device.type == "cuda" else tensor.cpu()


class Recorder(nn.Module):
    """Stands for a decoder layer: notes its arguments and returns its input, or `answer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.hidden, self.arguments = hidden, (args[1:], kwargs)
        return hidden if self.answer is None else self.answer


class Replaced:
    """The decoder layers of a model, replaced for a while."""

    def __init__(self, model: nn.Module, path: str, layers: Sequence[nn.Module]) -> None:
        parent, _, self._name = path.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._mine, self._stock = nn.ModuleList(layers), getattr(self._parent, self._name)

    def __enter__(self) -> None:
        setattr(self._parent, self._name, self._mine)

    def __exit__(self, *exc: object) -> None:
        setattr(self._parent, self._name, self._stock)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: mapped(v, change) for k, v in value.items()}
    return value


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    return mapped(arguments, lambda tensor: tensor.to(device, non_blocking=True))


def inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}


def _split(batch: Batch, sequences: int) -> list[Batch]:
    return [batch.part(start, start + sequences) for start in range(0, len(batch.input_ids), sequences)]


def _valid_rows(batch: Batch, device: torch.device) -> Tensor | None:
    mask = batch.counted.flatten()
    return None if bool(mask.all()) else mask.nonzero().flatten().to(device)
