"""What each command answers, as text and as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from moecli.cli import app, doctor, main, show
from moecli.cli.starters import STARTERS
from moecli.core.errors import SurroundingsError
from moecli.io.store import RunFolder
from moecli.runner import execute, lookup
from moecli.runner import open as opening
from moecli.runner.open import load_recipe
from moecli.runner.report import Environment, MetricRow, Report, SizeRecord, SizeSide, SourceRecord, save
from tests.golden import cases

RECIPE = """\
recipe: 1
model: tiny
stages:
  - run: calibrate/statistics
    id: text
    with: {dataset: demo, samples: 4, tokens_per_sample: 64}
  - run: prune/reap
    with: {keep: 8}
  - run: quantize/rtn
"""

Answer = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    cases.make_model(folder / "tiny")
    (folder / "half.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answer:
    """`answer("plan", "half.yaml")` -> stdout; `as_json=True` -> the document. The exit code must be `code`."""
    monkeypatch.chdir(folder)

    def ask(*argv: str, as_json: bool = False, code: int = 0) -> Any:
        got = main.run([*argv, "--json"] if as_json else argv)
        out, err = capsys.readouterr()
        assert (got, "Traceback" in err) == (code, False), err
        return json.loads(out) if as_json else out

    return ask


def test_check(answer: Answer) -> None:
    assert answer("check", "half.yaml") == "half.yaml: 3 stages, no problems\n"
    expected = {"path": "half.yaml", "stages": 3, "exit_code": 0, "problems": []}
    assert answer("check", "half.yaml", as_json=True) == expected


def test_a_model_that_is_not_there(answer: Answer) -> None:
    document = answer("check", "half.yaml", "--set", "model=tinny", as_json=True, code=3)
    assert document["problems"][0]["message"].startswith("there is no model folder `tinny`")


def test_plan(answer: Answer) -> None:
    document = answer("plan", "half.yaml", "--run-dir", "runs/new", as_json=True)
    assert [(s["label"], s["inputs"], s["experts"]) for s in document["steps"]] == [
        ("text", {"model": "source"}, 16),
        ("prune/reap", {"stats": "text", "model": "source"}, 8),
        ("quantize/rtn", {"model": "prune/reap"}, 8),
    ]
    assert {s["state"] for s in document["steps"]} == {"will run"}
    pruned = document["steps"][1]["bytes"]
    assert (
        document["estimate"]["source_bytes"] - pruned == 8 * 3 * cases.WIDTH * cases.HIDDEN * 2 + 8 * cases.HIDDEN * 2
    )
    text = answer("plan", "half.yaml")
    assert "stats = text, model = source" in text and "free" in text


def test_plan_reads_sets(answer: Answer) -> None:
    document = answer("plan", "half.yaml", "--set", "stages.1.with.keep=4", as_json=True)
    assert document["steps"][1]["experts"] == 4


def finished_run(folder: Path) -> Path:
    """A run folder as a finished calibration and a broken-off pruning leave it."""
    plan = show.planned(str(folder / "half.yaml"), [f"model={folder / 'tiny'}"])
    run = RunFolder(folder / "runs" / "done")
    run.write_text("recipe.yaml", RECIPE.replace("tiny", str(folder / "tiny")))
    first, second, _ = plan.steps
    for step in (first, second):
        stage = run.stage(step.folder_name, step.key)
        stage.remove()
        stage.begin()
        (stage.work / "something").write_text("x" * 100)
    made = {"identity": step_identity(first), "seconds": 1.5, "source_sha256": execute.code_digest(first.stage.name)}
    run.stage(first.folder_name, first.key).finish(made)
    return run.path


def step_identity(step: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dict(step.identity)))


def test_status(answer: Answer, folder: Path) -> None:
    run = str(finished_run(folder))
    document = answer("status", run, as_json=True)
    assert [(s["label"], s["state"]) for s in document["steps"]] == [
        ("text", "done"), ("prune/reap", "partial"), ("quantize/rtn", "will run"),
    ]  # fmt: skip
    assert document["model"] is None
    sets = ["--run-dir", run, "--set", f"model={folder / 'tiny'}", "--set", "stages.0.with.samples=8"]
    changed = answer("status", "half.yaml", *sets)
    assert "samples 4 -> 8" in changed and "not written yet" in changed


def test_clean(answer: Answer, folder: Path) -> None:
    run = finished_run(folder)
    would = answer("clean", str(run), "--dry-run", as_json=True)
    assert would["bytes"] >= 200 and would["dry_run"]
    assert {item["stage"] for item in would["removed"]} == {"calibrate/statistics", "prune/reap"}
    assert "prune/reap" in answer("clean", str(run), "--keep-stats")
    assert [stage.name for stage in RunFolder(run).stages()] == ["calibrate/statistics"]
    answer("clean", str(run))
    assert answer("clean", str(run)) == "nothing to drop\n"
    assert (run / "recipe.yaml").exists()


def test_clean_leaves_a_working_run_alone(answer: Answer, folder: Path) -> None:
    run = finished_run(folder)
    with RunFolder(run).lock():
        document = answer("clean", str(run), as_json=True, code=3)
    assert "another run" in document["error"]
    assert len(list(RunFolder(run).stages())) == 2


def test_clean_of_no_run(answer: Answer) -> None:
    assert "not a run folder" in answer("clean", "tiny", as_json=True, code=2)["error"]
    answer("clean", "nowhere", code=3)


def test_methods(answer: Answer) -> None:
    listed = answer("methods", as_json=True)["methods"]
    assert [item["name"] for item in listed] == list(lookup.names())
    assert all(item["summary"] for item in listed)
    only = answer("methods", "prune")
    assert "prune/reap" in only and "quantize/rtn" not in only


def test_one_method(answer: Answer) -> None:
    document = answer("methods", "quantize/rtn", as_json=True)
    options = {option["name"]: option for option in document["options"]}
    assert (options["bits"]["type"], options["bits"]["default"], options["bits"]["required"]) == (
        "1 or 2 or 3 or 4 or 8",
        4,
        False,
    )
    assert options["group_size"]["type"] == "whole number above 0"
    assert answer("methods", "rtn", as_json=True) == document, "the kind may be left out"
    text = answer("methods", "prune/reap")
    assert "2510.13999" in text and "Experts left per layer." in text and "stats: CalibrationStats" in text


@pytest.mark.parametrize("name", lookup.names())
def test_every_option_of_every_method_is_explained(name: str) -> None:
    document = show.method_document(lookup.find(name))
    assert document["doc"].startswith(lookup.summary(name))
    for option in document["options"]:
        assert option["doc"].endswith("."), (name, option["name"])
        assert option["type"] != "mapping" or option["name"] in ("layers",), (name, option)
    assert show.method_text(document)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "whole number above 0"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "number from 0 to 1"),
        ({"enum": ["a", "b"]}, "a or b"),
        ({"const": 4}, "4"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "array"}, "list"),
        ({"$ref": "#/$defs/X"}, "true or false"),
        ({"type": "object"}, "mapping"),
    ],
)
def test_types_in_words(field: dict[str, Any], words: str) -> None:
    assert show.type_words(field, {"X": {"type": "boolean"}}) == words


def test_schema(answer: Answer) -> None:
    assert json.loads(answer("schema")) == answer("schema", as_json=True)
    assert "prune/reap" in answer("schema", as_json=True)["$defs"]["StageEntry"]["properties"]["run"]["enum"]


def test_inspect(answer: Answer) -> None:
    document = answer("inspect", "tiny", as_json=True)
    assert (document["facts"]["experts"], document["facts"]["top_k"], document["facts"]["layers"]) == (16, 2, 1)
    experts = cases.EXPERTS * 3 * cases.WIDTH * cases.HIDDEN * 2
    assert document["size"]["by_part"]["experts"] == experts
    assert document["size"]["bytes"] == sum(document["size"]["by_part"].values())
    text = answer("inspect", "tiny")
    assert "16 per layer, 2 per token" in text and "softmax, weights of the chosen sum to 1" in text


def test_inspect_of_what_is_no_model(answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_mo", "num_experts": 4}')
    answer("inspect", str(tmp_path), code=3)


@pytest.mark.parametrize("name", list(STARTERS))
def test_every_starter_is_a_valid_recipe(name: str, answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    answer("init", str(path), "--from", name)
    assert path.read_text() == STARTERS[name] == answer("init", "--from", name)
    assert load_recipe(path).stages
    assert all(len(line) <= 115 for line in STARTERS[name].splitlines())


def test_init_overwrites_nothing(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert "exists already" in answer("init", str(path), as_json=True, code=2)["error"]
    assert path.read_text() == "mine"
    assert "no folder" in answer("init", str(tmp_path / "no" / "x.yaml"), as_json=True, code=2)["error"]


def test_the_demo_starter_can_be_planned(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    answer("init", str(path))
    assert answer("plan", str(path), as_json=True)["steps"][1]["experts"] == 8


def a_report() -> Report:
    return Report(
        name="half", created_by="0.1.0", recipe=RECIPE, source=SourceRecord(name="tiny", kind="folder"),
        environment=Environment(python="3", torch="2", transformers="5", device="cpu"),
        size=SizeRecord(
            before=SizeSide(bytes=2**30, parameters=2**29, experts=(16,), router_rows=(16,)),
            after=SizeSide(bytes=2**28, parameters=2**28, experts=(8,), router_rows=(8,)),
        ),
        metrics=(MetricRow(task="arc", metric="acc", before=0.75, after=0.5, samples=8, higher_is_better=True),),
    )  # fmt: skip


def test_report_writes_the_pages_again(answer: Answer, tmp_path: Path) -> None:
    save(a_report(), tmp_path / "report")
    page = tmp_path / "report" / "report.html"
    before = page.read_text()
    page.unlink()
    assert answer("report", str(tmp_path)) == f"{page}\n"
    assert page.read_text() == before
    assert answer("report", str(tmp_path), as_json=True)["data"]["name"] == "half"
    answer("report", str(tmp_path / "nowhere"), code=3)


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`run` and `eval` without doing the work: what they were called with is noted."""
    called: dict[str, Any] = {}

    def execute_run(opened: Any, run_dir: Path, **given: Any) -> execute.RunResult:
        called.update(given, opened=opened, run_dir=run_dir)
        listener = given.get("listener")
        if listener:
            listener({"event": "stage_started", "stage": "prune/reap"})
        return execute.RunResult(run_dir, run_dir / "model", None if given.get("until") else a_report())

    def remember(what: Any, sets: Any = ()) -> Any:
        called.update(what=what, sets=sets)
        return SimpleNamespace(what=what)

    monkeypatch.setattr(execute, "run", execute_run)
    monkeypatch.setattr(opening, "open_recipe", remember)
    monkeypatch.setattr(opening, "open_loaded", remember)
    return called


