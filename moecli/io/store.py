"""Run folders and stage folders: what a run leaves on disk, and how it survives a crash.

    runs/<name>/lock                                 held while a run works; the kernel frees it with the run
    runs/<name>/events.jsonl                         one JSON object a line
    runs/<name>/stages/<kind-name>/<key>/            a finished stage: complete because it has no suffix
    runs/<name>/stages/<kind-name>/<key>.partial/    a stage being made, with the parts that are finished
    runs/<name>/parts/<key>.json                     a part that stages under several keys use

Runs of a sweep keep `stages` and `parts` in the sweep's folder (`RunFolder.join`): what one made, all have.

A folder gets its final name by one rename, after everything in it was synced, its manifest last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moecli.core.artifacts import Artifact, Packed
from moecli.core.errors import SurroundingsError
from moecli.io import durable
from moecli.io.durable import disk_errors, file_safe, json_text, read_json, sync_folder, sync_tree
from moecli.io.tensorfile import read_header, read_tensor, spec_of, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A", bound=Artifact)

PARTIAL, TRASH = ".partial", ".trash"
KEY_DIGITS = 16
"""Hex digits of a stage key that make up its folder's name: 64 bits."""


class RunFolder:
    """One run on disk. Made if it is not there; with `create=False` a missing one is SurroundingsError."""

    def __init__(self, path: Path | str, create: bool = True) -> None:
        self.path = Path(path)
        if create:
            _make_folder(self.path)
        elif not self.path.is_dir():
            raise SurroundingsError(f"there is no run in `{self.path}`")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out. SurroundingsError, with the holder named, when somebody has it.

        It is a lock of the kernel (flock): a killed run no longer holds it, whatever its file still says.
        """
        path = self.path / "lock"
        with disk_errors(self.path):
            file = path.open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "pid unknown"
                raise SurroundingsError(
                    f"another run ({holder}) holds `{self.path}`",
                    hint=f"`moecli status {self.path}` shows how far it is",
                ) from None
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def join(self, store: Path) -> None:
        """Keep stages and shared parts in the folder `store`, by links that survive moving both together.

        SurroundingsError when this run has stages of its own already, or belongs to another store.
        """
        for name in ("stages", "parts"):
            _make_folder(store / name)
            link = self.path / name
            with disk_errors(self.path):
                if not link.exists() and not link.is_symlink():
                    link.symlink_to(os.path.relpath(store / name, self.path), target_is_directory=True)
            if not link.is_symlink() or link.resolve() != (store / name).resolve():
                raise SurroundingsError(f"`{link}` is not the one of `{store}`", hint="choose another folder")

    @property
    def store(self) -> Path | None:
        """The folder whose stages this run shares with others; None when they are its own."""
        link = self.path / "stages"
        return link.resolve().parent if link.is_symlink() else None

    @contextlib.contextmanager
    def alone(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Only one of the runs that share a store is inside at a time, for each `name`; `waiting` is called once
        before the others are waited for. A run with stages of its own has its lock already.

        It is a lock of the kernel (flock) and ends with its process; over NFS and Lustre that needs their lock
        service.
        """
        if self.store is None:
            yield
            return
        folder = self.store / "locks"
        _make_folder(folder)
        with disk_errors(folder):
            file = (folder / file_safe(name)).open("a", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def stage(self, name: str, key: str) -> StageFolder:
        """The folder of stage `name` ("kind/method") under `key` (hex). Nothing is made on disk yet."""
        return StageFolder(self.path / "stages" / _folder_name(name) / file_safe(key[:KEY_DIGITS]))

    def stages(self) -> Iterator[StageFolder]:
        """Stage folders that exist, complete or partial, in order of their names."""
        found = {p.with_suffix("") for p in self.path.glob("stages/*/*") if p.is_dir() and p.suffix in ("", PARTIAL)}
        return (StageFolder(path) for path in sorted(found))

    @property
    def parts(self) -> SharedParts:
        """Parts that stages under several keys use."""
        return SharedParts(self.path / "parts")

    def write_text(self, name: str, text: str) -> None:
        """A file of the run, atomically. `name` may lie in a folder below, such as `report/report.md`."""
        durable.write_text(self.path / name, text)

    def append_event(self, event: Mapping[str, Any]) -> None:
        """One line of events.jsonl, handed to the system before this returns."""
        line = json.dumps(event, ensure_ascii=False) + "\n"
        with disk_errors(self.path), (self.path / "events.jsonl").open("ab+") as file:
            if _ends_torn(file):
                line = "\n" + line
            file.write(line.encode())

    def events(self) -> Iterator[dict[str, Any]]:
        """All events, oldest first. A line that a crash cut off is left out."""
        path = self.path / "events.jsonl"
        if not path.exists():
            return
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _ends_torn(file: Any) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) != b"\n")


