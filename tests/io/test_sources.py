"""Where models come from. Nothing here needs a network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from moecli.core.errors import SurroundingsError
from moecli.io import sources
from moecli.io.reader import digest
from moecli.io.sources import digest_path, resolve, resolve_config
from tests.io.toys import CONFIG, make_folder, numbered

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_local_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", numbered(["a", "b"]))
    source = resolve(str(folder))
    assert (source.kind, source.folder, source.revision) == ("folder", folder, None)
    assert source.digest == digest(folder)
    sketch = resolve_config(str(folder))
    assert sketch.digest == source.digest
    assert sketch.config == CONFIG
    assert {name: spec.shape for name, spec in sketch.specs.items()} == {"a": (4, 2), "b": (4, 2)}


def test_demo_is_package_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "moecli"
    make_folder(package / "demo" / "model", numbered(["a"]))
    monkeypatch.setattr(sources.importlib.resources, "files", lambda name: package)
    source = resolve("demo")
    assert (source.name, source.kind, source.folder) == ("demo", "demo", package / "demo" / "model")
    assert resolve_config("demo").digest == source.digest


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("demmo", r"there is no model folder `demmo`, and it is no hub id", "did you mean `demo`?"),
        ("./nothing/here", r"there is no model folder `\./nothing/here`", None),
        ("a/b/c", r"there is no model folder `a/b/c`", None),
    ],
)
def test_no_such_model(model: str, message: str, hint: str | None) -> None:
    with pytest.raises(SurroundingsError, match=message) as caught:
        resolve(model)
    assert caught.value.hint == hint


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(SurroundingsError, match=r"is a file, a model is a folder") as caught:
        resolve(str(tmp_path / "model.safetensors"))
    assert caught.value.hint == f"`{tmp_path}`"


def test_offline_without_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for call in (resolve, resolve_config):
        with pytest.raises(SurroundingsError, match=r"`org/none` is not in the hub's cache .* \(offline\)") as caught:
            call("org/none", offline=True)
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("`hf download org/none`")


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append(options)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / COMMIT, numbered(["a"]))
    calls = fake_hub(monkeypatch, folder)
    source = resolve("org/name", revision="main")
    assert (source.kind, source.folder, source.revision) == ("hub", folder, COMMIT)
    assert source.digest == hashlib.sha256(f"hub org/name {COMMIT}".encode()).hexdigest()
    assert "*.safetensors" in calls[0]["allow_patterns"] and "*.bin" not in calls[0]["allow_patterns"]
    sketch = resolve_config("org/name")
    assert "*.safetensors" not in calls[1]["allow_patterns"]
    assert (sketch.digest, sketch.revision, list(sketch.specs)) == (source.digest, COMMIT, ["a"])


def test_plan_of_a_hub_model_whose_weights_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / COMMIT, numbered(["a"]))
    (folder / "model.safetensors").unlink()
    fake_hub(monkeypatch, folder)
    assert resolve_config("org/name", offline=True).specs == {}
    assert resolve_config("org/name", offline=True).config == CONFIG


class Response:
    """As much of an HTTP answer as the hub's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (errors.GatedRepoError, r"`org/name` is gated: its licence must be accepted", "`hf auth login`"),
        (
            errors.RepositoryNotFoundError,
            r"the hub has no model `org/name`, or it is private",
            "`hf auth login`",
        ),
        (errors.RevisionNotFoundError, r"`org/name` has no revision `v9`", None),
        (
            errors.HfHubHTTPError,
            r"`org/name` cannot be fetched: boom$",
            "`hf download org/name --revision v9` where",
        ),
    ],
)
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, error: Any, message: str, hint: str | None) -> None:
    fake_hub(monkeypatch, error("boom.\nmore", response=Response()))
    with pytest.raises(SurroundingsError, match=message) as caught:
        resolve("org/name", revision="v9", offline=False)
    assert (caught.value.hint or "").startswith(hint or "")
    assert (caught.value.hint is None) == (hint is None)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, errors.LocalEntryNotFoundError("no"))
    with pytest.raises(SurroundingsError, match=r"at revision `v9` is not in .* \(the hub cannot be reached\)"):
        resolve("org/name", revision="v9", offline=False)


class TestDigestPath:
    def test_file_and_folder(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        (data / "sub").mkdir(parents=True)
        (data / "a.txt").write_text("hello")
        (data / "sub" / "b.txt").write_text("x")
        assert digest_path(data / "a.txt") == hashlib.sha256(b"hello").hexdigest()
        before = digest_path(data)
        data.rename(tmp_path / "moved")
        assert digest_path(tmp_path / "moved") == before
        (tmp_path / "moved" / "sub" / "b.txt").rename(tmp_path / "moved" / "sub" / "c.txt")
        assert digest_path(tmp_path / "moved") != before

    def test_a_changed_file_is_read_again_an_unchanged_one_is_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text("one")
        first = digest_path(path)
        path.write_text("other")
        second = digest_path(path)
        assert first != second
        monkeypatch.setattr(sources.hashlib, "file_digest", lambda *args: pytest.fail("read again"))
        assert digest_path(path) == second

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(SurroundingsError, match=r"`.*/none\.jsonl` does not exist"):
            digest_path(tmp_path / "none.jsonl")