def test_run_ends_with_the_table_and_the_page(answer: Answer, fake_run: dict[str, Any]) -> None:
    out = answer("run", "recipes/half.yaml", "--device", "cpu")
    assert fake_run["run_dir"] == Path("runs/half")
    lines = [line.split() for line in out.splitlines()]
    assert ["total", "1.00", "GiB", "256", "MiB", "25.0", "%"] in lines
    assert ["experts", "per", "layer", "16", "8", "50.0", "%"] in lines
    assert ["arc", "acc", "\N{UPWARDS ARROW}", "0.7500", "0.5000", "-0.2500"] in lines
    assert lines[-1] == ["report", "runs/half/report/report.html"]


def test_run_passes_everything_on(answer: Answer, fake_run: dict[str, Any]) -> None:
    more = ["--run-dir", "out", "--set", "seed=3", "--set", "model=x", "--redo", "prune/reap", "--quiet"]
    document = answer("run", "half.yaml", "--device", "cpu", *more, as_json=True)
    assert fake_run["sets"] == ["seed=3", "model=x"]
    assert (fake_run["run_dir"], fake_run["redo"], fake_run["until"]) == (Path("out"), "prune/reap", None)
    assert fake_run["device"] == "cpu" and "listener" not in fake_run
    assert document["model"] == "out/model" and document["report"] == "out/report/report.html"
    assert document["metrics"][0]["after"] == 0.5 and document["size"]["after"]["bytes"] == 2**28


