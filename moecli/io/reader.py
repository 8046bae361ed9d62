"""A model folder as a Checkpoint: headers parsed once, tensors read when asked for.

Which files hold the weights is decided as transformers decides it: `model.safetensors` if it exists, else the
shards that `model.safetensors.index.json` names. Names are in natural order (layer 2 before layer 10).
"""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from moecli.core.artifacts import Checkpoint, Packed
from moecli.core.errors import SurroundingsError
from moecli.core.model import ModelFacts, TensorSpec
from moecli.io.durable import natural_key, read_json
from moecli.io.tensorfile import Entry, Header, read_header, read_rows, read_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FactsOf = Callable[[Mapping[str, Any]], ModelFacts]
Origin = tuple[Literal["own", "source"], str]
"""("source", name): the bytes are the source folder's tensor `name`. ("own", name): somebody wrote it as
`name`."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = (
    "tokenizer*", "tokenization*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens*", "spiece*",
    "*.tiktoken", "*.model", "chat_template*", "additional_chat_templates/*", "generation_config.json",
    "*processor_config.json", "*.py", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
"""What travels with the weights: tokenizer, chat template, generation settings, licence, and the Python files
that a `trust_remote_code` config refers to."""

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens*", "spiece*", "*.tiktoken", "*.model",
    "chat_template*",
)  # fmt: skip
"""What decides how text becomes tokens, and so every result that text was run for."""


class StoredCheckpoint(Checkpoint):
    """A checkpoint that lives in folders. Never packed as an artifact: a 60 GB model is not copied to be
    passed on."""

    facts_of: FactsOf

    @property
    @abstractmethod
    def source(self) -> FolderCheckpoint:
        """The folder at the bottom of the chain."""

    @abstractmethod
    def origin(self, name: str) -> Origin:
        """Where the bytes of `name` come from, through all renames. KeyError for an unknown name."""

    def entry(self, name: str) -> Entry | None:
        """File and first byte of `name`, for readers that bring their own memory; None when its values are computed."""
        return None

    def pack(self) -> Packed:
        raise TypeError("a checkpoint is passed on as its folder; it cannot be packed into tensors and JSON")

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        raise TypeError("a checkpoint is opened from its folder; it cannot be unpacked from tensors and JSON")


class StoredView(StoredCheckpoint):
    """A checkpoint that shows another one differently: what lies beside the weights is that one's."""

    parent: StoredCheckpoint

    @property
    def source(self) -> FolderCheckpoint:
        return self.parent.source

    def side_files(self) -> Mapping[str, str]:
        return self.parent.side_files()


def stored(checkpoint: Checkpoint) -> StoredCheckpoint:
    """The same checkpoint with the wider interface of this room. TypeError when it does not live in
    folders."""
    if not isinstance(checkpoint, StoredCheckpoint):
        raise TypeError(f"expected a checkpoint that lives in folders, got {type(checkpoint).__name__}")
    return checkpoint


