"""Where hidden states wait between layers and how much runs at a time, decided from sizes and free memory.

One layer's weights, the next layer's while it is read ahead, the hidden states of all tokens before and after the
layer, the statistics of the layer, and the activations of one micro-batch: that is all a sweep holds, whatever the
number of layers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moecli.core.errors import SurroundingsError
from moecli.core.model import ModelFacts
from moecli.engine.collectors import LayerShape, held_bytes
from moecli.engine.data import Batch
from moecli.families import adapter
from moecli.io.durable import disk_errors

Home = Literal["device", "pinned", "memory", "file"]
"""Where hidden states wait: on the device, in page-locked CPU memory, in ordinary CPU memory (CPU sweeps), or in a
memory-mapped file."""

_WORDS = {
    "device": "on the device",
    "pinned": "in pinned CPU memory",
    "memory": "in memory",
    "file": "in a memory-mapped file",
}
DEVICE_SHARE, HOST_SHARE = 0.85, 0.5
"""Parts of what is free that a plan may use."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a sweep has to hold, in bytes where nothing else is said."""

    layer: int
    """weights of the largest decoder layer"""
    states: int
    """hidden states of all tokens once"""
    sequence: int
    """activations of one sequence inside a layer, estimated from above"""
    batch: int
    """sequences in the largest batch"""
    statistics: int = 0
    """what the statistics of one layer hold on the device"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided. `str` of it is a line for the report."""

    home: Home
    sequences: int
    """At most so many in one forward pass."""
    ahead: bool
    """The next layer's weights are read while this one computes."""
    states: int
    """Bytes of the hidden states of all tokens; twice that is held."""
    statistics: int = 0
    """Bytes of the statistics of one layer, held on the device."""

    def __str__(self) -> str:
        reading = ", the next layer read ahead" if self.ahead else ""
        if self.statistics >= 1 << 26:
            reading += f", {self.statistics / 2**30:.2f} GiB for statistics"
        plural = "s" if self.sequences != 1 else ""
        return (
            f"hidden states {_WORDS[self.home]} (2 x {self.states / 2**30:.2f} GiB), "
            f"at most {self.sequences} sequence{plural} at a time{reading}"
        )


def sizes_of(model: Any, facts: ModelFacts, batches: Sequence[Batch], names: Sequence[str] = ()) -> Sizes:
    """Sizes for a model on meta, the text it will run and the statistics to be collected."""
    layers = adapter.decoder_layers(model)[1]
    layer = max(sum(p.nbytes for p in module.parameters()) for module in layers)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    length = max((batch.input_ids.shape[1] for batch in batches), default=1)
    item = model.dtype.itemsize
    hidden = model.config.get_text_config().hidden_size
    # Routed: inputs, gate and up, their product, outputs of k experts; the rest: attention, norms, residuals.
    per_token = facts.top_k * 3 * (hidden + facts.expert_width) + 16 * hidden + 3 * facts.shared_width
    batch = max((batch.input_ids.shape[0] for batch in batches), default=1)
    shape = LayerShape(
        facts.experts, facts.router_rows, hidden, facts.score, facts.expert_width, facts.top_k, facts.experts
    )
    return Sizes(layer, tokens * hidden * item, length * per_token * item, batch, held_bytes(names, shape))


def plan_for(sizes: Sizes, device: torch.device, sweeps: int = 1, processes: int = 1) -> Plan:
    """The plan for what is free now, for one of so many sweeps that run side by side in each of so many processes of
    this machine; each process has a device of its own.
    """
    on_device = _free_on_device(device) // sweeps if device.type == "cuda" else None
    return choose(sizes, on_device, _free_in_memory() // (sweeps * processes))


def choose(sizes: Sizes, on_device: int | None, in_memory: int) -> Plan:
    """The plan for so many free bytes; `on_device` is None for a sweep on the CPU, which takes batches as they come."""
    fits_memory = 2 * sizes.states <= HOST_SHARE * in_memory
    if on_device is None:
        return Plan("memory" if fits_memory else "file", sizes.batch, False, sizes.states)
    room = int(DEVICE_SHARE * on_device)
    ahead = 2 * sizes.layer + sizes.sequence + sizes.statistics <= room
    room -= (2 if ahead else 1) * sizes.layer
    if sizes.statistics and sizes.layer + sizes.statistics > on_device:
        raise SurroundingsError(
            f"one layer and its statistics need {(sizes.layer + sizes.statistics) / 2**30:.1f} GiB of GPU memory, "
            f"{on_device / 2**30:.1f} GiB free",
            hint="collect fewer of the statistics that hold a matrix for each expert (`*_cov`) in one stage",
        )
    room -= sizes.statistics
    few = min(sizes.batch, 4) * sizes.sequence
    home: Home = "device" if 2 * sizes.states + few <= room else ("pinned" if fits_memory else "file")
    room -= 2 * sizes.states if home == "device" else 0
    return Plan(home, max(1, min(sizes.batch, room // sizes.sequence)), ahead, sizes.states, sizes.statistics)


def free_bytes(device: torch.device) -> int:
    """What is free on a device, or may be had without asking anyone."""
    return _free_on_device(device) if device.type == "cuda" else _free_in_memory()


def _free_on_device(device: torch.device) -> int:
    """Free to the driver, and what torch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_in_memory() -> int:
    """Memory that is free or can be freed; the control group's limit counts where there is one."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # no Linux: all of it, and the operating system pages
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


class Shelf:
    """Hidden states of the micro-batches before and after a layer: what is put is read after the next `turn`, and the
    memory of what was read before that is used again.
    """

    def __init__(self, home: Home, device: torch.device, states: int = 0) -> None:
        self.home, self._device = home, device
        self._sides: list[dict[int, Tensor]] = [{}, {}]
        self._folder = _scratch(2 * states) if home == "file" else None
        self._files = 0

    def put(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden state at its home. Pinned memory is filled later, in the order of the device's work."""
        if self.home in ("device", "memory"):
            return hidden.to(self._device if self.home == "device" else "cpu")
        side = self._sides[1]
        slot = side.get(index)
        if slot is None or slot.shape != hidden.shape or slot.dtype != hidden.dtype:
            slot = side[index] = self._empty(hidden)
        return slot.copy_(hidden, non_blocking=self.home == "pinned")

    def turn(self) -> None:
        """What was put may be read; what was read may be overwritten."""
        self._sides.reverse()

    def settle(self) -> None:
        """Wait until everything that was put is there for the CPU to read."""
        if self.home == "pinned":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        self._sides = [{}, {}]
        if self._folder is not None:
            self._folder.cleanup()

    def _empty(self, like: Tensor) -> Tensor:
        if self._folder is None:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.bin"
        # Room first: in a mapping a full disk ends the process without a word.
        with disk_errors(path.parent, like.nbytes), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, like.nbytes)
        return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


def _scratch(needed: int) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SurroundingsError(
            f"hidden states need {needed / 2**30:.1f} GiB in `{folder}`, {free / 2**30:.1f} GiB are free",
            hint="set `TMPDIR` to a larger disk, or lower `samples`",
        )
    return tempfile.TemporaryDirectory(prefix="moecli-states-")
