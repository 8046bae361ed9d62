"""Overlays against a plain dict, resume after a crash, and every broken promise."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecli.core.artifacts import PartWriter
from moecli.core.errors import SurroundingsError
from moecli.io import overlay as overlay_module
from moecli.io.durable import natural_key
from moecli.io.overlay import Fate, OverlayCheckpoint, OverlayWriter, fates
from moecli.io.reader import FolderCheckpoint, StoredCheckpoint
from tests.io.toys import CONFIG, make_folder, numbered, toy_facts

Write = Callable[[PartWriter], None]
ONE = torch.ones(1)


@pytest.fixture
def source(tmp_path: Path) -> FolderCheckpoint:
    return FolderCheckpoint(make_folder(tmp_path / "source", numbered(["a", "b", "c", "d"])), toy_facts)


def overlay(folder: Path, parent: StoredCheckpoint, *writes: Write, config: dict | None = None) -> OverlayCheckpoint:
    with OverlayWriter(folder, parent, config) as out:
        for number, write in enumerate(writes):
            out.part(f"part-{number}", write)
    return out.checkpoint


class Model:
    """The oracle: a checkpoint as a dict, and where each tensor came from."""

    def __init__(self, tensors: dict[str, Tensor], origins: dict[str, tuple[str, str]]) -> None:
        self.tensors, self.origins = tensors, origins


def random_layer(dice: random.Random, model: Model) -> tuple[Model, list[Write]]:
    """One to three parts that put, rename and drop over disjoint names, and what the dict says comes out."""
    names = sorted(model.tensors)
    targets = dice.sample(sorted({*names, *(f"new.{i}" for i in range(6))}), k=dice.randint(1, 8))
    tensors, origins = dict(model.tensors), dict(model.origins)
    parts: list[list[Write]] = [[] for _ in range(dice.randint(1, 3))]
    for name in targets:
        action = dice.choice(["put", "rename", "drop"])
        if action == "drop" and name in names:
            del tensors[name], origins[name]
            write: Write = lambda part, name=name: part.drop(name, f"no {name}")  # noqa: E731
        elif action == "rename" and names:
            parent_name = dice.choice(names)
            tensors[name], origins[name] = model.tensors[parent_name], model.origins[parent_name]
            write = lambda part, name=name, parent_name=parent_name: part.rename(name, parent_name)  # noqa: E731
        else:
            value = torch.rand(dice.randint(1, 3), 2)
            tensors[name], origins[name] = value, ("own", name)
            write = lambda part, name=name, value=value: part.put(name, value)  # noqa: E731
        dice.choice(parts).append(write)
    return Model(tensors, origins), [lambda part, ws=ws: [w(part) for w in ws] and None for ws in parts]


@pytest.mark.parametrize("seed", range(40))
def test_chains_agree_with_a_dict(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    tensors = numbered([f"layers.{i}.w" for i in (1, 2, 10, 11)] + ["embed"])
    top: StoredCheckpoint = FolderCheckpoint(make_folder(tmp_path / "source", tensors), toy_facts)
    model = Model(tensors, {name: ("source", name) for name in tensors})
    for depth in range(dice.randint(1, 4)):
        model, writes = random_layer(dice, model)
        overlay(tmp_path / f"overlay-{depth}", top, *writes)
        top = OverlayCheckpoint(tmp_path / f"overlay-{depth}", top)
        assert list(top.names()) == sorted(model.tensors, key=natural_key)
        for name, value in model.tensors.items():
            assert name in top
            assert torch.equal(top.get(name), value)
            assert torch.equal(top.rows(name, 1, len(value)), value[1:])
            assert top.spec(name).shape == tuple(value.shape)
            assert top.origin(name) == model.origins[name]
        kept = {underlying for kind, underlying in model.origins.values() if kind == "source"}
        found = fates(top)
        assert list(found) == list(top.source.names())
        assert {name for name, fate in found.items() if fate.verb == "kept"} == kept


def test_what_an_overlay_says_of_itself(tmp_path: Path, source: FolderCheckpoint) -> None:
    def write(part: PartWriter) -> None:
        part.put("a", torch.ones(2))
        part.rename("b", "c")
        part.drop("c", "pruned: used least")

    top = overlay(tmp_path / "o", source, write, config=CONFIG | {"num_experts": 3})
    assert top.names() == ("a", "b", "d")
    assert (top.written(), top.renamed(), top.dropped()) == (("a",), {"b": "c"}, {"c": "pruned: used least"})
    assert (top.facts.experts, source.facts.experts) == (3, 4)
    assert top.source is source
    assert fates(top) == {
        "a": Fate("rewritten", "a"), "b": Fate("displaced", "c"),
        "c": Fate("kept", "b"), "d": Fate("kept", "d"),
    }  # fmt: skip
    again = overlay(tmp_path / "p", top, lambda part: part.drop("b", "gone"))
    assert fates(again)["c"] == Fate("dropped", "gone")
    assert again.config["num_experts"] == 3
    with pytest.raises(KeyError, match="has no tensor `c`"):
        top.get("c")
    with pytest.raises(TypeError, match="passed on as its folder"):
        top.pack()


def test_only_changes_are_on_disk(tmp_path: Path, source: FolderCheckpoint) -> None:
    overlay(tmp_path / "o", source, lambda part: part.put("a", torch.ones(2)), lambda part: part.drop("b", "x"))
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "overlay.json", "part-0.json", "part-0.safetensors", "part-1.json",
    ]  # fmt: skip
    record = json.loads((tmp_path / "o" / "part-1.json").read_text())
    assert record == {"tensors": None, "renames": {}, "drops": {"b": "x"}}


def test_bytes_are_the_same_each_time(tmp_path: Path, source: FolderCheckpoint) -> None:
    def write(part: PartWriter) -> None:
        for name in ("z", "a", "m"):
            part.put(name, torch.arange(6.0).reshape(2, 3).T)
        part.rename("b", "c")

    overlay(tmp_path / "one", source, write)
    overlay(tmp_path / "two", source, write)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_put_copies_views_and_shared_memory(tmp_path: Path, source: FolderCheckpoint) -> None:
    big = torch.arange(8.0).reshape(4, 2)

    def write(part: PartWriter) -> None:
        part.put("a", big[1:3])
        part.put("b", big)
        part.put("c", big)
        big[1:3] = -1
        part.put("d", torch.nn.Parameter(torch.ones(1)))

    top = overlay(tmp_path / "o", source, write)
    assert top.get("a").tolist() == [[2, 3], [4, 5]]
    assert top.get("c").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


class Crash(Exception):
    pass


def test_a_crash_resumes_after_the_last_whole_part(tmp_path: Path, source: FolderCheckpoint) -> None:
    calls: list[str] = []

    def program(crash: bool) -> OverlayCheckpoint:
        def first(part: PartWriter) -> None:
            calls.append("first")
            part.put("a", torch.ones(2))

        def second(part: PartWriter) -> None:
            calls.append("second")
            part.drop("b", "x")
            if crash:
                raise Crash

        with OverlayWriter(tmp_path / "o", source) as out:
            out.part("first", first)
            assert out.has_part("first")
            out.part("second", second)
        return out.checkpoint

    with pytest.raises(Crash):
        program(crash=True)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["first.json", "first.safetensors"]
    with pytest.raises(SurroundingsError, match=r"overlay\.json` is missing"):
        OverlayCheckpoint(tmp_path / "o", source)
    top = program(crash=False)
    assert calls == ["first", "second", "second"]
    assert top.get("a").tolist() == [1, 1]
    assert "b" not in top
    program(crash=True)
    assert calls == ["first", "second", "second"]


def test_a_part_can_be_read_as_soon_as_it_is_written(
    tmp_path: Path, source: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved behind the stage's back: who reads it waits for that."""
    save = overlay_module._Part.save

    def slowly(self: PartWriter, *where: object) -> None:
        time.sleep(0.2)
        save(self, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(overlay_module._Part, "save", slowly)
    with OverlayWriter(tmp_path / "o", source, None) as out:
        out.part("one", lambda part: part.put("x", torch.arange(3)))
        assert {name: value.tolist() for name, value in out.read_part("one").items()} == {"x": [0, 1, 2]}


def test_parts_are_saved_side_by_side_but_not_all_at_once(
    tmp_path: Path, source: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, now, most, lock = overlay_module._Part.save, 0, 0, threading.Lock()

    def slowly(self: PartWriter, *where: object) -> None:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.1)
        save(self, *where)  # type: ignore[arg-type]
        with lock:
            now -= 1

    monkeypatch.setattr(overlay_module._Part, "save", slowly)
    seen: list[int] = []
    with OverlayWriter(tmp_path / "o", source, None) as out:
        for index in range(6):

            def write(part: PartWriter, index: int = index) -> None:
                seen.append(len(out._saving))
                part.put(f"x{index}", torch.tensor([index]))

            out.part(f"part-{index}", write)
    assert most == overlay_module.SAVERS and max(seen) == overlay_module.SAVERS
    assert [out.checkpoint.get(f"x{index}").item() for index in range(6)] == list(range(6))


def test_a_part_that_could_not_be_saved_is_told_soon(
    tmp_path: Path, source: FolderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: PartWriter, folder: Path, name: str) -> None:
        raise SurroundingsError("no space left")

    monkeypatch.setattr(overlay_module._Part, "save", fails)
    made = 0
    with (
        pytest.raises(SurroundingsError, match="no space left"),
        OverlayWriter(tmp_path / "o", source, None) as out,
    ):
        for index in range(9):
            out.part(f"part-{index}", lambda part: part.put("x", ONE.clone()))
            made += 1
    assert made <= overlay_module.SAVERS
    assert not (tmp_path / "o" / "overlay.json").exists()


def test_a_part_whose_record_is_missing_is_made_again(tmp_path: Path, source: FolderCheckpoint) -> None:
    overlay(tmp_path / "o", source, lambda part: part.put("a", torch.zeros(2)))
    (tmp_path / "o" / "part-0.json").unlink()
    top = overlay(tmp_path / "o", source, lambda part: part.put("a", torch.ones(2)))
    assert top.get("a").tolist() == [1, 1]


def test_parts_nobody_asked_for_do_not_count(tmp_path: Path, source: FolderCheckpoint) -> None:
    overlay(tmp_path / "o", source, lambda part: part.drop("a", "x"), lambda part: part.drop("b", "x"))
    top = overlay(tmp_path / "o", source, lambda part: part.drop("a", "x"))
    assert top.names() == ("b", "c", "d")


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([lambda p: (p.put("a", ONE), p.put("a", ONE))], r"`a` is written twice, or once and something else"),
        ([lambda p: (p.rename("a", "b"), p.put("a", ONE))], r"`a` is renamed to twice, or once and"),
        ([lambda p: (p.drop("a", "x"), p.rename("a", "b"))], r"`a` is dropped twice, or once and"),
        ([lambda p: p.rename("z", "y")], r"`z` cannot be renamed from `y`: the parent has no such tensor"),
        ([lambda p: p.drop("y", "x")], r"`y` cannot be dropped: the parent has no such tensor"),
        ([lambda p: p.drop("a", "x"), lambda p: p.put("a", ONE)], r"`a` is in part `part-0` and in part `"),
        ([lambda p: p.rename("n", "a"), lambda p: p.rename("n", "b")], r"`n` is in part `part-0` and in"),
    ],
)  # fmt: skip
def test_broken_contract(tmp_path: Path, source: FolderCheckpoint, writes: list[Write], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(tmp_path / "o", source, *writes)
    assert not (tmp_path / "o" / "overlay.json").exists()


def test_part_names(tmp_path: Path, source: FolderCheckpoint) -> None:
    with OverlayWriter(tmp_path / "o", source) as out:
        with pytest.raises(ValueError, match="`a/b` cannot be used as a file name"):
            out.part("a/b", lambda part: None)
        with pytest.raises(ValueError, match="there is a part `overlay` already"):
            out.part("overlay", lambda part: None)
        out.part("x", lambda part: None)
        with pytest.raises(ValueError, match="there is a part `x` already"):
            out.part("x", lambda part: None)


def test_another_parent_is_noticed(tmp_path: Path, source: FolderCheckpoint) -> None:
    overlay(tmp_path / "o", source, lambda part: part.rename("n", "a"))
    other = FolderCheckpoint(make_folder(tmp_path / "other", numbered(["b"])), toy_facts)
    with pytest.raises(SurroundingsError, match=r"does not fit its parent: part `part-0` refers to `a`"):
        OverlayCheckpoint(tmp_path / "o", other)


def test_damage_says_which_stage_to_redo(tmp_path: Path, source: FolderCheckpoint) -> None:
    folder = tmp_path / "runs" / "x" / "stages" / "merge-weighted" / "0123"
    overlay(folder, source, lambda part: part.put("a", torch.ones(2)))
    run = tmp_path / "runs" / "x"
    hint = f"`moecli run {run}/recipe.yaml --run-dir {run} --redo merge/weighted` makes it again"
    tensors = folder / "part-0.safetensors"
    whole = tensors.read_bytes()
    for content, message in [(whole[:-1], "is cut short"), (b"", "is not a safetensors file")]:
        tensors.write_bytes(content)
        with pytest.raises(SurroundingsError, match=message) as caught:
            OverlayCheckpoint(folder, source)
        assert caught.value.hint == hint
    tensors.write_bytes(whole)
    (folder / "part-0.json").write_text("{}")
    with pytest.raises(SurroundingsError, match=r"part-0\.json` is not the record of an overlay part") as caught:
        OverlayCheckpoint(folder, source)
    assert caught.value.hint == hint
    (folder / "overlay.json").write_text("{}")
    with pytest.raises(SurroundingsError, match=r"overlay\.json` does not describe an overlay"):
        OverlayCheckpoint(folder, source)
