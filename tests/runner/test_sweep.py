"""Sweeps: which points there are, what they share, and that they survive being killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecli.cli import main
from moecli.cli.show import model_sketch
from moecli.core.errors import RecipeError, UsageError
from moecli.runner import sweep as sweeping
from moecli.runner import verify
from moecli.runner.open import load_recipe
from moecli.runner.plan import make_plan
from moecli.runner.points import plan_points, read_index, slurm_script
from tests.runner.small_runs import EVALUATED, digests, events, forked, furnish

Patch = pytest.MonkeyPatch
BASE = """\
  recipe: 1
  model: toy
  stages:
    - run: calibrate/statistics
      with: {dataset: data/text.jsonl, samples: 6, tokens_per_sample: 32, batch_size: 2}
    - id: method
      run: prune/reap
      with: {keep: 4}
    - run: eval/perplexity
      with: {dataset: data/test.jsonl, window: 32, documents: 3}
"""
MATRIX = """\
matrix:
  method:
    reap: {run: prune/reap}
    merged: [{run: cluster/hc-smoe}, {run: merge/weighted}]
    int4: {run: quantize/rtn, id: int4, with: {group_size: 16}}
  method.keep: [6, 4]
"""
SWEEP = "sweep: 1\nbase:\n" + BASE + MATRIX
UNVERIFIED = "from moecli.runner import verify; verify.verify = lambda *a, **o: verify.Verification(())"

PROGRAM = UNVERIFIED + "\nimport sys\nfrom moecli.cli.main import run\nsys.exit(run(sys.argv[1:]))"


@pytest.fixture(scope="module")
def ready(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    furnish(folder, tiny_model("qwen3_moe"))
    (folder / "s.yaml").write_text(SWEEP)
    return folder


@pytest.fixture
def folder(ready: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A copy to run in, which is the current folder; exports are not verified."""
    shutil.copytree(ready, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(verify, "verify", lambda *a, **o: verify.Verification(()))
    return tmp_path / "here"


@pytest.fixture(scope="module")
def whole(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after an uninterrupted sweep."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    shutil.copytree(ready, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(verify, "verify", lambda *a, **o: verify.Verification(()))
        assert main.run(["sweep", "s.yaml", "--quiet"]) == 0
    return folder


def load(text: str, folder: Path) -> sweeping.Sweep:
    (folder / "given.yaml").write_text(text)
    return sweeping.load(folder / "given.yaml")


def names(text: str, folder: Path) -> list[str]:
    return [point.name for point in load(text, folder).points]


# -- points


def test_every_combination_in_order(folder: Path) -> None:
    # `keep` is no option of int4's stages, so it does not vary them: one point, without it
    expected = ["reap-keep6", "reap-keep4", "merged-keep6", "merged-keep4"]
    text = SWEEP.replace("    int4: {run: quantize/rtn, id: int4, with: {group_size: 16}}\n", "    none: []\n")
    assert names(text, folder) == [*expected, "none"]
    assert names(text + "  seed: [0, 1]\n", folder)[:3] == ["reap-keep6-seed0", "reap-keep6-seed1", "reap-keep4-seed0"]


def test_exclude_and_include(folder: Path) -> None:
    text = (
        SWEEP.replace("  method.keep", "  prune/reap.keep").replace(
            "[{run: cluster/hc-smoe}", "[{run: prune/frequency}"
        )
        + "exclude: [{method: reap, prune/reap.keep: 6}]\ninclude: [{method: reap, prune/reap.keep: 5}, {seed: 3}]\n"
    ).replace("merged: [", "merged: [{run: prune/frequency, with: {keep: 4}}] #")
    assert names(text, folder) == ["reap-keep4", "merged", "int4", "reap-keep5", "seed3"]


def test_a_point_is_the_recipe_one_would_write(folder: Path) -> None:
    """Same keys as a recipe written by hand, but for the calibration, which points share."""
    wanted = "statistics: [absmax, ean_sum, gean_sum], "
    text = SWEEP.replace("calibrate/statistics\n      with: {", f"calibrate/statistics\n      with: {{{wanted}")
    text = (
        text.replace("    merged: [{run: cluster/hc-smoe}, {run: merge/weighted}]\n", "").split("    int4")[0]
        + "  method.keep: [6, 4]\n"
    )
    by_hand = EVALUATED.replace("samples: 6", f"{wanted}samples: 6").replace("keep: 4", "keep: 6")
    by_hand = by_hand.replace("  - run: quantize/rtn\n    with: {group_size: 16}\n", "")
    (folder / "hand.yaml").write_text(by_hand)
    hand = make_plan(load_recipe(folder / "hand.yaml"), *model_sketch("toy", None))
    point = plan_points(load(text, folder), model_sketch)[0]
    assert point.name == "reap-keep6"
    assert [s.key for s in point.plan.steps] == [s.key for s in hand.steps]


def test_the_base_may_be_a_file_beside_the_sweep(folder: Path, monkeypatch: Patch) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "base.yaml").write_text("".join(line[2:] for line in BASE.splitlines(keepends=True)))
    (folder / "deep" / "s.yaml").write_text("sweep: 1\nbase: base.yaml\n" + MATRIX.replace("int4:", "named.x:", 1))
    assert sweeping.load("deep/s.yaml").points[0].name == "reap-keep6"


BAD: dict[str, tuple[str, str, int, str | None]] = {
    "unknown axis": (SWEEP.replace("method.keep", "metod.keep"),
                     "the axis `metod.keep` varies nothing: no stage of the base is called `metod`", 18,
                     "did you mean `method.keep`?"),
    "two points of one name": (SWEEP + "include: [{method: reap, method.keep: 4}]\n",
                               "two points are called `reap-keep4`",
                               19, "remove one of them"),
    "an option that is none": (SWEEP.replace("method.keep: [6", "method.kep: [6"),
                               "unknown option `kep` of `prune/reap`", 18, "did you mean `keep`?"),
    "a value the model refuses": (SWEEP.replace("[6, 4]", "[6, 1]"), "", 18, None),
    "excludes nothing": (SWEEP + "exclude: [{method: int4, method.keep: 6}]\n", "this excludes nothing", 19, None),
    "unknown value": (SWEEP + "exclude: [{method: raep}]\n", "`method` has no value `raep`", 19,
                      "did you mean `reap`?"),
    "a stage without a name": (SWEEP.replace("  method.keep", "  eval: [{run: eval/perplexity}]\n  method.keep"),
                               "`eval` is a whole stage: its values need names", 18,
                               "write `name: {run: ...}` below it, or `name: [{run: ...}, ...]`"),
    "a list without a name": (SWEEP + "  calibrate.statistics: [[gean_sum]]\n",
                              "the value of `calibrate.statistics` needs a name, it becomes part of a folder's",
                              19, None),
    "one value twice": (SWEEP.replace("[6, 4]", "[4, 4]"), "`method.keep` has the value 4 twice", 18, None),
    "a key that is none": (SWEEP.replace("matrix:", "matirx:"), "unknown key `matirx` of a sweep", 13,
                           "did you mean `matrix`?"),
    "no points": ("sweep: 1\nbase:\n" + BASE, "the sweep has no points", 1, "add axes to `matrix`"),
    "a wrong base": (SWEEP.replace("window: 32", "windw: 32"), "unknown option `windw` of `eval/perplexity`", 12,
                     "did you mean `window`?"),
    "a recipe": (EVALUATED, "this is a recipe, `moecli run given.yaml` runs it", 3,
                 "a sweep has `sweep: 1` and `base`"),
    "an axis of nothing": (SWEEP + "  router/row-drop.x: [1]\n",
                           "the axis `router/row-drop.x` varies nothing: no stage of the base is called",
                           19, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sweeps(case: str, folder: Path) -> None:
    text, message, line, hint = BAD[case]
    (folder / "given.yaml").write_text(text)
    with pytest.raises(RecipeError, match="nothing was run") as caught:
        plan_points(sweeping.load("given.yaml"), model_sketch)
    found = caught.value.diagnostics[0]
    assert message in found.message
    assert found.place is not None
    assert (found.place.path, found.place.line) == ("given.yaml", line), found
    if hint is not None:
        assert found.hint == hint


def test_missing_files(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no sweep at `t\.yaml`") as caught:
        sweeping.load("t.yaml")
    assert caught.value.hint == "did you mean `s.yaml`?"
    (folder / "given.yaml").write_text("sweep: 1\nbase: gone.yaml\nmatrix: {seed: [1]}\n")
    with pytest.raises(UsageError, match=r"no base recipe at `gone\.yaml`"):
        sweeping.load("given.yaml")


# -- what points share


def test_one_calibration_collects_what_all_need(folder: Path) -> None:
    points = plan_points(sweeping.load("s.yaml"), model_sketch)
    first = {point.plan.steps[0].key for point in points}
    needs = {name for point in points for s in point.plan.steps for name in s.stage.needs(s.options)}
    assert len(first) == 1
    assert set(points[0].plan.options[0].statistics) == needs  # type: ignore[attr-defined]
    assert len(needs) > 1


def test_different_calibrations_stay_apart(folder: Path) -> None:
    text = SWEEP + "  calibrate.samples: [4, 6]\n"
    points = plan_points(load(text, folder), model_sketch)
    assert len({point.plan.steps[0].key for point in points}) == 2


def test_stages_are_made_once(whole: Path) -> None:
    run = whole / "runs" / "s"
    made = [p.parent.name for p in run.glob("stages/*/*") if p.is_dir()]
    count = {name: made.count(name) for name in set(made)}
    assert count["calibrate-statistics"] == 1
    assert count["eval-perplexity"] == 5 + 1  # the source once
    assert count["prune-reap"] == 2
    started = [e["stage"] for p in run.glob("points/*") for e in events(p) if e["event"] == "stage_started"]
    assert started.count("calibrate/statistics") == started.count("eval/perplexity (source)") == 1


def test_a_point_is_a_run_like_any_other(whole: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """`status` knows it, `run` of its own recipe finds everything done, `clean` does not take what others use."""
    monkeypatch.chdir(whole)
    point = "runs/s/points/reap-keep4"
    before = digests(whole / point / "model")
    assert main.run(["status", point, "--json"]) == 0
    assert {s["state"] for s in json.loads(capsys.readouterr().out)["steps"]} == {"done"}
    assert main.run(["run", f"{point}/recipe.yaml", "--run-dir", point, "--json", "--quiet"]) == 0
    assert digests(whole / point / "model") == before
    capsys.readouterr()
    assert main.run(["clean", point]) == 2
    assert "`moecli clean runs/s` drops those of all points" in capsys.readouterr().err


def test_clean_of_the_sweep(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "runs", folder / "runs", symlinks=True)
    assert main.run(["clean", "runs/s", "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert {"calibrate/statistics", "prune/reap", "shared parts"} <= {item["stage"] for item in removed}
    assert (folder / "runs/s/points/reap-keep4/model/config.json").is_file()
    assert main.run(["table", "runs/s"]) == 0


# -- running


def test_done_points_are_left_alone(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "runs", folder / "runs", symlinks=True)
    before = digests(folder / "runs/s/points")
    assert main.run(["sweep", "s.yaml", "--json", "--quiet"]) == 0
    assert {r["state"] for r in json.loads(capsys.readouterr().out)["results"]} == {"done before"}
    assert digests(folder / "runs/s/points") == before


def test_a_point_that_fails_is_named_and_the_others_go_on(
    folder: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = verify.verify

    def refuse(target: Path, *rest: Any, **more: Any) -> Any:
        if target.parent.name == "reap-keep6":
            return verify.Verification((), problems=("tensor x is gone",))
        if target.parent.name == "int4":
            raise ZeroDivisionError("a bug")
        return real(target, *rest, **more)

    monkeypatch.setattr(verify, "verify", refuse)
    assert main.run(["sweep", "s.yaml", "--json"]) == 70
    out, err = capsys.readouterr()
    results = {r["name"]: r for r in json.loads(out)["results"]}
    assert {name: r["state"] for name, r in results.items()} == {
        "reap-keep6": "failed", "reap-keep4": "done", "merged-keep6": "done", "merged-keep4": "done", "int4": "failed"
    }  # fmt: skip
    assert "reap-keep6: failed in" in err
    assert "error: the export does not verify: tensor x is gone" in err
    assert "ZeroDivisionError: a bug; this is a bug in moecli" in results["int4"]["message"]
    assert "ZeroDivisionError" in (folder / "runs/s/points/int4/error.log").read_text()
    assert main.run(["table", "runs/s"]) == 0
    assert "- reap-keep6: failed: the export does not verify: tensor x is gone" in capsys.readouterr().out
    monkeypatch.setattr(verify, "verify", real)
    assert main.run(["sweep", "s.yaml", "--json", "--quiet"]) == 0
    again = {r["name"]: r["state"] for r in json.loads(capsys.readouterr().out)["results"]}
    assert again["reap-keep6"] == again["int4"] == "done"
    assert again["reap-keep4"] == "done before"


KILL_AFTER = """
import os, signal
from moecli.runner import execute
count = [0]
real = execute.Execution.emit
def emit(self, event):
    real(self, event)
    if event["event"] in ("stage_started", "stage_finished"):
        count[0] += 1
        if count[0] == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
execute.Execution.emit = emit
"""


def test_killed_twice_it_goes_on_and_makes_the_same(folder: Path, whole: Path) -> None:
    """SIGKILL in the middle of a stage, then just after one; what was made before is not made again."""
    for count in (7, 9):
        code, said = forked(folder, "sweep", "s.yaml", "--quiet", code=UNVERIFIED + KILL_AFTER.format(count=count))
        assert code == -signal.SIGKILL, said
    made = {p.name for p in (folder / "runs/s/stages").glob("*/*") if p.suffix == ""}
    assert made
    assert main.run(["sweep", "s.yaml", "--quiet"]) == 0
    seen = [e for p in (folder / "runs/s/points").iterdir() for e in events(p)]
    finished = [e["stage"] for e in seen if e["event"] == "stage_finished"]
    assert finished.count("calibrate/statistics") == finished.count("eval/perplexity (source)") == 1
    for name in ("reap-keep6", "merged-keep4", "int4"):
        ours, theirs = (digests(root / "runs/s/points" / name / "model") for root in (folder, whole))
        assert ours == theirs


def test_points_at_the_same_time_make_a_stage_once(folder: Path) -> None:
    codes: dict[str, int] = {}

    def go(name: str) -> None:
        said = folder.parent / name
        said.mkdir()
        with (said / "err").open("w") as err:
            codes[name] = subprocess.run(
                [sys.executable, "-c", PROGRAM, "sweep", "s.yaml", "--quiet", "--point", name],
                cwd=folder, stderr=err, stdout=err, check=False,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
                            ).returncode  # fmt: skip

    threads = [threading.Thread(target=go, args=(name,)) for name in ("reap-keep6", "merged-keep6")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    said = [(folder.parent / name / "err").read_text() for name in codes]
    assert codes == {"reap-keep6": 0, "merged-keep6": 0}, said
    seen = [e for p in (folder / "runs/s/points").iterdir() for e in events(p)]
    started = [e["stage"] for e in seen if e["event"] == "stage_started"]
    assert started.count("calibrate/statistics") == started.count("eval/perplexity (source)") == 1


def test_slurm_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["sweep", "s.yaml", "--slurm", "job.sh"]) == 0
    assert capsys.readouterr().out == "wrote job.sh: 5 tasks; `sbatch job.sh` starts them\n"
    text = (folder / "job.sh").read_text()
    assert "#SBATCH --array=0-4\n" in text
    assert subprocess.run(["bash", "-n", "job.sh"], check=False).returncode == 0
    # what the second task would run, without running it
    shown = text.replace("exec ", "printf '%s\\n' ")
    words = subprocess.run(["bash", "-c", shown], env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}, text=True,
                           capture_output=True, check=True).stdout.splitlines()  # fmt: skip
    assert words[1:4] == ["-m", "moecli", "sweep"]
    assert words[-2:] == ["--point", "reap-keep4"]
    assert [p.name for p in read_index(folder / "runs/s")[1]] == [p.name for p in sweeping.load("s.yaml").points]


def test_slurm_quotes_what_a_shell_would_read(folder: Path) -> None:
    sweep = sweeping.load("s.yaml")
    text = slurm_script(sweep, Path("runs/a b;c"))
    assert "'" + str(Path("runs/a b;c").absolute()) + "'" in text


def test_list_and_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["sweep", "s.yaml", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["points"]
    assert listed[0] == {"name": "reap-keep6", "axes": {"method": "reap", "method.keep": "6"}}
    assert main.run(["sweep", "s.yaml", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"] == {
        "needed": 4 + 4 + 5 + 5 + 4, "different": 1 + 1 + 2 * 2 + 2 * 3 + 2, "to_run": 14,
        "calibrations_to_run": 1, "baselines_to_run": 1,
    }  # fmt: skip
    assert document["points"][1]["steps"][0]["shared_with"] == "reap-keep6"
    assert not (folder / "runs").exists()


def test_unknown_point(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["sweep", "s.yaml", "--point", "reap-keep5"]) == 2
    assert "the sweep has no point `reap-keep5`" in capsys.readouterr().err


def test_a_newer_sweep_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs/s").mkdir(parents=True)
    (folder / "runs/s/sweep.json").write_text(json.dumps({"schema": 99, "name": "s", "points": []}))
    assert main.run(["table", "runs/s"]) == 1
    assert "has format 99, this moecli reads up to 1" in capsys.readouterr().err


def test_resolved_recipes_of_points_load(whole: Path) -> None:
    for path in (whole / "runs/s/points").glob("*/recipe.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.parent.name
