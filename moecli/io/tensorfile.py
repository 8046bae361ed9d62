"""The safetensors format, by hand: 8 bytes of header length, a JSON header, the tensors' bytes.

Why not the library. Reading: its tensors share one private memory map, so changing one in place changes
what the next read of the same file returns, and a file that shrinks meanwhile kills the process; here each
read is plain file reading into fresh memory, from any number of threads, with no handle kept. Writing: it
wants all tensors of a file in memory; here the header is made from specs, then one tensor at a time is
fetched and written, and a full disk is an OSError with its number. Headers are read without torch, so
`plan` and `inspect` stay quick. The tests hold both directions against the library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.durable import disk_errors, natural_key, published

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_NAME: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' dtype codes and torch's names for them."""

CODE: Mapping[str, str] = {name: code for code, name in TORCH_NAME.items()}
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""


class Entry(NamedTuple):
    """Where one tensor lies."""

    file: Path
    spec: TensorSpec
    start: int
    """First byte, counted from the start of the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    file_bytes: int
    sha256: str
    """Of the header's bytes."""


class Written(NamedTuple):
    """A file that was written."""

    bytes: int
    sha256: str


def read_header(path: Path, hint: str | None = None) -> Header:
    """Names, dtypes, shapes and places. SurroundingsError when the file is missing, cut short or no
    safetensors."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise SurroundingsError(_not_safetensors(path, size, length), hint=hint)
            raw = file.read(length)
    except FileNotFoundError:
        raise SurroundingsError(f"`{path}` is missing", hint=hint) from None
    except PermissionError:
        raise SurroundingsError(f"`{path}` cannot be read: permission denied", hint=hint) from None
    try:
        content = json.loads(raw)
        metadata = content.pop("__metadata__", {}) or {}
        entries = {name: _entry(path, 8 + length, value) for name, value in content.items()}
    except _UnknownDtype as error:
        raise SurroundingsError(f"`{path}` holds dtype `{error}`, which moecli does not read") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurroundingsError(f"`{path}` has a damaged header ({error})", hint=hint) from error
    _check_layout(path, entries, 8 + length, size, hint)
    return Header(entries, metadata, size, hashlib.sha256(raw).hexdigest())


def _not_safetensors(path: Path, size: int, length: int) -> str:
    if size >= 8 and length <= MAX_HEADER_BYTES:
        return f"`{path}` is cut short: its header needs {8 + length} bytes, the file has {size}"
    return f"`{path}` is not a safetensors file"


class _UnknownDtype(Exception):
    pass


def _entry(path: Path, data_start: int, value: Mapping[str, Any]) -> Entry:
    if value["dtype"] not in TORCH_NAME:
        raise _UnknownDtype(value["dtype"])
    spec = TensorSpec(TORCH_NAME[value["dtype"]], tuple(int(n) for n in value["shape"]))
    start, stop = value["data_offsets"]
    if start < 0 or min(spec.shape, default=0) < 0 or stop - start != spec.bytes:
        raise ValueError("a tensor's offsets do not fit its shape")
    return Entry(path, spec, data_start + start)


def _check_layout(path: Path, entries: Mapping[str, Entry], data_start: int, size: int, hint: str | None) -> None:
    """Tensors must follow each other without holes and fill the file, as the format asks."""
    end = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.spec.bytes)):
        if entry.start != end:
            raise SurroundingsError(f"`{path}` has a damaged header (tensors overlap or leave holes)", hint=hint)
        end += entry.spec.bytes
    if end > size:
        raise SurroundingsError(f"`{path}` is cut short: it needs {end} bytes, the file has {size}", hint=hint)
    if end < size:
        raise SurroundingsError(f"`{path}` has {size - end} bytes after its last tensor", hint=hint)


def read_tensor(entry: Entry) -> Tensor:
    """The whole tensor in fresh CPU memory: the caller may change it."""
    return _read(entry, entry.start, entry.spec.shape)


def read_rows(entry: Entry, start: int, stop: int) -> Tensor:
    """Rows start..stop of the first dimension, without reading the rest. IndexError outside the tensor."""
    rows, *rest = entry.spec.shape or (0,)
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"rows {start}..{stop} of a tensor with {rows} rows")
    row_bytes = TensorSpec(entry.spec.dtype, tuple(rest)).bytes
    return _read(entry, entry.start + start * row_bytes, (stop - start, *rest))


def read_into(entry: Entry, start: int, buffer: memoryview) -> None:
    """Bytes `start`.. of the tensor into memory that the caller owns, until it is full."""
    if len(buffer):
        with _disk_read(entry.file), entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + start)
            _fill(file, buffer, entry.file)


def _read(entry: Entry, start: int, shape: tuple[int, ...]) -> Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, entry.spec.dtype)
    flat = torch.empty(math.prod(shape), dtype=dtype)
    if flat.numel():
        buffer = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        with _disk_read(entry.file), entry.file.open("rb", buffering=0) as file:
            file.seek(start)
            _fill(file, buffer, entry.file)
    return flat.view(shape)


def _fill(file: FileIO, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise SurroundingsError(f"`{path}` became shorter while it was read")
        done += count


@contextlib.contextmanager
def _disk_read(path: Path) -> Iterator[None]:
    """Names the file when it went missing after its header was read."""
    try:
        yield
    except OSError as error:
        raise SurroundingsError(f"`{path}` cannot be read: {error.strerror}") from error


def spec_of(tensor: Tensor) -> TensorSpec:
    """Dtype and shape. TypeError for a dtype the format has no code for."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in CODE:
        raise TypeError(f"safetensors cannot hold {tensor.dtype}")
    return TensorSpec(dtype, tuple(tensor.shape))


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Written:
    """A safetensors file, atomically and durably; one tensor at a time is asked of `get`, in another thread, while the
    one before is written and hashed. Three are held in memory at most.

    Same specs and tensors give the same bytes: widest dtype first, so that each tensor is aligned, then
    natural order of names; no timestamps. `on_bytes` is told of each tensor's size once it is written.
    ValueError when `get` returns something else than the spec promised.
    """
    order = sorted(specs, key=lambda name: (-_item_bytes(specs[name]), natural_key(name)))
    header = _header_bytes(specs, order)
    digest, total = hashlib.sha256(header), len(header)
    with (
        disk_errors(path.parent, len(header) + sum(spec.bytes for spec in specs.values())),
        published(path) as temp,
        temp.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1, "sha256") as hasher,
    ):
        _write_all(file, memoryview(header))
        for data in _ahead(order, lambda name: _bytes_of(name, get(name), specs[name])):
            hashed = hasher.submit(digest.update, data)
            _write_all(file, data)
            hashed.result()
            total += len(data)
            on_bytes(len(data))
        os.fsync(file.fileno())
    return Written(total, digest.hexdigest())


def _ahead(names: Sequence[str], make: Callable[[str], memoryview]) -> Iterator[memoryview]:
    """`make` of each name in order; the next one is begun before one is handed out."""
    with ThreadPoolExecutor(1, "tensors") as reader:
        coming: Future[memoryview] | None = None
        for name in names:
            found, coming = coming, reader.submit(make, name)
            if found is not None:
                yield found.result()
        if coming is not None:
            yield coming.result()


def _item_bytes(spec: TensorSpec) -> int:
    return TensorSpec(spec.dtype, ()).bytes


def _header_bytes(specs: Mapping[str, TensorSpec], order: list[str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        spec = specs[name]
        stop = offset + spec.bytes
        content[name] = {"dtype": CODE[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(name: str, tensor: Tensor, spec: TensorSpec) -> memoryview:
    import torch

    if spec_of(tensor) != spec:
        raise ValueError(f"`{name}`: expected {spec}, got {spec_of(tensor)}")
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(file: FileIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:])
