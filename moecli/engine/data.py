"""Text to token batches: where it comes from, which rows, and how rows become samples of equal length.

A data set is named by one string:

    texts.jsonl                 json (a list), jsonl, parquet or txt, also with .gz; a folder of these
    demo                        the calibration text that comes with the package
    org/name[config](split):n   a hub data set; all but the name may be left out: split is `train`, n takes
                                the first rows only

A txt file is one document. `pack` takes documents in an order drawn from the seed, joins them with the
tokenizer's EOS, and cuts consecutive blocks, so nothing is padded and documents may straddle blocks.
`truncate` takes one document per sample, with the tokenizer's own special tokens, cuts what is too long and
pads what is too short on the right.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.families.adapter import load_tokenizer

Packing = Literal["pack", "truncate"]
SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
_SPEC = re.compile(r"(?P<name>[^\[\(:]+)(\[(?P<config>[^\]]*)\])?(\((?P<split>[^)]*)\))?(:(?P<rows>\d+))?")
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and mask of some sequences, both int64 [B, S]; the mask is 0 on padding."""

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Samples of equal length. N samples, S tokens."""

    ids: Tensor
    """int64 [N, S]"""
    mask: Tensor
    """int64 [N, S], 0 on padding"""
    digest: str
    """sha256 of ids and mask: equal digests, equal calibration"""

    def batches(self, batch_size: int) -> list[Batch]:
        """Consecutive samples, `batch_size` at a time."""
        pairs = zip(self.ids.split(batch_size), self.mask.split(batch_size), strict=True)
        return [Batch(ids, mask) for ids, mask in pairs]


def tokenise(
    dataset: str,
    model: Checkpoint,
    *,
    samples: int,
    tokens_per_sample: int,
    field: str = "text",
    packing: Packing = "pack",
    seed: int = 0,
) -> Tokenised:
    """`samples` sequences of `tokens_per_sample` tokens of `dataset`, by the model's own tokenizer.

    The same arguments give the same tokens. SurroundingsError when data or tokenizer are missing, when the
    text is too short, or when a sample is longer than the model's positions.
    """
    limit = model.facts.max_positions
    if tokens_per_sample > limit:
        raise SurroundingsError(
            f"`tokens_per_sample` must be at most the model's {limit} positions, got {tokens_per_sample}",
            hint=f"write `tokens_per_sample: {limit}`",
        )
    texts = read_rows(dataset, field)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    make = _pack if packing == "pack" else _truncate
    ids, mask = make(load_tokenizer(model), [texts[i] for i in order], samples, tokens_per_sample)
    return Tokenised(ids, mask, _digest(ids, mask))


def _digest(ids: Tensor, mask: Tensor) -> str:
    total = hashlib.sha256(f"{list(ids.shape)}".encode())
    for tensor in (ids, mask):
        total.update(tensor.contiguous().numpy().astype("<i8").tobytes())
    return total.hexdigest()


def _pack(tokenizer: Any, texts: Sequence[str], samples: int, length: int) -> tuple[Tensor, Tensor]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in _encoded(tokenizer, texts, special=False):
        stream += document + end
        if len(stream) >= samples * length:
            break
    _refuse_short(len(stream) // length, samples, length, f"{len(stream)} tokens in all")
    ids = torch.tensor(stream[: samples * length], dtype=torch.int64).view(samples, length)
    return ids, torch.ones_like(ids)


def _truncate(tokenizer: Any, texts: Sequence[str], samples: int, length: int) -> tuple[Tensor, Tensor]:
    rows: list[list[int]] = []
    for document in _encoded(tokenizer, texts, special=True):
        rows += [document[:length]] if document else []
        if len(rows) == samples:
            break
    _refuse_short(len(rows), samples, length, "one document a sample")
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    ids = torch.full((samples, length), next(i for i in fillers if i is not None), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(rows):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = 1
    return ids, mask


def _encoded(tokenizer: Any, texts: Sequence[str], special: bool) -> Iterator[list[int]]:
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        some = list(texts[start : start + _DOCUMENTS_AT_ONCE])
        yield from tokenizer(some, add_special_tokens=special, verbose=False)["input_ids"]


def _refuse_short(have: int, samples: int, length: int, detail: str) -> None:
    if have < samples:
        raise SurroundingsError(
            f"asked for {samples} samples of {length} tokens, the text gives {have} ({detail})",
            hint=f"write `samples: {have}`, or name more text"
            if have
            else "lower `tokens_per_sample`, or name more text",
        )


# --- where text comes from ------------------------------------------------------------------------


def read_rows(dataset: str, field: str = "text") -> list[str]:
    """The documents of a data set, in its own order. SurroundingsError says what is missing."""
    if dataset == "demo":
        return _local(Path(str(files("moecli"))) / "demo" / "tasks" / "calibration.jsonl", field)
    if Path(dataset).exists():
        return _local(Path(dataset), field)
    spec = _SPEC.fullmatch(dataset)
    if spec is None:
        raise SurroundingsError(f"`{dataset}` is no file and does not read as `org/name[config](split):n`")
    name, rows = spec["name"], int(spec["rows"]) if spec["rows"] else None
    if _looks_local(name):
        return _local(Path(name), field)[:rows]
    return _hub(name, spec["config"], spec["split"] or "train", rows, field)


def _looks_local(name: str) -> bool:
    path = Path(name)
    return path.exists() or _kind(path) in SUFFIXES or name[0] in "./~" or "/" not in name


def _kind(path: Path) -> str:
    """The suffix that tells the format, without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _local(path: Path, field: str) -> list[str]:
    path = path.expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and _kind(p) in SUFFIXES)
        if not inside:
            raise SurroundingsError(f"the folder `{path}` holds no {', '.join(SUFFIXES)} file")
        return [text for file in inside for text in _local(file, field)]
    if not path.exists():
        raise SurroundingsError(f"the data set `{path}` does not exist")
    if _kind(path) not in _READERS:
        raise SurroundingsError(f"`{path}` is none of {', '.join(SUFFIXES)}, with or without .gz")
    try:
        return _texts(_READERS[_kind(path)](path, field), field, str(path))
    except (UnicodeDecodeError, json.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise SurroundingsError(f"`{path}` cannot be read: {error}") from error


def _plain(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _json(path: Path, field: str) -> list[Any]:
    rows = json.loads(_plain(path))
    if not isinstance(rows, list):
        raise SurroundingsError(f"`{path}` must hold a list of rows, it holds one value")
    return rows


def _jsonl(path: Path, field: str) -> list[Any]:
    # Only \n ends a line: str.splitlines also cuts at characters that JSON strings may hold.
    return [json.loads(line) for line in _plain(path).decode().split("\n") if line.strip()]


def _txt(path: Path, field: str) -> list[Any]:
    return [_plain(path).decode()]


def _parquet(path: Path, field: str) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(_plain(path)) if path.suffix == ".gz" else path)
        present = file.schema_arrow.names
        if field not in present:
            raise _no_field(field, present, str(path))
        return file.read(columns=[field]).column(field).to_pylist()
    except pa.ArrowInvalid as error:
        raise SurroundingsError(f"`{path}` cannot be read: {error}") from error


_READERS: dict[str, Callable[[Path, str], list[Any]]] = {
    ".json": _json, ".jsonl": _jsonl, ".txt": _txt, ".parquet": _parquet,
}  # fmt: skip


def _hub(name: str, config: str | None, split: str, rows: int | None, field: str) -> list[str]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # not found, offline, no such config or split
        first = str(error).strip().splitlines()[0]
        raise SurroundingsError(f"the data set `{name}` cannot be loaded: {first}") from error
    if field not in data.column_names:
        raise _no_field(field, data.column_names, name)
    return _texts(data[field][:rows], field, name)


def _texts(rows: Sequence[Any], field: str, source: str) -> list[str]:
    """The field of each row; a row may be the text itself. Empty documents are left out."""
    texts = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and field not in row:
            raise _no_field(field, list(row), source)
        text = row[field] if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise SurroundingsError(f"row {number} of `{source}` has no text in `{field}` but {type(text).__name__}")
        if text:
            texts.append(text)
    if not texts:
        raise SurroundingsError(f"`{source}` holds no text")
    return texts


def _no_field(field: str, present: Sequence[str], source: str) -> SurroundingsError:
    known = ", ".join(f"`{name}`" for name in present)
    hint = f"write `field: {present[0]}`" if present else None
    return SurroundingsError(f"`{source}` has no field `{field}`; it has {known or 'none'}", hint=hint)
