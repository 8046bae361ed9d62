"""`moecli analyse` from names to files, on a toy model and on the run that made a smaller one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from moecli.cli.app import app
from moecli.core.errors import UsageError
from moecli.families import facts_of
from moecli.io.reader import FolderCheckpoint
from moecli.runner import analysis
from moecli.runner.export import export
from tests.runner.chains import pruned

Maker = Callable[..., Path]
SMALL = ["--samples", "4", "--tokens-per-sample", "24", "--cache-samples", "4", "--pooled-samples", "2", "-q"]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, step in (("a", 3), ("b", 7)):
        made[name] = tmp_path / f"{name}.jsonl"
        rows = [" ".join(f"w{i * j * step % 37}" for j in range(60)) for i in range(1, 30)]
        made[name].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return made


def analyse(*arguments: Any) -> Any:
    done = CliRunner().invoke(app, ["analyse", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_model_beside_its_source_on_two_texts(tiny_model: Maker, texts: Any, tmp_path: Path) -> None:
    source = FolderCheckpoint(tiny_model("qwen3_moe"), facts_of)
    export(pruned(source, tmp_path / "chain", [0, 2, 3, 5]), tmp_path / "small", "stock")
    out = tmp_path / "out"
    done = analyse(
        tmp_path / "small", "--against", tiny_model("qwen3_moe"), "--data", f"a={texts['a']}", "--data",
        f"b={texts['b']}", "--out", out, "--json", *SMALL,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert document == json.loads((out / "analysis.json").read_text())
    assert document["data"] == {name: str(path) for name, path in texts.items()}
    assert [len(document[side]["layers"]["0"]["count"]) for side in ("base", "model")] == [8, 4]
    digests = [[text["digest"] for text in document[side]["texts"]] for side in ("base", "model")]
    assert digests[0] == digests[1]
    assert (out / "analysis.md").read_text() == analysis.render(document)
    rows = {tuple(row[:2]): row[2:] for row in analysis.cache_rows(document["model"], document["base"])}
    assert {held.rpartition("(")[2] for cells in rows.values() for held in cells} <= {"2)", "4)", "8)"}
    last = [cells for (size, _), cells in rows.items() if size.endswith("(4x)")]
    assert all(cells[1].startswith("1.000") for cells in last)  # eight experts of the base are more than the four left
    pairs = load_file(out / "pairs.safetensors")
    assert pairs["base.coactivation.0"].shape == (8, 8)
    assert pairs["model.transition.1"].shape == (4, 4)


def test_the_answer_names_the_files_and_the_page_says_everything(tiny_model: Maker, texts: Any, tmp_path: Path) -> None:
    done = analyse(tiny_model("qwen3_moe"), "--data", texts["a"], "--out", tmp_path / "out", *SMALL)
    assert f"page           {tmp_path / 'out' / 'analysis.md'}" in done.stdout
    page = (tmp_path / "out" / "analysis.md").read_text()
    for heading in ("In short", "Caches of experts", "Super Experts", "Layers", "Experts that go together"):
        assert f"\n## {heading}\n" in page
    assert "| SRP 4 |" in page
    assert "nan" not in page


def test_a_run_is_its_model_beside_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text("recipe: 1\n")
    with pytest.raises(UsageError, match="has written no model yet"):
        analysis.places(str(tmp_path), None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert analysis.places(str(tmp_path), "other") == (str(tmp_path / "model"), "other")
    report = type("R", (), {"source": type("S", (), {"name": "org/base"})})
    monkeypatch.setattr(analysis, "load_report", lambda folder: report)
    assert analysis.places(str(tmp_path), None) == (str(tmp_path / "model"), "org/base")
    assert analysis.places("org/model", None) == ("org/model", None)


def test_texts_have_one_name_each() -> None:
    assert analysis.named_texts(["wiki=a.jsonl", "b.jsonl"]) == {"wiki": "a.jsonl", "b.jsonl": "b.jsonl"}
    with pytest.raises(UsageError, match="two data sets are called `wiki`"):
        analysis.named_texts(["wiki=a.jsonl", "wiki=b.jsonl"])


def test_models_of_other_vocabularies_are_not_compared(tiny_model: Maker, texts: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model("qwen3_moe"), other)
    monkey = FolderCheckpoint(other, facts_of)
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": monkey.facts.vocab * 2}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="do not share a vocabulary: 256 and 128 tokens"):
        analyse(other, "--against", tiny_model("qwen3_moe"), "--data", texts["a"], "--out", tmp_path / "o", *SMALL)


def test_a_text_is_needed() -> None:
    with pytest.raises(UsageError, match="needs a text to route"):
        analyse("some-model")
