"""The finished checkpoint: one streaming pass over a chain of overlays, into a folder that loads as it is.

A shard of the source whose tensors are all inherited unchanged under their own names is hard-linked (copied
where links are not possible); everything else is written tensor by tensor, so memory is bounded by the
largest tensor. A hard link shares its bytes with the source: replace such a file, never change it in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.durable import (
    GB,
    disk_errors,
    disk_full,
    free_bytes,
    json_text,
    natural_key,
    nearest_existing,
    sync_folder,
    sync_tree,
    write_text,
)  # fmt: skip
from moecli.io.reader import INDEX, SINGLE, StoredCheckpoint, stored
from moecli.io.tensorfile import write_tensors

Progress = Callable[[int, int], None]
"""Bytes of tensors done, and in total."""


@dataclass(frozen=True, slots=True)
class Export:
    """What an export made."""

    folder: Path
    files: tuple[str, ...]
    """The weight files, in order."""
    linked: tuple[str, ...]
    """Those taken whole from the source."""
    tensor_bytes: int


class _Shard(NamedTuple):
    """One weight file to be: taken whole from `source_file`, or written from `specs`."""

    specs: Mapping[str, TensorSpec]
    source_file: Path | None = None

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())


def export_folder(
    checkpoint: Checkpoint,
    folder: Path | str,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * GB,
    extra_files: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Export:
    """Write `checkpoint` as a model folder: shards, index, config.json, tokenizer and other side files.

    `config` replaces the checkpoint's; `extra_files` (name -> text) come last and win over side files.
    Dtypes are kept, and the same checkpoint gives the same bytes. Everything is written to
    `<folder>.partial`, synced and renamed once; an older export in `folder` is replaced then. On failure
    nothing is left but the older export. SurroundingsError when the disk is too small (asked before
    anything is written), or when `folder` holds something that is no model or that the checkpoint is read
    from.
    """
    folder, top = Path(folder), stored(checkpoint)
    _check_target(folder, top)
    shards = _plan(top, max_shard_bytes)
    needed_bytes = _needed_bytes(shards, folder)
    if needed_bytes > free_bytes(folder):
        raise disk_full(folder, needed_bytes)
    with _replacing(folder, needed_bytes) as partial:
        files = _write_shards(top, shards, partial, progress)
        write_text(partial / "config.json", json_text(dict(top.config if config is None else config)))
        for name, path in top.side_files().items():
            _copy(Path(path), partial / name)
        for name, text in (extra_files or {}).items():
            write_text(partial / name, text)
        _write_index(shards, files, partial)
    linked = tuple(name for name, shard in zip(files, shards, strict=True) if shard.source_file)
    return Export(folder, tuple(files), linked, sum(shard.bytes for shard in shards))


def _plan(checkpoint: StoredCheckpoint, max_shard_bytes: int) -> list[_Shard]:
    """Shards in natural order of their first tensor. A tensor above the limit gets a shard of its own."""
    shards, taken = _whole_files(checkpoint), set[str]()
    for shard in shards:
        taken.update(shard.specs)
    current: dict[str, TensorSpec] = {}
    size = 0
    for name in checkpoint.names():
        if name in taken:
            continue
        spec = checkpoint.spec(name)
        if current and size + spec.bytes > max_shard_bytes:
            shards.append(_Shard(current))
            current, size = {}, 0
        current[name] = spec
        size += spec.bytes
    if current:
        shards.append(_Shard(current))
    return sorted(shards, key=lambda shard: min(natural_key(name) for name in shard.specs))


def _whole_files(checkpoint: StoredCheckpoint) -> list[_Shard]:
    """Source files that can be taken as they are."""
    source = checkpoint.source
    return [
        _Shard({name: source.spec(name) for name in source.names_in(file)}, file)
        for file in source.files
        if source.names_in(file)
        and all(
            name in checkpoint and checkpoint.origin(name) == ("source", name) and source.file_of(name) == file
            for name in source.names_in(file)
        )
    ]


def _needed_bytes(shards: list[_Shard], folder: Path) -> int:
    """Disk space the export takes; files that can be linked take none."""
    device = nearest_existing(folder).stat().st_dev
    return sum(s.bytes for s in shards if s.source_file is None or s.source_file.stat().st_dev != device)


def _write_shards(checkpoint: StoredCheckpoint, shards: list[_Shard], folder: Path, progress: Progress) -> list[str]:
    total, done = sum(shard.bytes for shard in shards), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    files = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, shard in zip(files, shards, strict=True):
        if shard.source_file is not None:
            _link(shard.source_file, folder / name)
            advance(shard.bytes)
        else:
            write_tensors(folder / name, shard.specs, checkpoint.get, advance)
    return files


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _link(source: Path, target: Path) -> None:
    """A hard link where the disk allows it, else a copy. Hub cache entries are symbolic links: the blob is
    linked."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, no permission to link, too many links: a copy is as good
        shutil.copyfile(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_index(shards: list[_Shard], files: list[str], folder: Path) -> None:
    if files == [SINGLE]:
        return
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard.specs}
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {name: places[name] for name in sorted(places, key=natural_key)},
    }
    write_text(folder / INDEX, json_text(index))


def _check_target(folder: Path, checkpoint: StoredCheckpoint) -> None:
    """Only an older model (or an empty folder) may be replaced, and never one that is being read."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SurroundingsError(f"`{folder}` is a file, the checkpoint needs a folder")
    if any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise SurroundingsError(f"`{folder}` holds something that is no model; it is not replaced")
    if any(_inside(read, folder) for read in _folders(checkpoint)):
        raise SurroundingsError(f"`{folder}` is what the checkpoint is read from; it is not replaced")


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _folders(checkpoint: StoredCheckpoint) -> Iterator[Path]:
    below: Any = checkpoint
    while below is not None:
        if hasattr(below, "folder"):
            yield below.folder
        below = getattr(below, "parent", None)


@contextlib.contextmanager
def _replacing(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """An empty `<folder>.partial` that becomes `folder` on a clean exit and vanishes on an exception."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # stopped between the two renames below
        os.rename(old, folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with disk_errors(folder, needed_bytes):
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
            if folder.exists():
                os.rename(folder, old)
            os.rename(partial, folder)
            sync_folder(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
