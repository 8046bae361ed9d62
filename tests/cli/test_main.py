"""Exit codes, who says what on which stream, and what is not imported."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moecli.cli import main, show
from moecli.core.errors import StageFailed, SurroundingsError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any) -> None:
        raise error

    monkeypatch.setattr(show, "planned", raises)


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["chek", "x"], "unknown command `chek`", "did you mean `check`?"),
        (["zzzzz"], "unknown command `zzzzz`", "`moecli --help` lists the commands"),
        (["check"], "`moecli check` needs `RECIPE`", "`moecli check --help` shows how"),
        (["check", "a", "b"], "`moecli check` does not take `b`", "`moecli check --help` shows how"),
        (["check", "a", "--jsn"], "unknown option `--jsn` of `moecli check`", "did you mean `--json`?"),
        (["run", "a", "--device", "tpu"], "`--device` must be `cpu` or `cuda`, got `tpu`", None),
        (["eval", "m"], "`moecli eval` needs `--tasks`", None),
        (["eval", "m", "--tasks", "a", "--limit", "few"], "`--limit` must be a whole number, got `few`", None),
        (["eval", "m", "--tasks", "a", "--limit=1.5"], "`--limit` must be a whole number, got `1.5`", None),
        (["run", "a", "--until"], "`--until` needs a value", None),
        (["check", "no.yaml"], "no recipe at `no.yaml`", None),
        (["init", "--from", "demmo"], "no recipe named `demmo`", "did you mean `demo`?"),
        (["status", "."], "`.` is not a run folder: it has no recipe.yaml", None),
        (["methods", "prune/reep"], "unknown stage `prune/reep`", "did you mean `prune/reap`?"),
    ],
)
def test_a_wrong_command_line(argv: list[str], message: str, hint: str | None, capsys: Capture) -> None:
    assert main.run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"error: {message}"
    if hint:
        assert err.splitlines()[1:] == [f"hint: {hint}"]


def test_a_wrong_command_line_as_json(capsys: Capture) -> None:
    assert main.run(["check", "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["exit_code"] == 2
    assert document["problems"][0]["message"] == "`moecli check` needs `RECIPE`"
    assert err.startswith("error: ")


def test_problems_of_a_recipe_as_json(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "x.yaml").write_text("recipe: 1\nmodel: demo\nsed: 3\nstages:\n  - run: prune/reep\n")
    assert main.run(["check", "x.yaml", "--json", "--set", "seed=x"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "error": "3 problems in x.yaml; nothing was run",
        "exit_code": 2,
        "problems": [
            {"path": "x.yaml", "line": 3, "column": 1, "message": "unknown key `sed` of a recipe",
             "hint": "did you mean `seed`?"},
            {"path": "x.yaml", "line": 5, "column": 10, "message": "unknown stage `prune/reep`",
             "hint": "did you mean `prune/reap`?"},
            {"path": "--set", "line": 1, "column": 6, "message": "`seed` must be a whole number, got the text `x`",
             "hint": None},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StageFailed("prune/reap stopped: NaN", hint="raise `samples`"), 1, "error: prune/reap stopped: NaN"),
        (SurroundingsError("no disk"), 3, "error: no disk"),
        (OSError(28, "No space left on device", "runs/x"), 3, "error: no space left on device (`runs/x`)"),
        (PermissionError(13, "Permission denied", "runs/x"), 3, "error: permission denied (`runs/x`)"),
        (MemoryError(), 3, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted; finished parts are kept, the same command goes on from there"),
        (main.Terminated(), 143, "terminated; finished parts are kept, the same command goes on from there"),
    ],
)
def test_expected_failures(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fail_with(error, monkeypatch)
    assert main.run(["check", "x.yaml"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == said
    assert main.run(["check", "x.yaml", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


def test_a_bug_is_one_line_and_a_log(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fail_with(ValueError("boom\nsecond line"), monkeypatch)
    assert main.run(["check", "x.yaml"]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    start, _, log = line.partition(", the whole trace is in ")
    assert start == "error: ValueError: boom; this is a bug in moecli"
    text = Path(log).read_text()
    assert "Traceback (most recent call last)" in text and "moecli check x.yaml" in text


def test_a_bug_without_a_message(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fail_with(AssertionError(), monkeypatch)
    assert main.run(["check", "x.yaml"]) == 70
    assert capsys.readouterr().err.startswith("error: AssertionError; this is a bug in moecli")


def test_what_libraries_print_is_not_the_answer(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def noisy(*args: Any) -> None:
        sys.stdout.write("Loading weights 100%\n")
        raise SurroundingsError("no disk")

    monkeypatch.setattr(show, "planned", noisy)
    assert main.run(["check", "x.yaml", "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "no disk"
    assert "Loading weights" in err


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["--version"], ["methods"], ["init"], []])
def test_what_is_not_imported(argv: list[str]) -> None:
    code = (
        "import sys; from moecli.cli.main import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_is_quick() -> None:
    """Processor time: what the wall clock shows too, on a machine that does nothing else."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "moecli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(once() for _ in range(4)) < 0.4


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = f"{sys.executable} -m moecli methods | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_closes_what_is_open(number: signal.Signals, code: int, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from moecli.cli import main, show\n"
        "def slow(*args):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        open('closed', 'w').close()\n"
        "show.planned = slow\n"
        "sys.exit(main.run(['check', 'x.yaml']))\n"
    )
    command = ["env", "--default-signal=INT", sys.executable, "-c", script]  # a shell's background ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        os.kill(process.pid, number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert rest.endswith("finished parts are kept, the same command goes on from there\n")
    assert (tmp_path / "closed").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_an_object_is_finalized(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Python forgets what is raised there; the command stops all the same, and prints nothing of it."""
    script = (
        "import os, sys, time\n"
        "from moecli.cli import main, show\n"
        "class Sent:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        time.sleep(0.01)\n"
        "def slow(*args):\n"
        "    Sent()\n"
        "    time.sleep(60)\n"
        "show.planned = slow\n"
        "sys.exit(main.run(['check', 'x.yaml']))\n"
    )
    command = ["env", "--default-signal=INT", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=50)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith("finished parts are kept, the same command goes on from there\n")
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("recipe: 1\nmod\u00e8le: x\n", encoding="utf-8")
    code = "import sys; from moecli.cli.main import run; sys.exit(run(['check', 'x.yaml']))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert "mod\\xe8le" in done.stderr


def test_set_in_both_spellings() -> None:
    assert main.sets_of(["run", "x", "--set", "a=1", "--json", "--set=b=2\n3", "--set"]) == ["a=1", "b=2 3"]
