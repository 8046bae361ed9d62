"""Where a model comes from: the built-in demo, a local folder, or the hub."""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.durable import natural_key
from moecli.io.reader import INDEX, SIDE_FILES, digest, read_config, read_headers, tensor_entries
from moecli.io.tensorfile import TORCH_NAME

Kind = Literal["demo", "folder", "hub"]

DEMO = "demo"
PLAN_FILES = ("config.json", INDEX)
RUN_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", *SIDE_FILES)
"""What is fetched from the hub: never pickles, never other formats."""
SECOND_COPIES = ("original/*", "metal/*", "*/*.safetensors", "consolidated*")
"""Weights that some repositories carry a second time, for other programs."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this machine."""

    name: str
    """As the recipe names it."""
    folder: Path
    kind: Kind
    revision: str | None
    """Commit of a hub model."""
    digest: str
    """Key of the model: id and commit for the hub, else `reader.digest` of the folder."""


@dataclass(frozen=True, slots=True)
class SourceSketch:
    """What is known of a model for planning: no weight was read, and for a hub model none was fetched."""

    name: str
    kind: Kind
    revision: str | None
    digest: str
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    """Empty when only the config is at hand."""


def resolve(model: str, revision: str | None = None, offline: bool | None = None) -> Source:
    """The folder of `demo`, of a local path, or of a hub id (`org/name`), fetched if need be.

    A local folder wins over a hub id of the same spelling. `offline=True` uses the hub's cache only; None
    leaves it to `HF_HUB_OFFLINE`. SurroundingsError when the model cannot be had.
    """
    local = _local(model)
    if local is not None:
        kind, folder = local
        return Source(model, folder, kind, None, digest(folder))
    folder = _fetch(model, revision, offline, RUN_FILES)
    return Source(model, folder, "hub", folder.name, _hub_digest(model, folder.name))


def resolve_config(model: str, revision: str | None = None, offline: bool | None = None) -> SourceSketch:
    """Like `resolve`, for planning: a hub model's config and index are fetched, its weights are not.

    The digest is the one `resolve` gives. Specs of a hub model come from its cached weights, else from the
    headers the hub hands out (a few kilobytes a shard), else they are empty (offline).
    """
    local = _local(model)
    if local is not None:
        kind, folder = local
        specs = _specs(folder)
        return SourceSketch(model, kind, None, digest(folder), read_config(folder), specs)
    folder = _fetch(model, revision, offline, PLAN_FILES)
    commit = folder.name
    specs = _cached_specs(folder) or _remote_specs(model, commit, offline)
    return SourceSketch(model, "hub", commit, _hub_digest(model, commit), read_config(folder), specs)


def _local(model: str) -> tuple[Kind, Path] | None:
    """The folder of a model that is no hub id; None for a hub id."""
    if model == DEMO:
        return "demo", Path(str(importlib.resources.files("moecli").joinpath("demo", "model")))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return "folder", folder
    if folder.is_file():
        raise SurroundingsError(f"`{model}` is a file, a model is a folder", hint=f"`{folder.parent}`")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        return None
    near = difflib.get_close_matches(model, [DEMO], n=1)
    raise SurroundingsError(
        f"there is no model folder `{model}`, and it is no hub id (`organisation/name`)",
        hint=f"did you mean `{near[0]}`?" if near else None,
    )


def _fetch(model: str, revision: str | None, offline: bool | None, files: tuple[str, ...]) -> Path:
    """The snapshot folder in the hub's cache; its name is the commit."""
    from huggingface_hub import constants, errors, snapshot_download

    hint = f"`hf download {model}{' --revision ' + revision if revision else ''}` where there is a network"
    only_cached = constants.HF_HUB_OFFLINE if offline is None else offline
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(SECOND_COPIES),
            local_files_only=bool(only_cached),
        )
    except errors.GatedRepoError as error:
        raise SurroundingsError(
            f"`{model}` is gated: its licence must be accepted on the hub", hint="`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SurroundingsError(f"the hub has no model `{model}`, or it is private", hint="`hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise SurroundingsError(f"`{model}` has no revision `{revision}`") from error
    except errors.LocalEntryNotFoundError as error:
        why = "offline" if only_cached else "the hub cannot be reached"
        at = f" at revision `{revision}`" if revision else ""
        raise SurroundingsError(
            f"`{model}`{at} is not in the hub's cache on this machine ({why})",
            hint=f"{hint}, then copy the folder here and write its path as `model`",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, ConnectionError) as error:
        raise SurroundingsError(f"`{model}` cannot be fetched: {_first_line(error)}", hint=hint) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _cached_specs(folder: Path) -> dict[str, TensorSpec]:
    try:
        return _specs(folder)
    except SurroundingsError:  # not fetched yet, or only in part: this is a plan, the run fetches the rest
        return {}


def _specs(folder: Path) -> dict[str, TensorSpec]:
    return {name: entry.spec for name, entry in tensor_entries(folder, read_headers(folder)).items()}


def _remote_specs(model: str, commit: str, offline: bool | None) -> dict[str, TensorSpec]:
    from httpx import HTTPError
    from huggingface_hub import constants, errors, get_safetensors_metadata

    if offline or constants.HF_HUB_OFFLINE:
        return {}
    try:
        files = get_safetensors_metadata(model, revision=commit).files_metadata.values()
    except errors.NotASafetensorsRepoError as error:
        raise SurroundingsError(f"`{model}` has no safetensors weights on the hub") from error
    except (
        HTTPError,
        OSError,
    ):  # no network, and the config came from the cache: a plan without sizes is still one
        return {}
    tensors = {name: info for file in files for name, info in file.tensors.items()}
    unknown = {info.dtype for info in tensors.values()} - set(TORCH_NAME)
    if unknown:
        raise SurroundingsError(f"`{model}` holds dtype `{min(unknown)}`, which moecli does not read")
    return {
        name: TensorSpec(TORCH_NAME[tensors[name].dtype], tuple(tensors[name].shape))
        for name in sorted(tensors, key=natural_key)
    }


def _hub_digest(model: str, commit: str) -> str:
    return hashlib.sha256(f"hub {model} {commit}".encode()).hexdigest()


_DIGESTS: dict[tuple[str, int, int], str] = {}
"""Digests of files already read by this process: (path, size, mtime in ns) -> sha256."""


def digest_path(path: Path | str) -> str:
    """sha256 of a file's bytes, or of a folder's relative names and contents. For options that name local
    data.

    A file is not read twice by one process while its size and time of change stay the same.
    SurroundingsError when there is nothing at `path`.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _digest_file(path)
    if not path.is_dir():
        raise SurroundingsError(f"`{path}` does not exist")
    total = hashlib.sha256()
    for file in sorted((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.relative_to(path).as_posix()):
        total.update(f"{file.relative_to(path).as_posix()}\0{_digest_file(file)}\n".encode())
    return total.hexdigest()


def _digest_file(path: Path) -> str:
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _DIGESTS:
        with path.open("rb") as file:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _DIGESTS[key]
