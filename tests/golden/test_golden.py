"""Broken recipes and the whole answer to each. `make golden` rewrites the answers; review reads the diff."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    cases.make_model(folder / "tiny")
    return folder


@pytest.mark.parametrize("name", cases.names())
def test_answer(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    expected = (cases.HERE / f"{name}.txt").read_text(encoding="utf-8")
    assert cases.answer(name, folder) == expected


def test_every_answer_is_for_a_person() -> None:
    """It says where; no traceback, no bug, no words of the libraries below."""
    assert len(cases.names()) >= 40
    for name in cases.names():
        text = (cases.HERE / f"{name}.txt").read_text(encoding="utf-8")
        assert text.startswith("error: "), name
        assert "\n  --> " in text or "\n --> " in text or "\n   --> " in text, name
        assert text.endswith("exit 2\n"), name
        for word in ("Traceback", "bug in moecli", "pydantic", "Input should", "yaml.", "validation error"):
            assert word not in text, (name, word)


def test_no_answer_is_left_over() -> None:
    assert sorted(path.stem for path in cases.HERE.glob("*.txt")) == cases.names()
