"""Names of data sets as values: parsed, pinned to commits, and as they enter a key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from moecli.core.errors import SurroundingsError, UsageError

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
_ENDS = re.compile(r"(?P<name>.+?)(:(?P<rows>\d+))?(\*(?P<weight>\d+(\.\d+)?|\.\d+))?", re.DOTALL)
_HUB = re.compile(
    r"(?P<name>[^\[\](),:@*\s]+)(\[(?P<config>[^\]]*)\])?(\((?P<split>[^)]*)\))?(@(?P<revision>[^@:*\s]+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_SECONDS = 10


class TextSource(BaseModel):
    """One data set: where its rows are, and how many samples come from it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    dataset: Annotated[str, Field(min_length=1)]
    """A local file or folder, `demo`, or the id of a hub data set."""
    config: str | None = None
    """Configuration of a hub data set, or one file of its repository."""
    split: str | None = None
    """Split of a hub data set, `train` by default."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    field: str | None = None
    """Column that holds the text; that of the stage by default."""
    rows: PositiveInt | None = None
    """First rows only."""
    samples: PositiveInt | None = None
    """Samples from this data set; by default its share of what the others leave."""
    weight: PositiveFloat = 1.0
    """Share of the samples, next to the other data sets' weights."""

    @property
    def path(self) -> Path | None:
        """The file or folder of a local data set; None for one on the hub."""
        if self.dataset == "demo":
            return Path(str(files("moecli"))) / "demo" / "tasks" / "calibration.jsonl"
        return Path(self.dataset).expanduser() if looks_local(self.dataset) else None


def kind_of(path: Path) -> str:
    """The suffix that tells the format, without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def looks_local(name: str) -> bool:
    """True for a path that exists, and for what cannot be a hub id."""
    path = Path(name).expanduser()
    return path.exists() or kind_of(path) in SUFFIXES or name[0] in "./~" or "/" not in name


def sources_of(dataset: str | Sequence[TextSource]) -> tuple[TextSource, ...]:
    """Text or separate fields, as values. UsageError for text that does not read as data sets."""
    return parse(dataset) if isinstance(dataset, str) else tuple(dataset)


def parse(text: str) -> tuple[TextSource, ...]:
    """The data sets that a text names. UsageError when it does not read as any."""
    if Path(text).expanduser().exists():
        return (TextSource(dataset=text),)
    return tuple(_one(part.strip()) for part in _split(text))


def _split(text: str) -> list[str]:
    """Cut at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _one(text: str) -> TextSource:
    ends = _ENDS.fullmatch(text)
    if ends is None:
        raise UsageError("a data set between two commas has no name")
    rows = int(ends["rows"]) if ends["rows"] else None
    weight = float(ends["weight"] or 1)
    if rows == 0 or weight == 0:
        raise UsageError(f"`{text}` asks for nothing: rows and weights are above 0")
    if Path(ends["name"]).expanduser().exists() or ends["name"] == "demo":
        return TextSource(dataset=ends["name"], rows=rows, weight=weight)
    hub = _HUB.fullmatch(ends["name"])
    if hub is None:
        raise UsageError(f"`{text}` is no file and does not read as `org/name[config](split)@revision:n*weight`")
    if looks_local(hub["name"]) and hub["name"] != ends["name"]:
        raise UsageError(f"`{hub['name']}` is a local name, it takes no config, split or revision")
    return TextSource(
        dataset=hub["name"], config=hub["config"] or None, split=hub["split"] or None, revision=hub["revision"],
        rows=rows, weight=weight,
    )  # fmt: skip


def spec_text(sources: Iterable[TextSource]) -> str:
    """The text that `parse` reads; `field` and `samples`, which text has no place for, are not in it."""
    return ", ".join(_with_ends(_name(source), source) for source in sources)


def _name(source: TextSource) -> str:
    config = f"[{source.config}]" if source.config else ""
    split = f"({source.split})" if source.split else ""
    return source.dataset + config + split + (f"@{source.revision}" if source.revision else "")


def _with_ends(name: str, source: TextSource) -> str:
    rows = f":{source.rows}" if source.rows else ""
    return name + rows + (f"*{source.weight:g}" if source.weight != 1 else "")


def identity(sources: Iterable[TextSource], digest: Callable[[Path], str]) -> str:
    """The data sets as they enter a key: local content by its digest, hub data by id and commit.

    A local path that does not exist stands for itself: nothing can be made under such a key.
    """
    return ", ".join(_identity(source, digest) for source in sources)


def _identity(source: TextSource, digest: Callable[[Path], str]) -> str:
    local = source.path is not None and source.path.exists()
    name = f"sha256:{digest(source.path)}" if local else _name(source)
    field = f"#{source.field}" if source.field else ""
    return _with_ends(name + field, source) + (f"={source.samples}" if source.samples else "")


# --- commits of hub data --------------------------------------------------------------------------


def pinned(sources: Iterable[TextSource]) -> tuple[TextSource, ...]:
    """Hub data sets with the commit their revision stands for now; offline, the one in the hub's cache.

    A data set stays as it is when neither knows a commit. SurroundingsError when the hub has no such data set or
    revision.
    """
    return tuple(_pinned(source) for source in sources)


def is_pinned(source: TextSource) -> bool:
    """True for local data, and for hub data at a commit."""
    return source.path is not None or bool(_COMMIT.fullmatch(source.revision or ""))


def _pinned(source: TextSource) -> TextSource:
    if is_pinned(source):
        return source
    commit = _asked(source) or _cached(source)
    return source if commit is None else source.model_copy(update={"revision": commit})


def _asked(source: TextSource) -> str | None:
    """The commit the hub tells; None when it cannot be asked."""
    from httpx import HTTPError
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=_HUB_SECONDS)
    except errors.RevisionNotFoundError as error:
        raise SurroundingsError(f"the data set `{source.dataset}` has no revision `{source.revision}`") from error
    except errors.RepositoryNotFoundError as error:
        message = f"the hub has no data set `{source.dataset}`, or it is private"
        raise SurroundingsError(message, hint="`hf auth login`") from error
    except errors.HFValidationError as error:
        raise SurroundingsError(f"`{source.dataset}` is no file and no id of a hub data set") from error
    except (HTTPError, OSError):  # no network: what was fetched before can still be used
        return None
    return info.sha


def _cached(source: TextSource) -> str | None:
    from huggingface_hub import constants

    folder = f"datasets--{source.dataset.replace('/', '--')}"
    ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / (source.revision or "main")
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None
