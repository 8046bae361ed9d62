"""Files that are there completely or not at all, and disk errors in words.

A crash or a power cut leaves either the old content or the new one: a temporary file beside the target,
fsync, one rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moecli.core.errors import SurroundingsError

GB = 10**9
GIB = 2**30


def gib(size_bytes: int) -> str:
    """Bytes for people: `61.2 GiB`, with more digits below 0.1 GiB."""
    value = size_bytes / GIB
    return f"{value:.1f} GiB" if value >= 0.1 or size_bytes == 0 else f"{value:.2g} GiB"


def natural_key(name: str) -> tuple[str | int, ...]:
    """Sort key under which layer 2 comes before layer 10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name))


def file_safe(name: str) -> str:
    """`name` unchanged; ValueError when it cannot be a file name stem of ours (a bug in the caller)."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        raise ValueError(f"`{name}` cannot be used as a file name")
    return name


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """`path`, or the closest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a full disk, missing permission, and a file or folder in the way into SurroundingsError; other
    errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path, needed_bytes) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP):
            raise SurroundingsError(f"cannot write to `{path}`: {os.strerror(error.errno).lower()}") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            kind = "folder" if error.errno == errno.EISDIR else "file"
            at = error.filename2 or error.filename or path
            raise SurroundingsError(f"cannot write to `{path}`: a {kind} is in the way (`{at}`)") from error
        raise


def disk_full(path: Path, needed_bytes: int | None) -> SurroundingsError:
    """What a full disk looks like to the user: both numbers."""
    free = free_bytes(path)
    needs = f"needs {gib(needed_bytes)}" if needed_bytes is not None else "has no space left"
    return SurroundingsError(f"`{path}` {needs}, {gib(free)} free")


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder below `folder`, and of itself."""
    for root, _, files in os.walk(folder):
        for name in files:
            handle = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))


def temporary(path: Path) -> Path:
    """The name a file has while it is being written. Never read by anyone, replaced by the next attempt."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """The temporary file to write and sync; it gets its name on a clean exit and is deleted on an exception."""
    temp = temporary(path)
    try:
        yield temp
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Atomic and durable; newlines are written as they are. A file that holds this text already is left alone."""
    with disk_errors(path.parent):
        if path.is_file() and path.read_bytes() == text.encode():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with published(path) as temp, temp.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def json_text(value: Any) -> str:
    """The one way we write JSON: key order kept, two spaces, one final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path, hint: str | None = None) -> dict[str, Any]:
    """A JSON object; SurroundingsError when the file is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SurroundingsError(f"`{path}` is missing", hint=hint) from None
    except OSError as error:
        raise SurroundingsError(f"`{path}` cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SurroundingsError(f"`{path}` is not JSON: {error}", hint=hint) from error
    if not isinstance(value, Mapping):
        raise SurroundingsError(f"`{path}` holds no JSON object", hint=hint)
    return dict(value)