def test_run_until(answer: Answer, fake_run: dict[str, Any]) -> None:
    out = answer("run", "half.yaml", "--until", "prune/reap")
    assert out == "stopped as asked; `moecli status runs/half` shows what is left\n"


def test_eval_is_a_recipe_of_one_stage(answer: Answer, fake_run: dict[str, Any]) -> None:
    answer("eval", "models/tiny", "--tasks", "a, b", "--include", "tasks", "--limit", "5")
    recipe = fake_run["what"]
    assert [entry.run for entry in recipe.stages] == ["eval/lm-eval"]
    assert recipe.stages[0].with_ == {"tasks": ["a", "b"], "include": "tasks", "limit": 5}
    assert (recipe.model, fake_run["run_dir"]) == ("models/tiny", Path("runs/eval-tiny"))
    document = answer("eval", "tiny", "--tasks", ",", as_json=True, code=2)
    assert document["problems"][0]["message"] == "`tasks` must be a list of 1 or more, got an empty list"


def test_no_gpu_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert app._device(None) == ("cpu", "no CUDA device")
    assert app._device("cpu") == ("cpu", "as asked")
    with pytest.raises(SurroundingsError, match="no CUDA device"):
        app._device("cuda")


def test_verify(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecli.runner import verify

    failed = verify.Verification((verify.Check("reload", "failed", "1 tensor"),), ("`x` is missing",), {"x": "kept"})
    monkeypatch.setattr(verify, "verify_folder", lambda folder, against: failed)
    out = answer("verify", "tiny", code=1)
    assert "- `x` is missing" in out and out.endswith("tiny: failed\n")
    assert answer("verify", "tiny", as_json=True, code=1)["accounting"] == {"x": "kept"}


def test_doctor(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    document = answer("doctor", as_json=True)
    found = {check["name"]: check for check in document["checks"]}
    assert document["ok"] and found["torch"]["state"] == "ok"
    assert found["hub"]["state"] == "note" and "HF_HUB_OFFLINE" in found["hub"]["detail"]
    assert "torch" in answer("doctor")


def test_doctor_without_a_package(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no_such_package"))
    document = answer("doctor", as_json=True, code=3)
    missing = [check for check in document["checks"] if check["state"] == "missing"]
    assert missing == [{"name": "no_such_package", "state": "missing", "detail": "`pip install no-such-package`"}]


def test_doctor_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    finding = doctor._hub()
    assert finding.state == "note" and "cannot be reached" in finding.detail


def test_bare_moecli_shows_help(answer: Answer) -> None:
    assert answer().startswith("Usage: moecli ")


@pytest.mark.parametrize("command", ["run", "plan", "check", "status", "clean", "methods", "schema", "inspect",
                                     "verify", "eval", "report", "init", "doctor"])  # fmt: skip
def test_every_command_has_help_and_json(command: str, answer: Answer) -> None:
    text = answer(command, "--help")
    assert "--json" in text
    assert f"  {command} " in answer("--help")


def test_the_resolved_recipe_can_be_run_again(answer: Answer, folder: Path, tmp_path: Path) -> None:
    from moecli.recipe.schema import resolved_yaml

    plan = show.planned(str(folder / "half.yaml"), ())
    path = tmp_path / "again.yaml"
    path.write_text(resolved_yaml(plan.recipe))
    options = yaml.safe_load(path.read_text())["stages"][2]["with"]
    assert (options["bits"], options["group_size"], options["attention_bits"]) == (4, 128, None)
    assert [s.key for s in show.planned(str(path), ()).steps] == [s.key for s in plan.steps]
