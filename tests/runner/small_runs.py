"""A toy model, a text, a task and a recipe over them, for tests that run the whole program in a folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

STAGES = """\
stages:
  - run: calibrate/statistics
    with: {dataset: data/text.jsonl, samples: 6, tokens_per_sample: 32, batch_size: 2}
  - run: prune/reap
    with: {keep: 4}
  - run: quantize/rtn
    with: {group_size: 16}
"""
RECIPE = "recipe: 1\nmodel: toy\n" + STAGES
"""Without an evaluation; `EVALUATED` has one."""
EVALUATED = RECIPE + "  - run: eval/perplexity\n    with: {dataset: data/test.jsonl, window: 32, documents: 3}\n"
TASK = "  - run: eval/lm-eval\n    with: {include: data, tasks: [pets], limit: 4}\n"
WORDS = ("a", "be", "cat", "dog", "eel", "fox", "gnu", "hen")


def furnish(folder: Path, model: Path) -> None:
    """`toy/`, `data/` and `r.yaml` in `folder`."""
    shutil.copytree(model, folder / "toy")
    data = folder / "data"
    data.mkdir()
    rows = [" ".join(WORDS[(i * j) % 8] for j in range(1, 60)) for i in range(1, 30)]
    write_rows(data / "text.jsonl", [{"text": row} for row in rows])
    write_rows(data / "test.jsonl", [{"text": row[::-1]} for row in rows[:5]])
    write_rows(data / "pets.jsonl", [{"q": row[:40], "a": i % 2} for i, row in enumerate(rows)])
    (data / "pets.yaml").write_text(
        "task: pets\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}/pets.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "doc_to_choice: [cat, dog]\nmetadata: {version: 1}\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "r.yaml").write_text(RECIPE)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def listing(folder: Path) -> set[str]:
    """Every path below `folder`; folders end in a slash."""
    return {f"{p.relative_to(folder)}{'/' if p.is_dir() else ''}" for p in folder.rglob("*")}


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def events(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's events.jsonl."""
    path = run / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def started(folder: Path, *argv: str, code: str | None = None, **environment: str) -> subprocess.Popen[str]:
    """`moecli` in a process group of its own; `code` runs in the same process first."""
    prelude = f"{code}\n" if code else ""
    program = f"{prelude}import sys\nfrom moecli.cli.main import run\nsys.exit(run(sys.argv[1:]))"
    command = ["env", "--default-signal=INT", sys.executable, "-c", program]  # a shell's background ignores it
    return subprocess.Popen(
        [*command, *argv], cwd=folder, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


PRELOADED = [
    "moecli.cli.main", "moecli.cli.app", "moecli.runner.execute", "moecli.runner.gather", "moecli.runner.card",
    "moecli.runner.report_html", "moecli.runner.verify", "moecli.methods.calibrate.statistics",
    "moecli.methods.prune.reap", "moecli.methods.quantize.rtn", "moecli.methods.eval.perplexity",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.models.auto.modeling_auto",
]  # fmt: skip


def forked(folder: Path, *argv: str, code: str) -> tuple[int, str]:
    """Exit code (minus the signal's number) and stderr of `moecli`, with `code` run first.

    A process of its own, forked from one that has imported everything and computed nothing: starting takes no time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    said = folder.parent / "stderr.txt"
    process = context.Process(target=_in_child, args=(str(folder), list(argv), code, str(said)))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "still running"
    return process.exitcode, said.read_text()


def _in_child(folder: str, argv: list[str], code: str, said: str) -> None:
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    with Path(said).open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    import torch

    torch.set_num_threads(1)
    exec(code, {})
    from moecli.cli.main import run

    sys.exit(run(argv))


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Poll until `reached()`. AssertionError when the process ends first or time is up."""
    until = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, f"ended first: {process.communicate()[1]}"
        assert time.monotonic() < until, "not reached in time"
        time.sleep(0.002)


def has_event(run: Path, **wanted: Any) -> Callable[[], bool]:
    """Whether an event with these values was written."""

    def reached() -> bool:
        return any(_agrees(event, wanted) for event in events(run))

    return reached


def _agrees(event: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(event.get(name) == value for name, value in wanted.items())