class FolderCheckpoint(StoredCheckpoint):
    """Safetensors files beside a config.json.

    Opening reads headers only and raises SurroundingsError, with the file named, when anything is missing,
    cut short or contradictory. `get` and `rows` return fresh memory and may be called from several threads.
    """

    def __init__(self, folder: Path | str, facts_of: FactsOf) -> None:
        self.folder = Path(folder)
        self.facts_of = facts_of
        self.config = read_config(self.folder)
        headers = read_headers(self.folder)
        self.files: tuple[Path, ...] = tuple(headers)
        """The weight files, in natural order."""
        self._entries = tensor_entries(self.folder, headers)
        self._held = {path: tuple(header.entries) for path, header in headers.items()}
        self.facts = facts_of(self.config)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def spec(self, name: str) -> TensorSpec:
        return self._entry(name).spec

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        return read_tensor(self._entry(name)).to(device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return read_rows(self._entry(name), start, stop)

    def side_files(self) -> Mapping[str, str]:
        return side_files(self.folder)

    @property
    def source(self) -> FolderCheckpoint:
        return self

    def origin(self, name: str) -> Origin:
        self._entry(name)
        return "source", name

    def entry(self, name: str) -> Entry:
        return self._entry(name)

    def file_of(self, name: str) -> Path:
        """The weight file that holds a tensor."""
        return self._entry(name).file

    def names_in(self, file: Path) -> tuple[str, ...]:
        """Every tensor of one of `files`, also one that the index assigns to another file."""
        return self._held[file]

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"`{self.folder}` has no tensor `{name}`") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. SurroundingsError when the folder or the file is missing, or is not JSON."""
    if not folder.is_dir():
        raise SurroundingsError(f"the model folder `{folder}` does not exist")
    return read_json(folder / "config.json", hint=download_hint(folder, "config.json"))


def read_headers(folder: Path) -> dict[Path, Header]:
    """Headers of all weight files of a folder, in natural order of their names."""
    return {path: read_header(path, hint=download_hint(folder, path.name)) for path in weight_files(folder)}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model. SurroundingsError when there are none, or only
    pickles."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return [folder / name for name in sorted(set(_weight_map(folder).values()), key=natural_key)]
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        raise SurroundingsError(
            f"`{folder}` has neither `{SINGLE}` nor `{INDEX}`, only `{loose[0]}`"
            + (f" and {len(loose) - 1} more" if len(loose) > 1 else ""),
            hint=download_hint(folder, INDEX),
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise SurroundingsError(
            f"`{folder}` holds only pickled weights (`{pickles[0]}`); moecli reads safetensors",
            hint=_conversion(folder),
        )
    raise SurroundingsError(f"`{folder}` holds no safetensors weights", hint=download_hint(folder))


def _conversion(folder: Path) -> str:
    load = f"AutoModelForCausalLM.from_pretrained('{folder}', use_safetensors=False)"
    save = f"save_pretrained('{folder}-safetensors')"
    return f'`python -c "from transformers import AutoModelForCausalLM; {load}.{save}"` converts them'


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_json(path, hint=download_hint(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SurroundingsError(f"`{path}` has no `weight_map`", hint=download_hint(folder, INDEX))
    for file in weight_map.values():
        if not isinstance(file, str) or "/" in file or "\\" in file:
            raise SurroundingsError(f"`{path}` names `{file}`, which is no file beside it")
    return weight_map


def tensor_entries(folder: Path, headers: Mapping[Path, Header]) -> dict[str, Entry]:
    """Each tensor's place, in natural order of names. SurroundingsError when index and shards contradict."""
    places: dict[str, list[Path]] = {}
    for path, header in headers.items():
        for name in header.entries:
            places.setdefault(name, []).append(path)
    weight_map = {} if (folder / SINGLE).exists() else _weight_map(folder)
    for name, file in weight_map.items():
        found = places.get(name)
        if found is None:
            raise SurroundingsError(f"`{folder / INDEX}` names `{name}`, which is in no shard")
        if folder / file not in found:
            raise SurroundingsError(f"`{folder / INDEX}` puts `{name}` in `{file}`, it is in `{found[0].name}`")
        places[name] = [folder / file]
    for name, found in places.items():
        if len(found) > 1:
            raise SurroundingsError(
                f"`{name}` is in `{found[0].name}` and `{found[1].name}`, "
                f"and `{folder / INDEX}` does not say which counts"
            )
    return {name: headers[places[name][0]].entries[name] for name in sorted(places, key=natural_key)}


def side_files(folder: Path) -> dict[str, str]:
    """Small files that travel with the weights: name relative to the folder -> path, sorted.

    SurroundingsError when the folder is gone.
    """
    if not folder.is_dir():
        raise SurroundingsError(f"the model folder `{folder}` does not exist")
    names = (path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("*/*")] if path.is_file())
    return {n: str(folder / n) for n in sorted(names) if any(_matches(n, pattern) for pattern in SIDE_FILES)}


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


SPOTS = 256
"""Tensors of a weight file that `digest` looks into ..."""
SPOT_BYTES = 4096
"""... and how much of each it reads, from the middle."""


def digest(folder: Path | str) -> str:
    """Key of a local model, 64 hex digits: config, index, tokenizer, and of each weight file the header, the size and
    what lies at `SPOTS` places.

    Weights that were trained further have another key; a change of a few tensors between the places goes unnoticed, for
    reading a whole model takes as long as a stage. Where the folder lies and when it was written play no part.
    """
    folder = Path(folder)
    read_config(folder)
    total = hashlib.sha256()
    for name in ("config.json", INDEX):
        if (folder / name).is_file():
            total.update(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES):
            total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for path, header in read_headers(folder).items():
        total.update(f"{path.name} {header.sha256} {header.file_bytes}\n".encode())
        entries = sorted((entry for entry in header.entries.values() if entry.spec.bytes), key=lambda e: e.start)
        step = max(1, len(entries) // SPOTS)
        with path.open("rb") as file:
            for entry in entries[::step]:
                count = min(SPOT_BYTES, entry.spec.bytes)
                file.seek(entry.start + (entry.spec.bytes - count) // 2)
                total.update(file.read(count))
    return total.hexdigest()


def download_hint(folder: Path, file: str = "") -> str | None:
    """What to type when a file of a hub model is missing; None for a folder that is not in the hub's
    cache."""
    found = re.search(r"models--(.+?)--(.+?)/snapshots/([0-9a-f]+)/?$", folder.as_posix())
    if found is None:
        return None
    organisation, name, revision = found.groups()
    return f"`hf download {organisation}/{name}{' ' + file if file else ''} --revision {revision}`"
