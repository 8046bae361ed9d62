"""A run that is stopped, killed, repeated or changed: finished work is kept, and the bytes are the same.

Processes are stopped at a moment of their own: a hook put in before the program starts sends the signal from inside, so
the moment does not depend on how fast the machine is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moecli.cli import main
from moecli.runner import verify
from tests.runner.small_runs import (
    EVALUATED,
    RECIPE,
    digests,
    events,
    forked,
    furnish,
    has_event,
    listing,
    started,
    wait_for,
    write_rows,
)

Patch = pytest.MonkeyPatch
RUN = Path("runs/r")
STOPPED = "finished parts are kept, the same command goes on from there\n"
UNVERIFIED = "from moecli.runner import verify; verify.verify = lambda *a, **o: verify.Verification(())"
"""Loading every export in a fresh process takes seconds, and other tests are about that."""


@pytest.fixture(scope="module")
def ready(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes in which nothing was run."""
    folder = tmp_path_factory.mktemp("ready")
    furnish(folder, tiny_model("qwen3_moe", shards=3))
    (folder / "r.yaml").write_text(EVALUATED)
    return folder


@pytest.fixture(scope="module")
def whole(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after an uninterrupted run, export verified."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    shutil.copytree(ready, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.run(["run", "r.yaml", "--quiet"]) == 0
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    shutil.copytree(ready, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    unverified(monkeypatch)
    return tmp_path / "here"


@pytest.fixture
def done(whole: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    shutil.copytree(whole, tmp_path / "done")
    monkeypatch.chdir(tmp_path / "done")
    unverified(monkeypatch)
    return tmp_path / "done"


def unverified(patch: Patch) -> None:
    patch.setattr(verify, "verify", lambda *args, **options: verify.Verification(()))


def run(*argv: str) -> list[str]:
    """Labels of the stages that ran, not those that were done already."""
    before = len(events(RUN))
    assert main.run(["run", "r.yaml", "--quiet", *argv]) == 0
    return [e["stage"] for e in events(RUN)[before:] if e["event"] == "stage_started"]


def complete(run: Path) -> set[str]:
    return {p.parent.name for p in run.glob("stages/*/*") if p.suffix == ""}


# -- stopped in the middle

IN_PROCESS = """
import os, signal
from moecli.io import durable, overlay, store, tensorfile, writer
from moecli.runner import execute

def once(owner, name, number, moment):
    plain = getattr(owner, name)
    def hooked(*args, **options):
        if moment(*args, **options):
            setattr(owner, name, plain)
            os.kill(os.getpid(), number)
        return plain(*args, **options)
    setattr(owner, name, hooked)

def progress(stage, done, number):
    once(execute.Execution, "emit", number, lambda self, event: (
        event["event"] == "progress" and event["stage"] == stage and event["done"] >= done))

def writing(text, number):
    once(os, "fsync", number, lambda handle: text in os.readlink(f"/proc/self/fd/{handle}"))
"""

MOMENTS = {
    "calibrate": ("progress('calibrate/statistics', 1, {})", set()),
    "prune": ("writing('.layer-001.json.tmp', {})", {"calibrate-statistics"}),
    "quantize": ("writing('/quantize-rtn/', {})", {"calibrate-statistics", "prune-reap"}),
    "export": (
        "once(writer, 'write_text', {}, lambda path, text: path.name == 'config.json')",
        {"calibrate-statistics", "prune-reap", "quantize-rtn"},
    ),
    "eval": (
        "progress('eval/perplexity', 1, {})",
        {"calibrate-statistics", "prune-reap", "quantize-rtn", "export", "eval-perplexity"},
    ),
}
"""Where -> the hook that sends the signal, and the stages that are complete then (the baseline's evaluation too)."""


@pytest.mark.parametrize(
    ("where", "number"),
    [("calibrate", signal.SIGTERM), ("prune", signal.SIGINT), ("quantize", signal.SIGTERM), ("export", signal.SIGINT),
     ("export", signal.SIGTERM), ("eval", signal.SIGTERM), ("eval", signal.SIGINT)],
)  # fmt: skip
def test_a_signal_keeps_what_is_done(where: str, number: signal.Signals, here: Path, whole: Path) -> None:
    hook, finished = MOMENTS[where]
    left, err = forked(here, "run", "r.yaml", code=f"{UNVERIFIED}\n{IN_PROCESS}\n{hook.format(int(number))}")
    how, code = ("terminated", 143) if number == signal.SIGTERM else ("interrupted", 130)
    assert left == code, err
    assert err.endswith(f"{how}; {STOPPED}") and "Traceback" not in err
    assert complete(RUN) == finished
    assert not (RUN / "model.partial").exists()
    assert (RUN / "model").exists() == ("export" in finished)
    ran = run()
    assert not finished.difference({"eval-perplexity"}) & {label.replace("/", "-") for label in ran}
    assert digests(RUN / "model") == digests(whole / "runs/r/model")


def test_a_signal_while_the_export_is_verified(here: Path, whole: Path) -> None:
    """The process that loads the export ends with the run, and the next run verifies again."""
    with started(here, "run", "r.yaml") as process:
        wait_for(has_event(here / RUN, event="note", stage="export"), process)
        wait_for(lambda: len(children(process.pid)) > 0, process)
        (child, *_) = children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.endswith(STOPPED)
    assert not Path(f"/proc/{child}").exists() or is_zombie(child)
    assert "export" not in complete(RUN)
    assert "export" in run()
    assert digests(RUN / "model") == digests(whole / "runs/r/model")


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


KILLS = [
    "writing('.tokens-', 9)",
    "progress('calibrate/statistics', 1, 9)",
    "once(os, 'rename', 9, lambda old, new: str(new).endswith('.partial') or 'calibrate' in str(new))",
    "once(overlay._Part, 'save', 9, lambda self, folder, name: name == 'layer-001')",
    "writing('.layer-001.json.tmp', 9)",
    "writing('.overlay.json.tmp', 9)",
    "once(os, 'rename', 9, lambda old, new: 'quantize' in str(new))",
    "once(writer, 'write_text', 9, lambda path, text: path.name == 'config.json')",
    "once(os, 'rename', 9, lambda old, new: str(new).endswith('/model'))",
    "once(store.StageFolder, 'finish', 9, lambda self, *a, **o: self.name == 'export')",
    "progress('eval/perplexity (source)', 1, 9)",
    "writing('.report.md.tmp', 9)",
    "writing('.README.md.tmp', 9)",
]


@pytest.mark.parametrize("hook", KILLS, ids=range(len(KILLS)))
def test_kill_9_changes_nothing(hook: str, here: Path, whole: Path) -> None:
    left, err = forked(here, "run", "r.yaml", "--quiet", code=f"{UNVERIFIED}\n{IN_PROCESS}\n{hook}")
    assert left == -9, err
    ran = run()
    assert digests(RUN / "model") == digests(whole / "runs/r/model")
    assert not [path for path in listing(here) if path.endswith((".partial/", ".old/", ".trash/"))]
    assert len(ran) == len(set(ran))


@pytest.mark.parametrize("sets", [("--set", "stages.1.with.keep=6"), ()], ids=["the-new-one", "the-old-one"])
def test_kill_9_while_model_is_replaced(sets: tuple[str, ...], done: Path, whole: Path) -> None:
    """Between the two renames there is no `model/`; whatever is run next puts the right one there."""
    hook = "once(os, 'rename', 9, lambda old, new: str(old).endswith('model.partial'))"
    code = f"{UNVERIFIED}\n{IN_PROCESS}\n{hook}"
    assert forked(done, "run", "r.yaml", "--set", "stages.1.with.keep=6", code=code)[0] == -9
    assert not (RUN / "model").exists() and (RUN / "model.old").exists()
    assert run(*sets)[0] == "export"
    assert json.loads((RUN / "model/config.json").read_text())["num_local_experts"] == (6 if sets else 4)
    assert not list(RUN.glob("model.*"))


def test_a_lock_goes_with_its_process(here: Path) -> None:
    assert forked(here, "run", "r.yaml", "--quiet", code=f"{IN_PROCESS}\n{KILLS[1]}")[0] == -9
    assert re.fullmatch(r"pid \d+ on \S+\n", (RUN / "lock").read_text())
    assert run("--until", "statistics") == ["calibrate/statistics"]


# -- run again


def test_a_second_run_does_nothing(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (RUN / "model").rglob("*")}
    time.sleep(0.01)
    assert run() == []
    assert {path: path.stat().st_mtime_ns for path in (RUN / "model").rglob("*")} == before


def test_until_and_on_from_there(here: Path, whole: Path) -> None:
    assert run("--until", "prune") == ["calibrate/statistics", "prune/reap"]
    assert not (RUN / "model").exists() and not (RUN / "report").exists()
    assert run("--until", "quantize/rtn") == ["quantize/rtn", "export"]
    assert run() == ["eval/perplexity (source)", "eval/perplexity"]
    assert digests(RUN / "model") == digests(whole / "runs/r/model")


@pytest.mark.parametrize(
    ("name", "ran"),
    [
        ("calibrate", ["calibrate/statistics"]),
        ("prune/reap", ["prune/reap"]),
        ("rtn", ["quantize/rtn"]),
        ("perplexity", ["eval/perplexity (source)", "eval/perplexity"]),
        ("export", ["export"]),
    ],
)
def test_redo_makes_that_again_and_nothing_else(name: str, ran: list[str], done: Path) -> None:
    """Equal inputs give equal results, so what stands below keeps its key."""
    before = digests(RUN / "model")
    assert run("--redo", name) == ran
    assert digests(RUN / "model") == before


def test_redo_of_what_is_not_there(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(done)
    assert main.run(["run", "r.yaml", "--quiet", "--redo", "pruune"]) == 2
    assert capsys.readouterr().err == (
        "error: the recipe has no stage `pruune`\nhint: its stages are `calibrate/statistics`, `prune/reap`, "
        "`quantize/rtn`, `eval/perplexity`\n"
    )
    assert listing(done) == before


def states(capsys: pytest.CaptureFixture[str], *argv: str) -> list[tuple[str, str, str]]:
    capsys.readouterr()
    assert main.run(["status", "r.yaml", "--json", *argv]) == 0
    return [(s["label"], s["state"], s["reason"]) for s in json.loads(capsys.readouterr().out)["steps"]]


def test_status_says_why(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {state for _, state, _ in states(capsys)} == {"done"}
    changed = states(capsys, "--set", "stages.1.with.keep=6")
    assert [(label, reason) for label, state, reason in changed if state == "will run"] == [
        ("prune/reap", "keep 4 -> 6"),
        ("quantize/rtn", "input `model` changed"),
        ("eval/perplexity", "input `model` changed"),
    ]
    assert {s[0]: s[2] for s in states(capsys, "--set", "seed=7")}["calibrate/statistics"] == "seed 0 -> 7"
    assert {s[2] for s in states(capsys, "--run-dir", "elsewhere")} == {"never run"}


def test_status_of_a_run_that_was_stopped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forked(here, "run", "r.yaml", "-q", code=f"{IN_PROCESS}\n{MOMENTS['prune'][0].format(9)}")[0] == -9
    assert [s[:2] for s in states(capsys)][:3] == [
        ("calibrate/statistics", "done"), ("prune/reap", "partial"), ("quantize/rtn", "will run"),
    ]  # fmt: skip


def test_a_changed_data_file_is_seen(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("data/test.jsonl").read_text()
    write_rows(Path("data/test.jsonl"), [{"text": "a fox and a hen " * 8}])
    assert run() == ["eval/perplexity (source)", "eval/perplexity"]
    Path("data/test.jsonl").write_text(text)
    assert run() == []
    os.utime("data/text.jsonl")
    assert run() == [], "by content, not by time"
    Path("data/text.jsonl").rename("data/moved.jsonl")
    assert run("--set", "stages.0.with.dataset=data/moved.jsonl") == [], "by content, not by name"


def test_what_is_not_in_a_key(done: Path) -> None:
    sets = ["stages.0.with.batch_size=1", "stages.3.with.batch_size=1", "name=another"]
    assert run(*(word for text in sets for word in ("--set", text))) == []


def test_clean_and_again(done: Path) -> None:
    before = digests(RUN / "model")
    assert main.run(["clean", "runs/r"]) == 0
    assert complete(RUN) == set() and digests(RUN / "model") == before
    assert len(run()) == 6
    assert digests(RUN / "model") == before


def test_another_value_and_back(done: Path) -> None:
    """Both results stay under their own keys; `model/` is always that of the last run."""
    four = digests(RUN / "model")
    six = ("--set", "stages.1.with.keep=6")
    assert run(*six) == ["prune/reap", "quantize/rtn", "export", "eval/perplexity"]
    assert json.loads((RUN / "model/config.json").read_text())["num_local_experts"] == 6
    assert digests(RUN / "model") != four
    assert run() == ["export"]
    assert digests(RUN / "model") == four
    assert run("--redo", "prune", "--until", "prune") == ["prune/reap"]
    assert run(*six) == ["export"], "the other key's results are not redone"


def test_two_recipes_in_one_folder(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they share is shared, by key; nothing of the one is taken for the other's."""
    Path("other.yaml").write_text(RECIPE.replace("  - run: quantize/rtn\n    with: {group_size: 16}\n", ""))
    before = len(events(RUN))
    assert main.run(["run", "other.yaml", "--quiet", "--run-dir", "runs/r"]) == 0
    assert [e["stage"] for e in events(RUN)[before:] if e["event"] == "stage_started"] == ["export"]
    assert "quantization_config" not in json.loads((RUN / "model/config.json").read_text())
    assert run() == ["export"]
    assert "quantization_config" in json.loads((RUN / "model/config.json").read_text())


def test_another_run_folder(done: Path) -> None:
    """Nothing in it depends on where it is."""
    assert main.run(["run", "r.yaml", "--quiet", "--run-dir", "deep/er/out"]) == 0
    assert digests(Path("deep/er/out/model")) == digests(RUN / "model")
    keys = {str(p.relative_to(RUN)) for p in RUN.glob("stages/*/*")}
    assert {str(p.relative_to("deep/er/out")) for p in Path("deep/er/out").glob("stages/*/*")} == keys


def test_a_run_folder_can_move(done: Path) -> None:
    RUN.rename("runs/moved")
    before = len(events(Path("runs/moved")))
    assert main.run(["run", "r.yaml", "--quiet", "--run-dir", "runs/moved"]) == 0
    assert not [e for e in events(Path("runs/moved"))[before:] if e["event"] == "stage_started"]


def test_a_model_that_somebody_changed_is_written_again(done: Path) -> None:
    before = digests(RUN / "model")
    config = json.loads((RUN / "model/config.json").read_text())
    (RUN / "model/config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    assert run() == ["export"]
    shutil.rmtree(RUN / "model")
    assert run() == ["export"]
    assert digests(RUN / "model") == before


def test_events_are_whole_lines(done: Path) -> None:
    """A line that a crash cut off does not swallow the next one."""
    with (RUN / "events.jsonl").open("a") as file:
        file.write('{"event": "prog')
    before = len((RUN / "events.jsonl").read_text().splitlines())
    assert main.run(["run", "r.yaml", "--quiet"]) == 0
    later = [json.loads(line) for line in (RUN / "events.jsonl").read_text().splitlines()[before:]]
    assert [event["event"] for event in later][-1] == "run_finished"
