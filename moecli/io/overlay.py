"""Changes over a parent checkpoint: a stage writes what it changed, never a copy of the model.

An overlay folder holds parts, usually one for each layer:

    layer-003.safetensors    the tensors this part wrote; absent when there are none
    layer-003.json           its renames and drops; written after the tensors: a part with it is complete
    overlay.json             the parts that count and, if changed, the config; written last

Names of the result: (parent - dropped) | renamed | written. All names of a part refer to the parent, never to
other parts, so the order of parts does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from moecli.core.artifacts import Checkpoint, CheckpointWriter, PartWriter
from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.durable import disk_errors, file_safe, json_text, natural_key, read_json, write_text
from moecli.io.reader import Origin, StoredCheckpoint, StoredView, stored
from moecli.io.store import redo_hint
from moecli.io.tensorfile import Entry, read_header, read_rows, read_tensor, spec_of, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OVERLAY = "overlay.json"
SAVERS = 2
"""Parts that are saved side by side: one waits for the disk while the other is hashed."""
PINNED_BYTES = 64 << 20
"""Page-locked memory is taken in pieces of this size: taking it is slow, taking what was given back is not."""


class OverlayWriter(CheckpointWriter):
    """Writes an overlay folder part by part.

    A part that the folder already holds is skipped and its callable not called, so the same program run
    again after a crash goes on where it stopped. Leaving the `with` block cleanly checks all parts together
    and writes `overlay.json`, which names the parts that count. An exception leaves finished parts in place. Parts are
    saved while the next ones are computed, at most `SAVERS` at a time; what went wrong with one is raised by a later
    call, or at the end of the block. Breaking the contract (a name written twice, a rename of what the parent does not
    have) is ValueError: a bug in the method, not the user's doing.
    """

    checkpoint: OverlayCheckpoint

    def __init__(self, folder: Path | str, parent: Checkpoint, config: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._parent = stored(parent)
        self._config = config
        self._parts: list[str] = []
        self._saver = ThreadPoolExecutor(max_workers=SAVERS, thread_name_prefix="overlay")
        self._saving: dict[str, Future[None]] = {}

    def __enter__(self) -> Self:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / OVERLAY).unlink(missing_ok=True)
        return self

    def has_part(self, name: str) -> bool:
        """Whether an earlier run finished this part: what only prepares for it can be left out."""
        if name in self._saving:
            self._saving.pop(name).result()
        record, tensors = self.folder / f"{name}.json", self.folder / f"{name}.safetensors"
        if not record.is_file():
            return False
        written = read_json(record, hint=redo_hint(self.folder))["tensors"]
        return written is None or (tensors.is_file() and tensors.stat().st_size == written["bytes"])

    def read_part(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if (saving := self._saving.pop(name, None)) is not None:
            saving.result()
        tensors = self.folder / f"{name}.safetensors"
        return load_file(tensors) if tensors.is_file() else {}

    def part(self, name: str, write: Callable[[PartWriter], None]) -> None:
        if name in self._parts or file_safe(name) == "overlay":
            raise ValueError(f"there is a part `{name}` already")
        if not self.has_part(name):
            part = _Part(self._parent)
            write(part)
            part.close()
            self._settle(SAVERS - 1)
            self._saving[name] = self._saver.submit(part.save, self.folder, name)
        self._parts.append(name)

    def _settle(self, left: int = 0) -> None:
        """Wait until at most so many parts are being saved, and raise what went wrong with the others."""
        for name, saving in list(self._saving.items()):
            if saving.done() or len(self._saving) > left:
                self._saving.pop(name).result()

    def __exit__(self, *exc: object) -> None:
        self._saver.shutdown(wait=True)
        if exc[0] is not None:
            return
        self._settle()
        _check({name: _Record.read(self.folder, name) for name in self._parts}, self._parent)
        config = None if self._config is None else dict(self._config)
        write_text(self.folder / OVERLAY, json_text({"overlay": 1, "config": config, "parts": self._parts}))
        self.checkpoint = OverlayCheckpoint(self.folder, self._parent)


class _Part(PartWriter):
    """Gathers one part in memory, then saves it in one go."""

    def __init__(self, parent: StoredCheckpoint) -> None:
        self._parent = parent
        self._tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()
        self._renames: dict[str, str] = {}
        self._drops: dict[str, str] = {}
        self._pinned: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """The tensor moves to the CPU; it is copied if it is a view of something bigger or shares its
        memory with another one. A tensor given in its own memory is kept as it is: do not change it before
        the writer's block ends. From a CUDA device it is copied in the order of the current stream, without waiting.
        """
        self._claim(name)
        spec_of(tensor)
        if tensor.is_cuda:
            self._tensors[name] = self._on_its_way(tensor.detach())
            return
        own = tensor.detach().to("cpu").contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in self._storages:
            own = own.clone()
            storage = own.untyped_storage()
        self._storages.add(storage.data_ptr())
        self._tensors[name] = own

    def _on_its_way(self, tensor: Tensor) -> Tensor:
        """Page-locked memory that the tensor is being copied to."""
        import torch

        if self._pinned is None or len(self._pinned) < tensor.nbytes:
            self._pinned = torch.empty(max(tensor.nbytes, PINNED_BYTES), dtype=torch.uint8, pin_memory=True)
        size = -(-tensor.nbytes // 64) * 64
        place, self._pinned = self._pinned[: tensor.nbytes], self._pinned[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)

    def close(self) -> None:
        """All tensors have been put; those on their way from a device are waited for by `save`."""
        if self._pinned is not None:
            import torch

            self._arrived = torch.cuda.current_stream().record_event()

    def rename(self, name: str, parent_name: str) -> None:
        self._claim(name)
        if parent_name not in self._parent:
            raise ValueError(f"`{name}` cannot be renamed from `{parent_name}`: the parent has no such tensor")
        self._renames[name] = parent_name

    def drop(self, name: str, reason: str) -> None:
        self._claim(name)
        if name not in self._parent:
            raise ValueError(f"`{name}` cannot be dropped: the parent has no such tensor")
        self._drops[name] = reason

    def _claim(self, name: str) -> None:
        for verb, names in (
            ("written", self._tensors),
            ("renamed to", self._renames),
            ("dropped", self._drops),
        ):
            if name in names:
                raise ValueError(f"`{name}` is {verb} twice, or once and something else")

    def save(self, folder: Path, name: str) -> None:
        written = None
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._tensors:
            specs = {tensor_name: spec_of(tensor) for tensor_name, tensor in self._tensors.items()}
            size, sha256 = write_tensors(folder / f"{name}.safetensors", specs, self._tensors.__getitem__)
            written = {"bytes": size, "sha256": sha256}
        record = {"tensors": written, "renames": _sorted(self._renames), "drops": _sorted(self._drops)}
        write_text(folder / f"{name}.json", json_text(record))


def _sorted(names: Mapping[str, str]) -> dict[str, str]:
    return {name: names[name] for name in sorted(names, key=natural_key)}


class _Record(NamedTuple):
    """One part as it lies in the folder."""

    entries: Mapping[str, Entry]
    renames: Mapping[str, str]
    drops: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, name: str) -> _Record:
        """SurroundingsError when a file of the part is missing or damaged."""
        hint = redo_hint(folder)
        path = folder / f"{name}.json"
        record = read_json(path, hint=hint)
        try:
            written, renames, drops = record["tensors"], dict(record["renames"]), dict(record["drops"])
            size = None if written is None else int(written["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise SurroundingsError(f"`{path}` is not the record of an overlay part", hint=hint) from error
        if size is None:
            return cls({}, renames, drops)
        header = read_header(folder / f"{name}.safetensors", hint=hint)
        if header.file_bytes != size:
            raise SurroundingsError(
                f"`{folder / name}.safetensors` has {header.file_bytes} bytes, {size} were written", hint=hint
            )
        return cls(header.entries, renames, drops)


def _check(parts: Mapping[str, _Record], parent: StoredCheckpoint) -> None:
    """Every name once over all parts; what is renamed or dropped exists in the parent. ValueError
    otherwise."""
    claimed: dict[str, str] = {}
    for part, record in parts.items():
        for name in [*record.entries, *record.renames, *record.drops]:
            if name in claimed:
                raise ValueError(f"`{name}` is in part `{claimed[name]}` and in part `{part}`")
            claimed[name] = part
        for name in [*record.renames.values(), *record.drops]:
            if name not in parent:
                raise ValueError(f"part `{part}` refers to `{name}`, which the parent does not have")


class OverlayCheckpoint(StoredView):
    """A finished overlay over its parent. Reads go through the chain; opening reads headers and records only.

    SurroundingsError when the folder is not a finished overlay, is damaged, or belongs to another parent.
    """

    def __init__(self, folder: Path | str, parent: Checkpoint) -> None:
        self.folder = Path(folder)
        self.parent = stored(parent)
        hint = redo_hint(self.folder)
        content = read_json(self.folder / OVERLAY, hint=hint)
        if not isinstance(content.get("parts"), list) or "config" not in content:
            raise SurroundingsError(f"`{self.folder / OVERLAY}` does not describe an overlay", hint=hint)
        parts = {name: _Record.read(self.folder, name) for name in content["parts"]}
        try:
            _check(parts, self.parent)
        except ValueError as error:
            raise SurroundingsError(f"`{self.folder}` does not fit its parent: {error}", hint=hint) from error
        self._own: dict[str, Entry] = {}
        self._renamed: dict[str, str] = {}
        self._dropped: dict[str, str] = {}
        for record in parts.values():
            self._own |= record.entries
            self._renamed |= record.renames
            self._dropped |= record.drops
        inherited = (name for name in self.parent.names() if name not in self._dropped)
        self._names = dict.fromkeys(sorted({*inherited, *self._renamed, *self._own}, key=natural_key))
        self.config = self.parent.config if content["config"] is None else content["config"]
        self.facts_of = self.parent.facts_of
        self.facts = self.facts_of(self.config)

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        return self._own[name].spec if name in self._own else self.parent.spec(self._parent_name(name))

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        if name in self._own:
            return read_tensor(self._own[name]).to(device)
        return self.parent.get(self._parent_name(name), device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._own:
            return read_rows(self._own[name], start, stop)
        return self.parent.rows(self._parent_name(name), start, stop)

    def origin(self, name: str) -> Origin:
        return ("own", name) if name in self._own else self.parent.origin(self._parent_name(name))

    def entry(self, name: str) -> Entry | None:
        return self._own[name] if name in self._own else self.parent.entry(self._parent_name(name))

    def written(self) -> tuple[str, ...]:
        """Names this overlay itself holds the bytes of."""
        return tuple(sorted(self._own, key=natural_key))

    def renamed(self) -> dict[str, str]:
        """This overlay's renames: name -> the parent's name."""
        return _sorted(self._renamed)

    def dropped(self) -> dict[str, str]:
        """What this overlay took out of its parent: the parent's name -> reason."""
        return _sorted(self._dropped)

    def _parent_name(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(f"`{self.folder}` has no tensor `{name}`")
        return self._renamed.get(name, name)


class Fate(NamedTuple):
    """What became of one tensor of the source folder."""

    verb: Literal["kept", "rewritten", "dropped", "displaced"]
    detail: str
    """kept: the names that hold it now, separated by spaces. rewritten: the name that new bytes were put
    under. dropped: the reason. displaced: the tensor that took its name by a rename."""


def fates(checkpoint: Checkpoint) -> dict[str, Fate]:
    """Every tensor of the source folder and what became of it, through all overlays: nothing is lost
    unseen."""
    top = stored(checkpoint)
    kept: dict[str, list[str]] = {}
    for name in top.names():
        kind, underlying = top.origin(name)
        if kind == "source":
            kept.setdefault(underlying, []).append(name)
    lost: dict[str, Fate] = {}
    for overlay in reversed(_chain(top)):
        _note_losses(overlay, lost)
    return {
        name: Fate("kept", " ".join(kept[name])) if name in kept else lost.get(name, Fate("rewritten", name))
        for name in top.source.names()
    }


def _chain(checkpoint: StoredCheckpoint) -> list[OverlayCheckpoint]:
    """The overlays of a chain, newest first."""
    chain = []
    below: StoredCheckpoint | None = checkpoint
    while below is not None:
        if isinstance(below, OverlayCheckpoint):
            chain.append(below)
        below = getattr(below, "parent", None)
    return chain


def _note_losses(overlay: OverlayCheckpoint, lost: dict[str, Fate]) -> None:
    """Adds how this overlay hid tensors of its parent. Only the last loss of a source tensor matters to the
    reader."""
    losses = {name: Fate("dropped", reason) for name, reason in overlay.dropped().items()}
    losses |= {name: Fate("displaced", taken) for name, taken in overlay.renamed().items() if taken != name}
    losses |= {name: Fate("rewritten", name) for name in overlay.written()}
    for name, fate in losses.items():
        if name in overlay.parent:
            kind, underlying = overlay.parent.origin(name)
            if kind == "source":
                lost[underlying] = fate
