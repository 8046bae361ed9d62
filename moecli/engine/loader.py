"""Layers' weights from disk to the device: each on-disk tensor goes straight into its part of the fused tensor, so a
layer takes its own size once, and on CUDA the next layer is read while the current one computes.

On CUDA several threads read spans of files, tensors that lie side by side together, into pinned buffers, and one call
a span copies its tensors to their places on a side stream; the main stream waits for that stream before it uses the
layer. A span costs a handful of Python steps whatever it holds: threads that took a turn for each tensor would keep the
interpreter from the thread that drives the device (measured: 7 GB/s, and a third more time for the forward pass).
Memory is taken and given back on the main stream only, so nothing lands in memory that earlier work still reads.
Layouts that are more than copied (`families.slots`) go through transformers' own conversion, without reading ahead.

Several processes of one machine read a layer once between them: each copies a block of the spans to its own device, the
rest is zero there, and one sum over the bytes as integers puts the blocks together, bit for bit. Over several machines
each process reads all of it, from the page cache that those of one machine share.

Nothing stays resident between layers: a sweep reads each weight once, and another sweep may read other weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.core.model import TensorSpec
from moecli.engine.ranks import ALONE, Ranks
from moecli.families import adapter
from moecli.families.slots import Slot, Slots, install
from moecli.io.tensorfile import Entry, read_into

T = TypeVar("T")
Source = tuple[Slot, Entry | None]
"""An on-disk tensor's place in the model, and in a file; None where it is computed."""

SPAN_BYTES = 32 << 20
READERS = 12
"""Threads that read; each holds two pinned buffers of one span."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A layer on its way to the device."""

    index: int
    values: dict[str, Tensor]
    pieces: list[Future[None]]


class Loader:
    """Gives the decoder layers of `model` their weights, one after the other; the next one is `step` further."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, names: adapter.TensorMap, device: torch.device, ahead: bool,
        step: int = 1, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._model, self._checkpoint, self._names, self._device = model, checkpoint, names, device
        self._slots = Slots(model, checkpoint, names)
        self._ahead, self._step = ahead and device.type == "cuda", step
        self._pending: _Pending | None = None
        self._planned: dict[int, Future[list[Source] | None]] = {}
        self._places: tuple[int, dict[str, Slot] | None] | None = None
        self._staging = Staging(device) if device.type == "cuda" else None
        self._ranks = ranks if device.type == "cuda" and ranks.size == ranks.local_size else ALONE

    def load(self, index: int) -> nn.Module:
        """The decoder layer with its weights; on CUDA the next one is now on its way."""
        values = self._arrived(index)
        if values is None:
            module = adapter.load_layer(self._model, self._checkpoint, self._names, index, self._device)
        else:
            module = self._model.get_submodule(f"{self._names.prefix}.{index}")
            install(module, f"{self._names.prefix}.{index}.", values, self._device)
        if self._ahead and index + self._step in self._names.layers:
            self._read_ahead(index + self._step)
        if self._ahead and index + 2 * self._step in self._names.layers:
            self._planned[index + 2 * self._step] = self._staging.plan(lambda: self._sources(index + 2 * self._step))
        return module

    def _read_ahead(self, index: int) -> None:
        """Begin with the next layer; without room for a second one, never again."""
        try:
            self._pending = self._start(index)
        except torch.OutOfMemoryError:
            self._ahead = False

    def tensor(self, index: int, name: str) -> Tensor:
        """A weight of a layer that is loaded, by its on-disk name and in its on-disk form, on the device; not to be
        written to.
        """
        slot = self._slot(index, name)
        if slot is None:
            return self._checkpoint.get(name, self._device)
        return slot.of(self._model.get_parameter_or_buffer(slot.target))

    def linear(self, name: str) -> nn.Module:
        """The module that multiplies with a weight, by the weight's on-disk name."""
        return self._model.get_submodule(self._names.targets[name].rpartition(".")[0])

    def put(self, index: int, values: Mapping[str, Tensor]) -> None:
        """New values for weights of a layer that is loaded, by their on-disk names, each of its old shape."""
        if not values:
            return
        slots = {name: self._slot(index, name) for name in values}
        if all(slots.values()):
            targets = {slot.target for slot in slots.values()}
            held = {target: self._model.get_parameter_or_buffer(target) for target in targets}
            with torch.no_grad():  # one call for all: a layer may have hundreds of them
                torch._foreach_copy_([slot.of(held[slot.target]) for slot in slots.values()], list(values.values()))
            return
        adapter.load_layer(self._model, _Changed(self._checkpoint, values), self._names, index, self._device)

    def _slot(self, index: int, name: str) -> Slot | None:
        if self._places is None or self._places[0] != index:
            slots = self._slots.of(index)
            self._places = index, None if slots is None else {slot.name: slot for slot in slots}
        return None if self._places[1] is None else self._places[1][name]

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
            self._ranks.combine([(_as_integers(value), "sum") for value in pending.values.values()])
        return pending.values

    def _start(self, index: int) -> _Pending | None:
        """Begin to read a layer; None for a layout that is not copied."""
        planned = self._planned.pop(index, None)
        sources = self._sources(index) if planned is None else planned.result()
        if sources is None:
            return None
        values = self._slots.empty(index, self._device)
        if self._staging is None:
            for slot, _ in sources:
                read_slot(self._checkpoint, slot, slot.of(values[slot.target]))
            return _Pending(index, values, [])
        if self._ranks.size > 1:
            torch._foreach_zero_(list(values.values()))
        self._staging.follow()
        parts = [(slot.name, entry, slot.of(values[slot.target]).view(-1)) for slot, entry in sources]
        return _Pending(index, values, self._staging.send(self._checkpoint, parts, self._ranks))

    def _sources(self, index: int) -> list[Source] | None:
        """What a layer is read from. Finding it takes as long as copying a small layer, so it is done by a thread."""
        slots = self._slots.of(index)
        return None if slots is None else [(slot, _entry(self._checkpoint, slot.name)) for slot in slots]


