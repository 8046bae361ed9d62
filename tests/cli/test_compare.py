"""`moecli eval` and `moecli compare` over runs of a toy model, from the command line to the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecli.cli import main
from tests.runner import small_runs

Ask = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated on `pets`, with its source."""
    folder = tmp_path_factory.mktemp("compare")
    small_runs.furnish(folder, tiny_model("qwen3_moe"))
    (folder / "r.yaml").write_text(small_runs.RECIPE + small_runs.TASK.replace("limit: 4", "limit: 12"))
    return folder


@pytest.fixture
def ask(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """`ask("compare", "a", "b", code=2)` -> (stdout, stderr)"""
    monkeypatch.chdir(folder)

    def call(*argv: str, code: int = 0) -> tuple[str, str]:
        got = main.run(list(argv))
        out, err = capsys.readouterr()
        assert (got, "Traceback" in err) == (code, False), err
        return out, err

    return call


def started(run: Path) -> list[str]:
    return [event["stage"] for event in small_runs.events(run) if event["event"] == "stage_started"]


def test_a_run_is_compared_with_its_source_which_is_evaluated_once(folder: Path, ask: Ask) -> None:
    run = folder / "runs/r"
    ask("run", "r.yaml", "--device", "cpu", "-q")
    ask("run", "r.yaml", "--device", "cpu", "-q", "--set", "stages.1.with.keep=6")
    ask("run", "r.yaml", "--device", "cpu", "-q")
    done = started(run)
    assert (done.count("eval/lm-eval (source)"), done.count("eval/lm-eval")) == (1, 2)

    document = json.loads(ask("compare", "runs/r", "--json")[0])
    (row,) = document["rows"]
    found = row["paired"]
    assert (row["task"], row["metric"], found["items"]) == ("pets", "acc", 12)
    assert row["after"] - row["before"] == pytest.approx((found["gained"] - found["lost"]) / 12) == found["estimate"]

    reported = json.loads((run / "report/report.json").read_text())["metrics"]
    assert [one["paired"] for one in reported] == [found]
    notes = [
        note for stage in json.loads((run / "report/report.json").read_text())["stages"] for note in stage["notes"]
    ]
    assert any(note.startswith("with `limit` a task has 12 documents") for note in notes)
    page = (run / "report/report.md").read_text()
    assert "| 95 % interval | lost | gained | p |" in page
    assert (run / "report/eval-lm-eval/samples_pets.jsonl").read_text().count("\n") == 12
    assert (run / "report/eval-lm-eval-source/results.json").is_file()


def test_the_text_names_both_sides_and_explains_its_columns(ask: Ask) -> None:
    out, _ = ask("compare", "runs/r")
    assert out.startswith("A  runs/r (source)\nB  runs/r\n")
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("pets")] == [["pets", "acc", "↑"]]
    assert "p is McNemar's exact test" in out


def test_a_folder_is_evaluated_and_compares_with_the_run_that_made_it(ask: Ask) -> None:
    """The model in memory and the model read back give the same answers."""
    options = ("--tasks", "pets", "--include", "data", "--device", "cpu", "-q")
    ask("eval", "runs/r/model", *options, "--limit", "12", "--json")
    document = json.loads(ask("compare", "runs/r", "runs/eval-r", "--json")[0])
    found = document["rows"][0]["paired"]
    assert (found["lost"], found["gained"], found["p"]) == (0, 0, 1.0)
    ask(
        "eval",
        "runs/r/model",
        *options,
        "--limit",
        "8",
        "--batch-size",
        "3",
        "--max-length",
        "64",
        "--run-dir",
        "other",
    )
    _, err = ask("compare", "runs/r", "other", code=2)
    for said in ("`limit` is 12 in A and 8 in B", "`batch_size` is 16 in A and 3 in B", "`max_length` is "):
        assert said in err
    assert "hint: evaluate one of them again with the settings of the other" in err


def test_lm_evals_own_folder_is_a_side(ask: Ask) -> None:
    """What lies beside the report is what lm-eval's command would write."""
    out, _ = ask("compare", "runs/r", "runs/r/report/eval-lm-eval", "--json")
    document = json.loads(out)
    assert (document["rows"][0]["paired"]["lost"], document["rows"][0]["paired"]["gained"]) == (0, 0)
    unknown = "could not be checked, as B does not record it: `device`, `torch`, `backend`, `batch_size`, `tokenizer`"
    assert document["notes"] == [unknown]


@pytest.mark.parametrize(
    ("sides", "code", "message"),
    [
        (("nowhere", "runs/r"), 2, "there is no `nowhere`"),
        (("data", "runs/r"), 2, "`data` holds no evaluation"),
        (("data",), 2, "`data` is not a run, so it needs a second side"),
    ],
)
def test_what_is_no_evaluation(ask: Ask, sides: tuple[str, ...], code: int, message: str) -> None:
    assert message in ask("compare", *sides, code=code)[1]


def test_an_unfinished_run_says_how_to_go_on(folder: Path, ask: Ask) -> None:
    manifest = folder / "runs/r/manifest.json"
    manifest.rename(manifest.with_suffix(".away"))
    try:
        _, err = ask("compare", "runs/r", code=3)
    finally:
        manifest.with_suffix(".away").rename(manifest)
    assert "the run `runs/r` did not finish: it has no manifest.json" in err
    assert "`moecli run runs/r/recipe.yaml --run-dir runs/r` goes on with it" in err
