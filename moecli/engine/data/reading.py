"""Rows of local files and hub data sets, as documents."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moecli.core.errors import SurroundingsError
from moecli.engine.data.sources import SUFFIXES, TextSource, is_pinned, kind_of, parse

MESSAGES = "messages"
"""Column of a conversation, used where the column `text` is asked for and a row has none."""

Render = Callable[[list[Any]], str]
"""Messages -> text, by the tokenizer's chat template."""


class Rendered(str):
    """Text of a chat template: its special tokens are in it already."""


def read_rows(dataset: str, field: str = "text") -> list[str]:
    """The documents of data sets, in their own order. SurroundingsError says what is missing."""
    return [text for source in parse(dataset) for text in documents(source, field)]


def documents(
    source: TextSource, field: str = "text", *, keep_empty: bool = False, render: Render | None = None
) -> list[str]:
    """The documents of one data set; `source.field` goes before `field`.

    Empty documents are left out unless asked for. Conversations need `render`. SurroundingsError says what is
    missing.
    """
    field = source.field or field
    name, rows = source.dataset, None
    if source.path is not None:
        rows = _local(source.path, field)
        name = str(source.path)
    elif source.config and kind_of(Path(source.config)) in SUFFIXES:
        rows = _local(_repository_file(source), field)
    else:
        rows = _hub(source, field)
    return _texts(rows[: source.rows], field, name, keep_empty, render)


def check_there(source: TextSource) -> None:
    """SurroundingsError when a local data set is missing, or a hub data set has no commit to be loaded at."""
    if source.path is not None:
        _files(source.path)
    elif not is_pinned(source):
        raise SurroundingsError(
            f"the data set `{source.dataset}` is not in the hub's cache, and the hub does not tell its commit",
            hint=f"`hf download {source.dataset} --repo-type dataset` where there is a network",
        )


def _files(path: Path) -> list[Path]:
    """The file itself, or all in a folder that can be read."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and kind_of(p) in SUFFIXES)
        if not inside:
            raise SurroundingsError(f"the folder `{path}` holds no {', '.join(SUFFIXES)} file")
        return inside
    if not path.exists():
        raise SurroundingsError(f"the data set `{path}` does not exist")
    if kind_of(path) not in SUFFIXES:
        raise SurroundingsError(f"`{path}` is none of {', '.join(SUFFIXES)}, with or without .gz")
    return [path]


def _local(path: Path, field: str) -> list[Any]:
    return [row for file in _files(path) for row in _rows_of(file, field)]


def _rows_of(path: Path, field: str) -> list[Any]:
    try:
        return _READERS[kind_of(path)](path, field)
    except (UnicodeDecodeError, json.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise SurroundingsError(f"`{path}` cannot be read: {error}") from error


def _plain(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _json(path: Path, field: str) -> list[Any]:
    text = _plain(path).decode()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _lines(text)  # C4's .json files hold one row a line
    if not isinstance(rows, list):
        raise SurroundingsError(f"`{path}` must hold a list of rows, it holds one value")
    return rows


def _jsonl(path: Path, field: str) -> list[Any]:
    return _lines(_plain(path).decode())


def _lines(text: str) -> list[Any]:
    # Only \n ends a line: str.splitlines also cuts at characters that JSON strings may hold.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _txt(path: Path, field: str) -> list[Any]:
    return [_plain(path).decode()]


def _parquet(path: Path, field: str) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(_plain(path)) if path.suffix == ".gz" else path)
        column = _column(field, file.schema_arrow.names, str(path))
        return file.read(columns=[column]).column(column).to_pylist()
    except pa.ArrowInvalid as error:
        raise SurroundingsError(f"`{path}` cannot be read: {error}") from error


_READERS: dict[str, Callable[[Path, str], list[Any]]] = {
    ".json": _json, ".jsonl": _jsonl, ".txt": _txt, ".parquet": _parquet,
}  # fmt: skip


def _hub(source: TextSource, field: str) -> list[Any]:
    import datasets

    name = source.dataset
    try:
        data = datasets.load_dataset(name, source.config, split=source.split or "train", revision=source.revision)
    except (OSError, ValueError) as error:  # not found, offline, no such config or split
        raise SurroundingsError(f"the data set `{name}` cannot be loaded: {_first_line(error)}") from error
    return list(data[_column(field, data.column_names, name)][: source.rows])


def _repository_file(source: TextSource) -> Path:
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(source.dataset, source.config, repo_type="dataset", revision=source.revision)
    except (HTTPError, OSError, ValueError) as error:  # not found, offline, no such file
        message = f"`{source.config}` of the data set `{source.dataset}` cannot be fetched: {_first_line(error)}"
        raise SurroundingsError(message) from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _texts(rows: Sequence[Any], field: str, source: str, keep_empty: bool, render: Render | None) -> list[str]:
    """The field of each row; a row may be the text itself."""
    texts = []
    for number, row in enumerate(rows, 1):
        value = row[_column(field, list(row), source)] if isinstance(row, dict) else row
        if isinstance(value, list) and render is not None:
            value = Rendered(render(_checked(value, number, source)))
        if not isinstance(value, str):
            raise SurroundingsError(f"row {number} of `{source}` has no text in `{field}` but {type(value).__name__}")
        if value or keep_empty:
            texts.append(value)
    if not any(texts):
        raise SurroundingsError(f"`{source}` holds no text")
    return texts


def _checked(messages: list[Any], number: int, source: str) -> list[Any]:
    if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise SurroundingsError(f"row {number} of `{source}` holds a list that is no conversation: no `role` in it")
    return messages


def _column(field: str, present: Sequence[str], source: str) -> str:
    """The column to read: `field`, or the conversation of a row without the column `text`."""
    if field in present:
        return field
    if field == "text" and MESSAGES in present:
        return MESSAGES
    known = ", ".join(f"`{name}`" for name in present)
    hint = f"write `field: {present[0]}`" if present else None
    raise SurroundingsError(f"`{source}` has no field `{field}`; it has {known or 'none'}", hint=hint)
