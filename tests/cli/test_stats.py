"""`moecli stats`: what it shows, merges and compares, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.cli import main
from moecli.cli.stats import load
from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.io.store import RunFolder, save_artifact

Answer = Callable[..., Any]
SOURCE = {"dataset": "demo", "samples": 4, "model": "abc", "model_type": "toy", "dtype": "float32", "digest": "t1"}


def toy(counts: list[list[int]], digest: str = "t1", scale: float = 1.0) -> CalibrationStats:
    """Two experts of three; sums grow with `scale`."""
    layers = {}
    for layer, count in enumerate(counts):
        value = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) * scale
        extra = {"absmax": value.float(), "y_mean": value[:, None] * torch.tensor([3.0, 4.0], dtype=torch.float64)}
        layers[layer] = LayerStats(sum(count) // 2, torch.tensor(count), value, extra)
    return CalibrationStats(layers, SOURCE | {"digest": digest})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`a` and `b`: two halves; `run`: a run folder that calibrated `a`."""
    monkeypatch.chdir(tmp_path)
    save_artifact(tmp_path, "a", toy([[4, 0, 6], [5, 2, 3]]))
    save_artifact(tmp_path, "b", toy([[1, 2, 3], [2, 2, 2]], "t2", 3.0))
    stage = RunFolder(tmp_path / "run").stage("calibrate/statistics", "0" * 64)
    stage.begin()
    stage.save(toy([[4, 0, 6], [5, 2, 3]]))
    stage.finish({})
    return tmp_path


@pytest.fixture
def answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """`answer("show", "run")` -> stdout; `as_json=True` -> the document. The exit code must be `code`."""

    def ask(*argv: str, as_json: bool = False, code: int = 0) -> Any:
        got = main.run(["stats", *argv, *(["--json"] if as_json else [])])
        out, err = capsys.readouterr()
        assert (got, "Traceback" in err) == (code, False), err
        return json.loads(out) if as_json else out

    return ask


def same(first: CalibrationStats, second: CalibrationStats) -> bool:
    a, b = first.pack().tensors, second.pack().tensors
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_show_coverage(answer: Answer) -> None:
    document = answer("show", "run", as_json=True)
    assert document["source"]["dataset"] == "demo"
    first = document["layers"][0]
    numbers = {k: first[k] for k in ("layer", "tokens", "experts", "unused", "fewest", "median", "most")}
    assert numbers == {"layer": 0, "tokens": 5, "experts": 3, "unused": 1, "fewest": 0, "median": 4, "most": 6}
    kinds = {s["name"]: (s["dtype"], s["shape"], s["combines"]) for s in first["statistics"]}
    assert kinds["y_mean"] == ("float64", [3, 2], "sum")
    text = answer("show", "run")
    assert [line.split() for line in text.splitlines()[-2:]] == [list("0531046"), list("1530235")]
    assert ["absmax", "float32", "[3]", "max"] in [line.split() for line in text.splitlines()]


def test_show_one_layer(answer: Answer) -> None:
    document = answer("show", "a.safetensors", "--layer", "1", as_json=True)
    assert document["experts"][2] == {"expert": 2, "count": 3, "gate_sum": 2.0, "absmax": 2.0, "|y_mean|": 10.0}
    text = answer("show", "a.safetensors", "--layer", "1").splitlines()
    assert text[0] == "a.safetensors, layer 1, 5 tokens"
    assert text[2].split() == ["expert", "count", "gate_sum", "|y_mean|", "absmax"]
    assert text[-1].split() == ["2", "3", "2", "10", "2"]


@pytest.mark.parametrize(
    "place", ["run", "run/stages/calibrate-statistics/0000000000000000", "a.safetensors", "a.json"]
)
def test_places(place: str, folder: Path) -> None:
    assert same(load(place), toy([[4, 0, 6], [5, 2, 3]]))


def test_a_part_can_be_shown(answer: Answer, folder: Path) -> None:
    RunFolder("run").parts.part("statistic-absmax-000", CalibrationStats, lambda: toy([[1, 2, 3]]))
    document = answer("show", "run/parts/statistic-absmax-000.safetensors", as_json=True)
    assert [layer["tokens"] for layer in document["layers"]] == [3]