class _Changed(Checkpoint):
    """A checkpoint with other values for some of its tensors."""

    def __init__(self, checkpoint: Checkpoint, values: Mapping[str, Tensor]) -> None:
        self.facts, self.config = checkpoint.facts, checkpoint.config
        self._checkpoint, self._values = checkpoint, values

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def spec(self, name: str) -> TensorSpec:
        return self._checkpoint.spec(name)

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        if name in self._values:
            return self._values[name].to(device)
        return self._checkpoint.get(name, device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.get(name)[start:stop].cpu() if name in self._values else self._checkpoint.rows(name, start, stop)

    def side_files(self) -> Mapping[str, str]:
        return self._checkpoint.side_files()


def read_slot(checkpoint: Checkpoint, slot: Slot, target: Tensor) -> None:
    """Read one tensor into CPU memory, in place when the types agree."""
    place = _entry(checkpoint, slot.name)
    if place is not None and _dtype(place) == target.dtype and target.numel():
        read_into(place, 0, _bytes(target))
    else:
        target.copy_(checkpoint.get(slot.name))


class Piece(NamedTuple):
    """Consecutive elements of one tensor in a file, and where they go."""

    entry: Entry
    start: int
    """First byte inside the tensor."""
    target: Tensor
    """Flat, on the device, perhaps of another dtype."""

    @property
    def bytes(self) -> int:
        return self.target.numel() * _dtype(self.entry).itemsize

    @property
    def place(self) -> tuple[str, str, int]:
        """Order in which files are read: file, dtype, first byte."""
        return str(self.entry.file), self.entry.spec.dtype, self.entry.start + self.start


def spans(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that lie side by side in one file and have one dtype, at most `SPAN_BYTES` together."""
    span: list[Piece] = []
    size = 0
    for piece in sorted(pieces, key=lambda piece: piece.place):
        file, dtype, start = piece.place
        last = span[-1] if span else None
        joins = last is not None and last.place == (file, dtype, start - last.bytes)
        if span and (not joins or size + piece.bytes > SPAN_BYTES):
            yield span
            span, size = [], 0
        span.append(piece)
        size += piece.bytes
    if span:
        yield span


class Staging:
    """Threads, pinned buffers and a side stream: from files to the device in spans. On the CPU, for tests, the same
    steps without a stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._own = threading.local()

    def plan(self, work: Callable[[], T]) -> Future[T]:
        """What the readers find out between two reads."""
        return self._pool.submit(work)

    def follow(self) -> None:
        """Copies from here on come after everything that the main stream has been given."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """The main stream goes on when all copies are there."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()

    def send(
        self, checkpoint: Checkpoint, parts: Iterable[tuple[str, Entry | None, Tensor]], ranks: Ranks = ALONE
    ) -> list[Future[None]]:
        """Begin to copy this rank's block of tensors to their flat places on the device; those without an entry are
        computed, one by one.
        """
        pieces: list[Piece] = []
        computed: list[Callable[[], None]] = []
        for name, entry, target in parts:
            if entry is None:
                computed.append(partial(self._computed, checkpoint, name, target))
            else:
                pieces += _pieces(entry, target)
        jobs = [*(partial(self._span, span) for span in spans(pieces)), *computed]
        return [self._pool.submit(job) for job in ranks.split(jobs)]

    def _span(self, span: list[Piece]) -> None:
        buffer, copied = self._buffer()
        if copied is not None:
            copied.synchronize()  # its last copy is done
        raw = buffer[: sum(piece.bytes for piece in span)]
        read_into(span[0].entry, span[0].start, memoryview(raw.numpy()))
        targets = [piece.target for piece in span]
        with self._on_stream():
            values = raw.view(_dtype(span[0].entry)).split([len(target) for target in targets])
            torch._foreach_copy_(targets, values, non_blocking=True)
            if copied is not None:
                copied.record(self._stream)

    def _computed(self, checkpoint: Checkpoint, name: str, target: Tensor) -> None:
        with self._on_stream():
            target.copy_(checkpoint.get(name, self._device).view(-1))

    def _on_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _buffer(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The calling thread's two buffers in turn."""
        own = self._own
        if not hasattr(own, "buffers"):
            own.turn, own.buffers = 0, [self._new_buffer() for _ in range(2)]
        own.turn ^= 1
        return own.buffers[own.turn]

    def _new_buffer(self) -> tuple[Tensor, torch.cuda.Event | None]:
        pinned = self._stream is not None
        event = torch.cuda.Event(blocking=True) if pinned else None
        return torch.empty(SPAN_BYTES, dtype=torch.uint8, pin_memory=pinned), event


def _pieces(entry: Entry, flat: Tensor) -> Iterator[Piece]:
    """A tensor in pieces that fit a buffer."""
    item = _dtype(entry).itemsize
    step = SPAN_BYTES // item
    if len(flat) <= step:
        yield Piece(entry, 0, flat)
        return
    for start, part in zip(range(0, len(flat), step), flat.split(step), strict=True):
        yield Piece(entry, start * item, part)


def _entry(checkpoint: Checkpoint, name: str) -> Entry | None:
    find = getattr(checkpoint, "entry", None)
    return None if find is None else find(name)


def _as_integers(tensor: Tensor) -> Tensor:
    """The same memory in the widest integers that fit: sums with zeros keep every bit."""
    raw = tensor.view(-1).view(torch.uint8)
    return raw.view(torch.int64) if len(raw) % 8 == 0 and raw.storage_offset() % 8 == 0 else raw


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _dtype(entry: Entry) -> torch.dtype:
    return getattr(torch, entry.spec.dtype)
