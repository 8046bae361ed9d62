"""Layers' weights from disk to the device: each on-disk tensor goes straight into its part of the fused tensor, so a
layer takes its own size once, and on CUDA the next layer is read while the current one computes.

On CUDA several threads read pieces of files into small pinned buffers, and each piece is copied on a side stream; the
main stream waits for that stream before it uses the layer. Memory is taken and given back on the main stream only, so
a piece never lands in memory that earlier work still reads. Layouts that are more than copied (`families.slots`) go
through transformers' own conversion, without reading ahead.

Nothing stays resident between layers: a sweep reads each weight once, and another sweep may read other weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.families import adapter
from moecli.families.slots import Slot, Slots, install
from moecli.io.tensorfile import Entry, read_into

PIECE_BYTES = 8 << 20
READERS = 8
"""Threads that read; each holds two pinned buffers of one piece."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A layer on its way to the device."""

    index: int
    values: dict[str, Tensor]
    pieces: list[Future[None]]


class Loader:
    """Gives the decoder layers of `model` their weights, one after the other."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, names: adapter.TensorMap, device: torch.device, ahead: bool
    ) -> None:
        self._model, self._checkpoint, self._names, self._device = model, checkpoint, names, device
        self._slots = Slots(model, checkpoint, names)
        self._ahead = ahead and device.type == "cuda"
        self._pending: _Pending | None = None
        self._staging = _Staging(device) if device.type == "cuda" else None

    def load(self, index: int) -> nn.Module:
        """The decoder layer with its weights; on CUDA the next one is now on its way."""
        values = self._arrived(index)
        if values is None:
            module = adapter.load_layer(self._model, self._checkpoint, self._names, index, self._device)
        else:
            module = self._model.get_submodule(f"{self._names.prefix}.{index}")
            install(module, f"{self._names.prefix}.{index}.", values, self._device)
        if self._ahead and index + 1 < len(self._names.layers):
            self._read_ahead(index + 1)
        return module

    def _read_ahead(self, index: int) -> None:
        """Begin with the next layer; without room for a second one, never again."""
        try:
            self._pending = self._start(index)
        except torch.OutOfMemoryError:
            self._ahead = False

    def free(self, index: int) -> None:
        """The layer's memory back; buffers stay."""
        adapter.free_layer(self._model, self._names, index)

    def close(self) -> None:
        """Wait for what is on its way and drop it."""
        pending, self._pending = self._pending, None
        if self._staging is not None:
            self._staging.close()
        del pending

    def _arrived(self, index: int) -> dict[str, Tensor] | None:
        pending, self._pending = self._pending, None
        if pending is None or pending.index != index:
            pending = self._start(index)
        if pending is None:
            return None
        for piece in pending.pieces:
            piece.result()
        if self._staging is not None:
            self._staging.join()
        return pending.values

    def _start(self, index: int) -> _Pending | None:
        """Begin to read a layer; None for a layout that is not copied."""
        slots = self._slots.of(index)
        if slots is None:
            return None
        values = self._slots.empty(index, self._device)
        if self._staging is None:
            for slot in slots:
                read_slot(self._checkpoint, slot, slot.of(values[slot.target]))
            return _Pending(index, values, [])
        self._staging.follow()
        parts = ((slot, slot.of(values[slot.target])) for slot in slots)
        return _Pending(
            index, values, [f for slot, part in parts for f in self._staging.send(self._checkpoint, slot, part)]
        )


def read_slot(checkpoint: Checkpoint, slot: Slot, target: Tensor) -> None:
    """Read one tensor into CPU memory, in place when the types agree."""
    place = _entry(checkpoint, slot.name)
    if place is not None and place.spec.dtype == _name(target.dtype) and target.numel():
        read_into(place, 0, _bytes(target))
    else:
        target.copy_(checkpoint.get(slot.name))


class _Staging:
    """Threads, pinned buffers and a side stream: from files to the device in pieces."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._own = threading.local()

    def follow(self) -> None:
        """Copies from here on come after everything that the main stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """The main stream goes on when all copies are there."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stream.synchronize()

    def send(self, checkpoint: Checkpoint, slot: Slot, target: Tensor) -> Iterator[Future[None]]:
        """Copies of one tensor into its part on the device, piece by piece; a computed one at once."""
        place = _entry(checkpoint, slot.name)
        if place is None:
            yield self._pool.submit(self._computed, partial(checkpoint.get, slot.name), target)
            return
        dtype = getattr(torch, place.spec.dtype)
        step = PIECE_BYTES // dtype.itemsize
        flat = target.view(-1)
        for start in range(0, flat.numel(), step):
            yield self._pool.submit(self._piece, place, dtype, start, flat[start : start + step])

    def _piece(self, place: Entry, dtype: torch.dtype, start: int, target: Tensor) -> None:
        read = partial(read_into, place, start * dtype.itemsize)
        self._copy(lambda buffer: read(_bytes(buffer)), dtype, target)

    def _computed(self, get: Callable[[torch.device], Tensor], target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(get(self._device))

    def _copy(self, fill: Callable[[Tensor], Any], dtype: torch.dtype, target: Tensor) -> None:
        """Fill a pinned buffer and send it off; a buffer is filled again only when its last copy is done."""
        buffer, copied = self._buffer()
        copied.synchronize()
        values = buffer[: target.numel() * dtype.itemsize].view(dtype)
        fill(values)
        with torch.cuda.stream(self._stream):
            here = values if dtype == target.dtype else values.to(self._device, non_blocking=True)
            target.copy_(here, non_blocking=True)
            copied.record(self._stream)

    def _buffer(self) -> tuple[Tensor, torch.cuda.Event]:
        own = self._own
        if not hasattr(own, "buffers"):
            own.turn = 0
            own.buffers = [
                (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event(blocking=True))
                for _ in range(2)
            ]
        own.turn ^= 1
        return own.buffers[own.turn]


def _entry(checkpoint: Checkpoint, name: str) -> Entry | None:
    find = getattr(checkpoint, "entry", None)
    return None if find is None else find(name)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