def _make_folder(path: Path) -> None:
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise SurroundingsError(f"`{path}` cannot be a folder: a file is in the way") from None
        except (FileNotFoundError, ValueError):  # /proc takes no folders; a name with a null byte is none
            raise SurroundingsError(f"`{path}` cannot be made") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise SurroundingsError(f"cannot write to `{path}`: permission denied")


def _folder_name(stage_name: str) -> str:
    return file_safe(stage_name.replace("/", "-", 1))


def redo_hint(folder: Path) -> str | None:
    """What to type when something inside a stage's folder is damaged; None outside of a run."""
    if folder.name == "parts" and (folder.parent / "recipe.yaml").exists():
        return f"`moecli run {folder.parent / 'recipe.yaml'} --redo calibrate` makes it again"
    for stage_folder in (folder, *folder.parents):
        if stage_folder.parent.parent.name == "stages":
            name = stage_folder.parent.name.replace("-", "/", 1)
            run = stage_folder.parents[2]
            return f"`moecli run {run / 'recipe.yaml'} --run-dir {run} --redo {name}` makes it again"
    return None


class SharedParts:
    """Parts in one folder, each under a key that names everything it depends on; they outlive the stages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def part(self, key: str, kind: type[A], make: Callable[[], A]) -> A:
        """The part under `key`, or `make()` saved as such; both come back as unpacked from what is saved."""
        if self.has(key):
            return load_artifact(self.path, key, kind)
        return kind.unpack(save_artifact(self.path, key, make()))

    def has(self, key: str) -> bool:
        return (self.path / f"{file_safe(key)}.json").is_file()

    def bytes(self) -> int:
        """Size on disk."""
        return sum(f.lstat().st_size for f in self.path.rglob("*") if f.is_file()) if self.path.is_dir() else 0

    def remove(self) -> None:
        """Deletes all of them, each one's description first: a crash in the middle leaves no part half there."""
        for description in self.path.glob("*.json"):
            description.unlink()
        shutil.rmtree(self.path.resolve(), ignore_errors=True)
        if self.path.is_symlink():
            self.path.resolve().mkdir(exist_ok=True)


