"""Our reading and writing of safetensors against the library's."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io import tensorfile
from moecli.io.tensorfile import read_header, read_rows, read_tensor, spec_of, write_tensors

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = int(torch.tensor(shape).prod()) if shape else 1
    return (torch.arange(size) % 5 - 2).to(torch.float32).to(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_bytes = torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and same_bytes


def write(path: Path, tensors: dict[str, torch.Tensor]) -> tensorfile.Written:
    return write_tensors(path, {n: spec_of(t) for n, t in tensors.items()}, tensors.__getitem__)


some_tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
    st.builds(tensor_of, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=some_tensors)
def test_library_reads_what_we_write_and_we_read_what_it_writes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write(ours, tensors)
    save_file(tensors, theirs)
    loaded = load_file(ours)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    entries = read_header(theirs).entries
    assert entries.keys() == tensors.keys()
    assert all(same(read_tensor(entries[name]), tensors[name]) for name in tensors)
    assert all(entries[name].spec == spec_of(tensors[name]) for name in tensors)


def test_rows_read_a_part(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(4, 3, 2)
    write(tmp_path / "f", {"w": whole, "pad": torch.ones(3)})
    entry = read_header(tmp_path / "f").entries["w"]
    assert read_rows(entry, 1, 3).tolist() == whole[1:3].tolist()
    assert read_rows(entry, 2, 2).shape == (0, 3, 2)
    with pytest.raises(IndexError, match=r"rows 3\.\.5 of a tensor with 4 rows"):
        read_rows(entry, 3, 5)


def test_a_tensor_that_was_read_may_be_changed(tmp_path: Path) -> None:
    write(tmp_path / "f", {"w": torch.ones(2)})
    entry = read_header(tmp_path / "f").entries["w"]
    read_tensor(entry).fill_(7)
    assert read_tensor(entry).tolist() == [1, 1]


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    write(tmp_path / "f", {"turned": base.T, "row": base[1], "wide": torch.ones(1).expand(3)})
    loaded = load_file(tmp_path / "f")
    assert loaded["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["row"].tolist() == [3, 4, 5]
    assert loaded["wide"].tolist() == [1, 1, 1]


def test_tensors_are_aligned_and_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    tensors = {
        "b": torch.ones(3, dtype=torch.int8),
        "a10": torch.ones(1),
        "a2": torch.ones(1),
        "c": torch.ones(1).double(),
    }
    first = write(tmp_path / "f", tensors)
    second = write(tmp_path / "g", dict(reversed(tensors.items())))
    assert first == second
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes()
    assert first.bytes == (tmp_path / "f").stat().st_size
    starts = {name: entry.start for name, entry in read_header(tmp_path / "f").entries.items()}
    assert sorted(starts, key=starts.__getitem__) == ["c", "a2", "a10", "b"]
    assert starts["c"] % 8 == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["f", "g"]


def test_a_broken_promise_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`w`: expected TensorSpec\(dtype='float32', shape=\(2,\)\)"):
        write_tensors(tmp_path / "f", {"w": TensorSpec("float32", (2,))}, lambda name: torch.ones(3))
    with pytest.raises(TypeError, match=r"safetensors cannot hold torch\.complex64"):
        spec_of(torch.ones(1, dtype=torch.complex64))
    assert not (tmp_path / "f").exists()


def test_full_disk_says_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile, "_write_all", full)
    with pytest.raises(SurroundingsError, match=r"needs 0\.00\d+ GiB, [\d.]+ GiB free"):
        write(tmp_path / "f", {"w": torch.ones(2**20)})
    assert not (tmp_path / "f").exists()


def damaged(tmp_path: Path, change: object) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, path)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-3], r"is cut short: it needs 144 bytes, the file has 141"),
        (lambda raw: raw[:40], r"is cut short: its header needs 120 bytes, the file has 40"),
        (lambda raw: raw + b"xx", r"has 2 bytes after its last tensor"),
        (lambda raw: b"", r"is not a safetensors file"),
        (lambda raw: b"\xff" * 8 + raw[8:], r"is not a safetensors file"),
        (lambda raw: raw[:8] + b"#" + raw[9:], r"has a damaged header \("),
        (lambda raw: raw.replace(b'"F32"', b'"F4x"', 1), r"holds dtype `F4x`, which moecli does not read"),
        (
            lambda raw: raw.replace(b"[4]", b"[3]"),
            r"damaged header \(a tensor's offsets do not fit its shape\)",
        ),
        (
            lambda raw: raw.replace(b"[16,24]", b"[08,16]").replace(b"08", b" 8"),
            r"tensors overlap or leave holes",
        ),
        (
            lambda raw: raw.replace(b'"data_offsets"', b'"data_offsetz"', 1),
            r"has a damaged header \('data_offsets'\)",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, change: object, message: str) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(SurroundingsError, match=message) as caught:
        read_header(path, hint="`type this`")
    assert f"`{path}`" in caught.value.message


def test_a_file_that_vanishes_or_shrinks_after_its_header(tmp_path: Path) -> None:
    path = damaged(tmp_path, lambda raw: raw)
    entry = read_header(path).entries["b"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SurroundingsError, match="became shorter while it was read"):
        read_tensor(entry)
    path.unlink()
    with pytest.raises(SurroundingsError, match="cannot be read: No such file or directory"):
        read_tensor(entry)
    with pytest.raises(SurroundingsError, match=r"model\.safetensors` is missing"):
        read_header(path)
