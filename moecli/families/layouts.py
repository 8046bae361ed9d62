"""The experts of one layer on disk: one matrix each, or stacked in 3-D tensors. Reading, cutting, writing.

Both kinds answer the same questions, so `Family` never asks which it has. Shapes: E experts, D model width,
F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moecli.core.artifacts import Checkpoint, ExpertWeights, PartWriter
from moecli.core.errors import MoecliError
from moecli.families.table import Stacked

Shapes = Mapping[str, tuple[int, ...]]
PRUNED = "expert pruned"


class Layout(Protocol):
    """Where the experts of one layer are. Names are full on-disk names."""

    def shapes(self, widths: Sequence[int], hidden: int) -> Shapes:
        """Every expert tensor of the layer with its shape, for F of each expert and D."""
        ...

    def widened(self, name: str, tensor: Tensor, width: int) -> Tensor:
        """What stands under `name`, with zeros behind its channels up to `width`: the same function."""
        ...

    def names_of(self, expert: int) -> tuple[str, ...]:
        """The tensors that hold this expert, alone or among others."""
        ...

    def read(self, ckpt: Checkpoint, expert: int) -> ExpertWeights: ...

    def read_all(self, ckpt: Checkpoint, experts: int) -> ExpertWeights:
        """Each field with a leading E."""
        ...

    def keep(self, part: PartWriter, ckpt: Checkpoint, experts: int, kept: Sequence[int]) -> None: ...

    def write(self, part: PartWriter, ckpt: Checkpoint, experts: int, new: Sequence[ExpertWeights]) -> None: ...


@dataclass(frozen=True, slots=True)
class PerExpert:
    """`{prefix}.{expert}.{projection}.weight`, 2-D, gate [F, D], up [F, D], down [D, F]."""

    prefix: str
    projections: tuple[str, str, str]

    def names_of(self, expert: int) -> tuple[str, ...]:
        return tuple(f"{self.prefix}.{expert}.{projection}.weight" for projection in self.projections)

    def shapes(self, widths: Sequence[int], hidden: int) -> Shapes:
        found: dict[str, tuple[int, ...]] = {}
        for expert, width in enumerate(widths):
            one = ((width, hidden), (width, hidden), (hidden, width))
            found |= zip(self.names_of(expert), one, strict=True)
        return found

    def widened(self, name: str, tensor: Tensor, width: int) -> Tensor:
        axis = 1 if name.endswith(f".{self.projections[2]}.weight") else 0
        return _widened(tensor, axis, width)

    def read(self, ckpt: Checkpoint, expert: int) -> ExpertWeights:
        return ExpertWeights(*(ckpt.get(name) for name in self.names_of(expert)))

    def read_all(self, ckpt: Checkpoint, experts: int) -> ExpertWeights:
        first = self.read(ckpt, 0)
        stacks = [tensor.new_empty((experts, *tensor.shape)) for tensor in first[:3]]
        for expert in range(experts):
            for stack, name in zip(stacks, self.names_of(expert), strict=True):
                stack[expert] = ckpt.get(name)
        return ExpertWeights(*stacks)

    def keep(self, part: PartWriter, ckpt: Checkpoint, experts: int, kept: Sequence[int]) -> None:
        for new, old in enumerate(kept):
            if new != old:
                for name, old_name in zip(self.names_of(new), self.names_of(old), strict=True):
                    part.rename(name, old_name)
        # Names below len(kept) live on, now holding another expert; those above must go, kept or not.
        moved = {old: new for new, old in enumerate(kept)}
        for old in range(len(kept), experts):
            for name in self.names_of(old):
                part.drop(name, f"expert renumbered to {moved[old]}" if old in moved else PRUNED)

    def write(self, part: PartWriter, ckpt: Checkpoint, experts: int, new: Sequence[ExpertWeights]) -> None:
        for index, weights in enumerate(new):
            for name, old_name, tensor in zip(
                self.names_of(index), self.names_of(min(index, experts - 1)), weights, strict=False
            ):
                part.put(name, _as_stored(tensor, ckpt, old_name))
        for old in range(len(new), experts):
            for name in self.names_of(old):
                part.drop(name, f"the layer's {experts} experts became {len(new)}")


@dataclass(frozen=True, slots=True)
class InStacks:
    """One tensor for all gates and ups, one for all downs, perhaps with biases (`table.Stacked`)."""

    block: str
    """Path of the block, as the names begin."""
    form: Stacked

    def _name(self, suffix: str) -> str:
        return f"{self.block}.{suffix}"

    def names_of(self, expert: int) -> tuple[str, ...]:
        suffixes = (self.form.gate_up, self.form.down, self.form.gate_up_bias, self.form.down_bias)
        return tuple(self._name(suffix) for suffix in suffixes if suffix)

    def shapes(self, widths: Sequence[int], hidden: int) -> Shapes:
        experts, width = len(widths), self._one_width(widths)
        gate_up, down = (2 * width, hidden), (hidden, width)
        if self.form.transposed:
            gate_up, down = gate_up[::-1], down[::-1]
        found: list[tuple[int, ...]] = [(experts, *gate_up), (experts, *down)]
        if self.form.gate_up_bias:
            found += [(experts, 2 * width), (experts, hidden)]
        return dict(zip(self.names_of(0), found, strict=True))

    def read(self, ckpt: Checkpoint, expert: int) -> ExpertWeights:
        return self._split([ckpt.rows(name, expert, expert + 1)[0] for name in self.names_of(expert)])

    def read_all(self, ckpt: Checkpoint, experts: int) -> ExpertWeights:
        return self._split([ckpt.get(name) for name in self.names_of(0)])

    def keep(self, part: PartWriter, ckpt: Checkpoint, experts: int, kept: Sequence[int]) -> None:
        if list(kept) == list(range(experts)):
            return
        for name in self.names_of(0):
            part.put(name, ckpt.get(name).index_select(0, torch.tensor(kept, dtype=torch.int64)))

    def write(self, part: PartWriter, ckpt: Checkpoint, experts: int, new: Sequence[ExpertWeights]) -> None:
        self._one_width([len(weights.gate_FD) for weights in new])
        joined = zip(*(self._join(weights) for weights in new), strict=True)
        for name, tensors in zip(self.names_of(0), joined, strict=True):
            part.put(name, _as_stored(torch.stack(tensors), ckpt, name))

    def widened(self, name: str, tensor: Tensor, width: int) -> Tensor:
        gate_up, down, *bias = self.names_of(0)
        if name not in (gate_up, down):
            halves = self._halves(tensor, -1) if name == bias[0] else ()
            return self._both(*(_widened(half, 1, width) for half in halves), dim=1) if halves else tensor
        plain = tensor.mT if self.form.transposed else tensor
        if name == down:
            wide = _widened(plain, 2, width)
        else:
            wide = self._both(*(_widened(half, 1, width) for half in self._halves(plain, -2)), dim=1)
        return wide.mT.contiguous() if self.form.transposed else wide

    def _one_width(self, widths: Sequence[int]) -> int:
        """MoecliError when they differ."""
        if len(set(widths)) > 1:
            raise MoecliError(
                f"experts of different widths cannot share `{self.names_of(0)[0]}`",
                hint="keep one width per layer",
            )
        return widths[0]

    def _split(self, tensors: Sequence[Tensor]) -> ExpertWeights:
        """File form to ExpertWeights; works with and without a leading E."""
        gate_up, down = (t.mT if self.form.transposed else t for t in tensors[:2])
        gate, up = self._halves(gate_up, -2)
        if len(tensors) == 2:
            return ExpertWeights(gate, up, down)
        return ExpertWeights(gate, up, down, *self._halves(tensors[2], -1), tensors[3])

    def _halves(self, both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if self.form.interleaved:
            gate, up = both.unflatten(dim, (-1, 2)).unbind(dim)
            return gate, up
        gate, up = both.chunk(2, dim)
        return gate, up

    def _join(self, weights: ExpertWeights) -> list[Tensor]:
        """ExpertWeights of one expert to file form."""
        gate_up, down = self._both(weights.gate_FD, weights.up_FD), weights.down_DF
        joined = [gate_up.mT, down.mT] if self.form.transposed else [gate_up, down]
        if self.form.gate_up_bias:
            gate_bias, up_bias, down_bias = weights[3:]
            if gate_bias is None or up_bias is None or down_bias is None:
                raise MoecliError(f"experts in `{self.names_of(0)[0]}` have biases, the new ones have none")
            joined += [self._both(gate_bias, up_bias), down_bias]
        return joined

    def _both(self, gate: Tensor, up: Tensor, dim: int = 0) -> Tensor:
        if self.form.interleaved:
            return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
        return torch.cat((gate, up), dim)


def _widened(tensor: Tensor, axis: int, width: int) -> Tensor:
    missing = list(tensor.shape)
    missing[axis] = width - tensor.shape[axis]
    return torch.cat((tensor, tensor.new_zeros(missing)), axis)


def _as_stored(tensor: Tensor, ckpt: Checkpoint, name: str) -> Tensor:
    """In the checkpoint's own dtype: arithmetic in fp32 is rounded once, here."""
    return tensor.to(getattr(torch, ckpt.spec(name).dtype)).contiguous()