class StageFolder:
    """One stage's results under one key. `path` exists only when the stage is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path.with_name(path.name + PARTIAL)
        """Where the stage writes while it runs."""

    @property
    def name(self) -> str:
        """The stage's name, "kind/method"."""
        return self.path.parent.name.replace("-", "/", 1)

    @property
    def key(self) -> str:
        """The first digits of the stage's key."""
        return self.path.name

    @property
    def complete(self) -> bool:
        return (self.path / "manifest.json").is_file()

    @property
    def partial(self) -> bool:
        """Started and not finished; what is done so far will be used."""
        return self.work.is_dir()

    @property
    def folder(self) -> Path:
        """Where results lie now: `path` when complete, else `work`."""
        return self.path if self.complete else self.work

    def manifest(self) -> dict[str, Any]:
        """What `finish` was given. SurroundingsError when the stage is not complete or the file is
        damaged."""
        return read_json(self.path / "manifest.json", hint=redo_hint(self.path))

    def begin(self) -> None:
        """Makes `work`, or keeps the one of an interrupted run with its finished parts."""
        if self.complete:
            raise ValueError(f"`{self.path}` is complete; remove it before making it again")
        _make_folder(self.work)

    def finish(self, manifest: Mapping[str, Any], keep_parts: bool = False) -> None:
        """The stage is done: `work` becomes `path`. Parts are deleted unless asked for: the artifact has it
        all."""
        if not keep_parts:
            shutil.rmtree(self.work / "parts", ignore_errors=True)
        for leftover in self.work.rglob(".*.tmp"):
            leftover.unlink()
        durable.write_text(self.work / "manifest.json", json_text(dict(manifest)))
        sync_tree(self.work)
        self._clear(self.path)
        os.rename(self.work, self.path)
        sync_folder(self.path.parent)

    def save(self, artifact: Artifact) -> None:
        """The stage's result, as artifact.safetensors + artifact.json in `work`."""
        save_artifact(self.work, "artifact", artifact)

    def load(self, kind: type[A]) -> A:
        """The saved result. SurroundingsError when it is missing or damaged."""
        return load_artifact(self.folder, "artifact", kind)

    def part(self, name: str, kind: type[A], make: Callable[[], A]) -> A:
        """The finished part `name`, or `make()` saved as such. Both come back as unpacked from what is
        saved, so an interrupted run and an uninterrupted one go on with the same values."""
        if self.has_part(name):
            return load_artifact(self.folder / "parts", name, kind)
        return kind.unpack(save_artifact(self.work / "parts", name, make()))

    def has_part(self, name: str) -> bool:
        return (self.folder / "parts" / f"{file_safe(name)}.json").is_file()

    def bytes(self) -> int:
        """Size on disk of what is complete and what is partial."""
        folders = [folder for folder in (self.path, self.work) if folder.is_dir()]
        return sum(f.lstat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())

    def remove(self) -> None:
        """Deletes the result and what is partial. A crash in the middle leaves no folder that looks
        complete."""
        self._clear(self.path)
        self._clear(self.work)

    def _clear(self, folder: Path) -> None:
        trash = self.path.with_name(self.path.name + TRASH)
        shutil.rmtree(trash, ignore_errors=True)
        if folder.exists():
            os.rename(folder, trash)
            shutil.rmtree(trash)


def save_artifact(folder: Path, name: str, artifact: Artifact) -> Packed:
    """`<name>.safetensors` (none without tensors), then `<name>.json`. Returns what a later load unpacks."""
    tensors, meta = artifact.pack()
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    _make_folder(folder)
    size = None
    if tensors:
        specs = {key: spec_of(tensor) for key, tensor in tensors.items()}
        size = write_tensors(folder / f"{name}.safetensors", specs, tensors.__getitem__).bytes
    text = json_text({"kind": type(artifact).__name__, "tensor_bytes": size, "meta": meta})
    durable.write_text(folder / f"{name}.json", text)
    return Packed(tensors, json.loads(text)["meta"])


def load_artifact(folder: Path, name: str, kind: type[A]) -> A:
    """What `save_artifact` saved. SurroundingsError when it is missing, damaged or of another kind."""
    hint = redo_hint(folder)
    path = folder / f"{name}.json"
    content = read_json(path, hint=hint)
    if content.get("kind") != kind.__name__ or "meta" not in content:
        raise SurroundingsError(f"`{path}` holds {content.get('kind')}, expected {kind.__name__}", hint=hint)
    try:
        return kind.unpack(Packed(_load_tensors(folder / f"{name}.safetensors", content, hint), content["meta"]))
    except (KeyError, ValueError, TypeError) as error:
        raise SurroundingsError(f"`{path}` is damaged: {error}", hint=hint) from error


def _load_tensors(path: Path, content: Mapping[str, Any], hint: str | None) -> dict[str, Tensor]:
    if content["tensor_bytes"] is None:
        return {}
    header = read_header(path, hint=hint)
    if header.file_bytes != content["tensor_bytes"]:
        raise SurroundingsError(
            f"`{path}` has {header.file_bytes} bytes, {content['tensor_bytes']} were written", hint=hint
        )
    return {name: read_tensor(entry) for name, entry in header.entries.items()}