def test_merge(answer: Answer, folder: Path) -> None:
    document = answer("merge", "a.safetensors", "b.safetensors", "-o", "both.safetensors", as_json=True)
    assert (document["path"], document["source"]["samples"]) == ("both.safetensors", 8)
    both = load("both.safetensors")
    assert both[0].tokens == 8
    assert both[0].count_E.tolist() == [5, 2, 9]
    assert both[0].gate_sum_E.tolist() == [2.0, 4.0, 8.0]
    assert both[0]["absmax"].tolist() == [1.5, 3.0, 6.0], "the larger"
    assert both[1]["y_mean"].tolist() == [[6.0, 8.0], [12.0, 16.0], [24.0, 32.0]]
    save_artifact(folder, "c", toy([[1, 1, 0], [0, 1, 1]], "t3"))
    assert "wrote three.safetensors and three.json" in answer(
        "merge", "c.json", "both.safetensors", "--out", "three.safetensors"
    )


def test_diff(answer: Answer) -> None:
    assert answer("diff", "a.safetensors", "run").endswith("every entry is equal\n")
    document = answer("diff", "a.safetensors", "b.safetensors", as_json=True)
    assert not document["equal"]
    assert document["source"] == {"digest": ["t1", "t2"]}
    changes = {(c["layer"], c["name"]): c for c in document["changes"]}
    assert changes[0, "absmax"]["relative"] == pytest.approx(2 / 3)
    assert changes[0, "gate_sum"]["relative"] == pytest.approx(1 - (1 / 5) / (3 / 3))
    assert changes[0, "count"]["expert"] == 1
    text = answer("diff", "a.safetensors", "b.safetensors")
    assert ["0", "absmax", "0.667", "2"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["show", "nowhere"], 2, "there are no statistics in `nowhere`"),
        (["show", "run", "--layer", "7"], 2, "`run` has no layer 7"),
        (["show", "empty"], 2, "`empty` holds no finished calibration"),
        (["show", "other.json"], 3, "`other.json` holds None, expected CalibrationStats"),
        (["merge", "a.json", "b.json", "-o", "both.pt"], 2, "`--out` must end in .safetensors, got `both.pt`"),
        (["merge", "a.json", "b.json", "-o", "a.safetensors"], 2, "`a.safetensors` exists already"),
        (["merge", "a.json", "run", "-o", "c.safetensors"], 2, "both hold the same text (digest t1)"),
        (["merge", "a.json", "thin.json", "-o", "c.safetensors"], 2, "layers differ (0 1 and 0)"),
        (["merge", "a.json", "b.json", "--domains", "-o", "c.safetensors"], 2, "these statistics hold no `easy`"),
        (["diff", "a.json", "thin.json"], 2, "these statistics cannot be compared: layers differ (0 1 and 0)"),
        (["merge", "a.json", "b.json"], 2, "needs `--out`"),
        (["shwo", "a.json"], 2, "unknown command `shwo`"),
    ],
)
def test_refusals(argv: list[str], code: int, message: str, folder: Path, answer: Answer) -> None:
    (folder / "empty").mkdir()
    (folder / "other.json").write_text("{}")
    save_artifact(folder, "thin", toy([[4, 0, 6]], "t9"))
    assert message in answer(*argv, as_json=True, code=code)["error"]
    assert not (folder / "c.safetensors").exists()


def test_two_calibrations_of_one_run(answer: Answer, folder: Path) -> None:
    stage = RunFolder("run").stage("calibrate/statistics", "1" * 64)
    stage.begin()
    stage.save(toy([[1, 1, 1]]))
    stage.finish({})
    problem = answer("show", "run", as_json=True, code=2)["problems"][0]
    assert problem["message"] == "`run` holds 2 finished calibrations"
    assert "`run/stages/calibrate-statistics/1111111111111111`" in problem["hint"]
    for event, digit in (("stage_started", "1"), ("stage_cached", "0"), ("stage_started", "2")):
        RunFolder("run").append_event({"event": event, "key": digit * 64})
    assert answer("show", "run", as_json=True)["layers"][0]["most"] == 6, "what the run used last"


def test_help(answer: Answer) -> None:
    assert "  merge " in answer()
    for command in ("show", "merge", "diff"):
        assert "--json" in answer(command, "--help")


def test_clean_keeps_shared_parts_with_the_statistics(
    answer: Answer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder("run")
    (folder / "run" / "recipe.yaml").write_text("recipe: 1\n")
    run.parts.part("statistic-absmax-000", CalibrationStats, lambda: toy([[1, 2, 3]]))
    assert main.run(["clean", "run", "--keep-stats"]) == 0
    assert run.parts.has("statistic-absmax-000") and len(list(run.stages())) == 1
    size = run.parts.bytes()
    capsys.readouterr()
    assert main.run(["clean", "run", "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert removed[-1] == {"stage": "shared parts", "key": "", "bytes": size}
    assert not run.parts.path.exists() and not list(run.stages())
