"""The exported folder: loads, links what did not change, same bytes each time, nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moecli.core.errors import SurroundingsError
from moecli.io import durable, tensorfile
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.io.writer import export_folder
from tests.io.toys import CONFIG, make_folder, numbered, toy_facts

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> FolderCheckpoint:
    shards = [
        numbered(["layers.0.a", "layers.0.b"]),
        numbered(["layers.1.a", "layers.1.b"]),
        numbered(["norm"]),
    ]
    side = {"tokenizer.json": "{}", "README.md": "no", "LICENSE": "free"}
    return FolderCheckpoint(make_folder(tmp_path / "source", shards, side_files=side), toy_facts)


@pytest.fixture
def changed(tmp_path: Path, source: FolderCheckpoint) -> OverlayCheckpoint:
    """The middle shard changes: one tensor is rewritten, one dropped, one renamed in."""
    with OverlayWriter(tmp_path / "overlay", source, CONFIG | {"num_experts": 2}) as out:
        out.part("p", lambda part: (
            part.put("layers.1.a", torch.full((2, 2), 9.0, dtype=torch.bfloat16)),
            part.drop("layers.1.b", "pruned"),
            part.rename("layers.1.c", "layers.0.a"),
        ))  # fmt: skip
    return out.checkpoint


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_unchanged_shards_are_linked_and_the_rest_is_written(
    tmp_path: Path, source: FolderCheckpoint, changed: OverlayCheckpoint
) -> None:
    export = export_folder(changed, tmp_path / "model")
    one, two, three = export.files
    assert export.linked == (one, three)
    assert inode(tmp_path / "model" / one) == inode(source.files[0])
    assert inode(tmp_path / "model" / three) == inode(source.files[2])
    assert load_file(tmp_path / "model" / two).keys() == {"layers.1.a", "layers.1.c"}
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["weight_map"] == {
        "layers.0.a": one, "layers.0.b": one, "layers.1.a": two, "layers.1.c": two, "norm": three,
    }  # fmt: skip
    assert index["metadata"]["total_size"] == export.tensor_bytes == 32 * 4 + 8
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "LICENSE", "config.json", *export.files, INDEX, "tokenizer.json",
    ]  # fmt: skip


def test_the_export_reads_as_the_checkpoint(tmp_path: Path, changed: OverlayCheckpoint) -> None:
    export_folder(changed, tmp_path / "model")
    back = FolderCheckpoint(tmp_path / "model", toy_facts)
    assert back.names() == changed.names()
    assert all(torch.equal(back.get(name), changed.get(name)) for name in changed.names())
    assert all(back.spec(name) == changed.spec(name) for name in changed.names())
    assert back.config == CONFIG | {"num_experts": 2}


def test_a_file_with_more_in_it_is_not_linked(tmp_path: Path, source: FolderCheckpoint) -> None:
    with OverlayWriter(tmp_path / "o", source) as out:
        out.part("p", lambda part: part.drop("norm", "x"))
        out.part("q", lambda part: part.rename("layers.1.a", "layers.1.b"))
    export = export_folder(out.checkpoint, tmp_path / "model")
    assert export.linked == ("model-00001-of-00002.safetensors",)


def test_a_copy_where_links_are_not_possible(
    tmp_path: Path, source: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*paths: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    export_folder(source, tmp_path / "model")
    for path in source.files:
        copy = tmp_path / "model" / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert inode(copy) != inode(path)


def test_links_follow_the_hub_cache_to_its_blobs(tmp_path: Path, source: FolderCheckpoint) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    export_folder(FolderCheckpoint(snapshot, toy_facts), tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        assert not path.is_symlink()
    assert inode(tmp_path / "model" / source.files[0].name) == inode(source.files[0])


def test_shards_by_size(tmp_path: Path, source: FolderCheckpoint) -> None:
    with OverlayWriter(tmp_path / "o", source) as out:
        out.part("p", lambda part: [part.put(name, torch.zeros(4, 2)) for name in source.names()] and None)
    sizes = {}
    for limit in (32, 64, 95, 96, 10**9):
        export = export_folder(out.checkpoint, tmp_path / "model", max_shard_bytes=limit)
        sizes[limit] = [len(load_file(tmp_path / "model" / name)) for name in export.files]
    assert sizes == {32: [1, 1, 1, 1, 1], 64: [2, 2, 1], 95: [2, 2, 1], 96: [3, 2], 10**9: [5]}
    assert export.files == ("model.safetensors",)
    assert not (tmp_path / "model" / INDEX).exists()


def test_two_exports_have_the_same_bytes(tmp_path: Path, changed: OverlayCheckpoint) -> None:
    export_folder(changed, tmp_path / "one", max_shard_bytes=39)
    export_folder(changed, tmp_path / "two", max_shard_bytes=39)
    assert len(hashes(tmp_path / "one")) == 8
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_config_extra_files_and_progress(tmp_path: Path, changed: OverlayCheckpoint) -> None:
    seen: list[tuple[int, int]] = []
    config = {"zeta": 1, "alpha": "ü"}
    extra = {"tokenizer.json": "mine", "README.md": "card", "code/model.py": "pass"}
    export = export_folder(
        changed,
        tmp_path / "model",
        config,
        extra_files=extra,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (tmp_path / "model" / "config.json").read_text() == '{\n  "zeta": 1,\n  "alpha": "ü"\n}\n'
    assert {name: (tmp_path / "model" / name).read_text() for name in extra} == extra
    assert seen[-1] == (export.tensor_bytes, export.tensor_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_older_export_is_replaced(tmp_path: Path, source: FolderCheckpoint, changed: OverlayCheckpoint) -> None:
    export_folder(source, tmp_path / "model")
    (tmp_path / "model" / "stale.json").write_text("{}")
    export_folder(changed, tmp_path / "model")
    assert FolderCheckpoint(tmp_path / "model", toy_facts).names() == changed.names()
    assert not (tmp_path / "model" / "stale.json").exists()
    assert source.get("layers.1.b").tolist() == [[1, 1]] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "overlay", "source"]


def test_an_export_cut_off_between_its_renames_is_put_right(tmp_path: Path, source: FolderCheckpoint) -> None:
    export_folder(source, tmp_path / "model")
    before = hashes(tmp_path / "model")
    os.rename(tmp_path / "model", tmp_path / "model.old")
    shutil.copytree(tmp_path / "model.old", tmp_path / "model.partial")
    export_folder(source, tmp_path / "model")
    assert hashes(tmp_path / "model") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


def fail_in_the_second_tensor(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    whole, calls = tensorfile._write_all, []

    def write(file: object, data: memoryview) -> None:
        calls.append(data)
        if len(calls) == 3:
            raise error
        whole(file, data)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorfile, "_write_all", write)


def test_failure_leaves_the_older_export_and_nothing_else(
    tmp_path: Path, source: FolderCheckpoint, changed: OverlayCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_folder(source, tmp_path / "model")
    before = hashes(tmp_path / "model")
    fail_in_the_second_tensor(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SurroundingsError, match=r"needs [\d.e-]+ GiB, [\d.]+ GiB free"):
        export_folder(changed, tmp_path / "model")
    assert hashes(tmp_path / "model") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "overlay", "source"]


def test_failure_of_a_first_export_leaves_nothing(
    tmp_path: Path, changed: OverlayCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_the_second_tensor(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        export_folder(changed, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overlay", "source"]


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, changed: OverlayCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=30)
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SurroundingsError, match=rf"`{tmp_path}/a/model` needs 3\.7e-08 GiB, 2\.8e-08 GiB free"):
        export_folder(changed, tmp_path / "a" / "model")
    assert not (tmp_path / "a").exists()


def test_what_is_not_replaced(tmp_path: Path, source: FolderCheckpoint, changed: OverlayCheckpoint) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(SurroundingsError, match=r"home` holds something that is no model; it is not replaced"):
        export_folder(changed, tmp_path / "home")
    with pytest.raises(SurroundingsError, match=r"thesis\.txt` is a file, the checkpoint needs a folder"):
        export_folder(changed, tmp_path / "home" / "thesis.txt")
    with pytest.raises(SurroundingsError, match=r"source` is what the checkpoint is read from; it is not replaced"):
        export_folder(changed, source.folder)
    (tmp_path / "empty").mkdir()
    assert export_folder(changed, tmp_path / "empty").folder == tmp_path / "empty"
