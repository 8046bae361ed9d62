"""The points of a sweep as runs: planned with their model, run over one store, surveyed, written as a SLURM array.

How a sweep is written and where its files lie: `runner.sweep`.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from moecli.core.artifacts import CalibrationStats
from moecli.core.errors import Diagnostic, ExitCode, MoecliError, RecipeError, SurroundingsError, UsageError
from moecli.core.model import ModelSketch
from moecli.io.durable import json_text, read_json, write_text
from moecli.io.store import RunFolder
from moecli.recipe import locate
from moecli.recipe.near import did_you_mean, near
from moecli.recipe.schema import Recipe
from moecli.runner.execute import Listener, RunResult, run
from moecli.runner.open import OpenedRecipe, open_model
from moecli.runner.plan import SOURCE, Plan, key_of, make_plan, option_identity
from moecli.runner.status import StepStatus, status
from moecli.runner.sweep import Sweep

SCHEMA = 1
"""Version of `sweep.json`."""


@dataclass(frozen=True, slots=True)
class PlannedPoint:
    """A point whose recipe fits its model."""

    name: str
    labels: Mapping[str, str]
    plan: Plan


# -- planning ------------------------------------------------------------------------------------------------------


Sketcher = Callable[[str, str | None], tuple[ModelSketch, str]]
"""(model, revision) -> what is known of it, and its key."""


def plan_points(sweep: Sweep, sketch: Sketcher) -> tuple[PlannedPoint, ...]:
    """Every point against its model; points that calibrate alike share one calibration.

    Raises RecipeError with the problems of all points, SurroundingsError when a model cannot be had.
    """
    models: dict[tuple[str, str | None], tuple[ModelSketch, str]] = {}

    def plan(recipe: Recipe) -> Plan:
        of = (recipe.model, recipe.revision)
        if of not in models:
            models[of] = sketch(*of)
        return make_plan(recipe, *models[of])

    found: list[Diagnostic] = []
    plans: list[Plan] = []
    for point in sweep.points:
        try:
            plans.append(plan(point.recipe))
        except RecipeError as error:
            found += error.diagnostics
    if found:
        raise RecipeError(locate.in_file_order(dict.fromkeys(found)), sweep.path)
    _share_calibration(plans)
    plans = [plan(p.recipe) for p in plans]
    return tuple(PlannedPoint(p.name, p.labels, made) for p, made in zip(sweep.points, plans, strict=True))


def _share_calibration(plans: Iterable[Plan]) -> None:
    """Calibrations that are the same but for what their own recipe needs collect what all of them need."""
    needs: dict[str, set[str]] = {}
    members: list[tuple[str, Plan, int]] = []
    for plan in plans:
        for index, step in enumerate(plan.steps):
            if not issubclass(step.stage.output, CalibrationStats):
                continue
            written = option_identity(plan.recipe.stages[step.position].options)
            group = key_of({**step.identity, "options": written})
            readers = [s for s in plan.steps if index in s.inputs.values()]
            needs.setdefault(group, set()).update(n for s in readers for n in s.stage.needs(s.options))
            members.append((group, plan, step.position))
    for group, plan, position in members:
        entry = plan.recipe.stages[position]
        entry._options = entry.options.resolve(tuple(sorted(needs[group])))


# -- what is there -------------------------------------------------------------------------------------------------


def point_folder(folder: Path, name: str) -> Path:
    """The run folder of a point."""
    return folder / "points" / name


def finished(point: PlannedPoint, folder: Path) -> bool:
    """Whether the point's report says what its recipe says now, and its model is there."""
    from moecli.runner import report

    own = point_folder(folder, point.name)
    if any(s.state != "done" for s in status(point.plan, folder)):
        return False
    if point.plan.final != SOURCE and not (own / "model" / "config.json").is_file():
        return False
    try:
        return report.load(own / "report").recipe == point.plan.resolved_recipe()
    except MoecliError:
        return False


@dataclass(frozen=True, slots=True)
class PointStatus:
    """What a point would do now."""

    point: PlannedPoint
    state: Literal["done", "partial", "will run"]
    steps: tuple[StepStatus, ...]
    shared: Mapping[str, str]
    """Key of a step -> the earlier point that makes it."""


def survey(points: Sequence[PlannedPoint], folder: Path) -> list[PointStatus]:
    """The state of every point; reads manifests only."""
    first: dict[str, str] = {}
    found = []
    for point in points:
        steps = tuple(status(point.plan, folder))
        shared = {s.step.key: first[s.step.key] for s in steps if s.step.key in first}
        for step in steps:
            first.setdefault(step.step.key, point.name)
        done = finished(point, folder)
        begun = point_folder(folder, point.name).is_dir()
        found.append(PointStatus(point, "done" if done else "partial" if begun else "will run", steps, shared))
    return found


def write_index(sweep: Sweep, folder: Path) -> None:
    """`sweep.json`: which points there are, for tables and pages."""
    points = [{"name": point.name, "labels": dict(point.labels)} for point in sweep.points]
    value = {"schema": SCHEMA, "name": sweep.name, "file": sweep.path, "points": points}
    write_text(folder / "sweep.json", json_text(value))


class Indexed(NamedTuple):
    """A point as `sweep.json` names it."""

    name: str
    labels: Mapping[str, str]
    folder: Path


def read_index(folder: Path) -> tuple[str, list[Indexed]]:
    """(name, points) of a sweep's folder. Raises SurroundingsError when it is damaged, MoecliError when newer."""
    path = folder / "sweep.json"
    value = read_json(path, hint="`moecli sweep SWEEP.yaml` writes it again")
    version = value.get("schema")
    if isinstance(version, int) and version > SCHEMA:
        raise MoecliError(f"{path} has format {version}, this moecli reads up to {SCHEMA}",
                          hint="`pip install --upgrade moecli`")  # fmt: skip
    try:
        points = [Indexed(p["name"], p["labels"], point_folder(folder, p["name"])) for p in value["points"]]
        return value["name"], points
    except (KeyError, TypeError) as error:
        raise SurroundingsError(f"`{path}` is damaged: no {error}",
                                hint="`moecli sweep SWEEP.yaml` writes it again") from None  # fmt: skip


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def reported(folder: Path) -> bool:
    """Whether any point of a sweep has a report."""
    return any((point.folder / "report" / "report.json").is_file() for point in read_index(folder)[1])


def failure_of(folder: Path) -> str | None:
    """How the last run in a point's folder failed; None when it did not."""
    last = None
    if folder.is_dir():
        for event in RunFolder(folder, create=False).events():
            if event.get("event") in ("run_failed", "run_finished", "stage_started"):
                last = event
    return str(last["message"]) if last and last["event"] == "run_failed" else None


# -- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PointResult:
    """What became of a point."""

    name: str
    state: Literal["done before", "done", "failed"]
    seconds: float
    message: str | None = None
    hint: str | None = None
    code: ExitCode = ExitCode.DONE
    result: RunResult | None = None


def chosen_points(points: Sequence[PlannedPoint], names: Sequence[str]) -> list[PlannedPoint]:
    """The points of these names, in the order of the sweep; all without names. UsageError for one there is not."""
    known = [point.name for point in points]
    for name in names:
        if name not in known:
            hint = did_you_mean(near(name, known), "`--list` shows them")
            raise UsageError(f"the sweep has no point `{name}`", hint=hint)
    return [point for point in points if not names or point.name in names]


def run_points(
    sweep: Sweep, points: Sequence[PlannedPoint], folder: Path, *, device: str = "cpu", listener: Listener | None = None
) -> Iterator[PointResult]:
    """Run the points one after the other, and say of each what became of it. One that fails does not stop the others.

    Raises SurroundingsError when the folder cannot be written or a model cannot be had.
    """
    RunFolder(folder)
    write_index(sweep, folder)
    opened: dict[str, OpenedRecipe] = {}
    for number, point in enumerate(points, 1):
        started = time.monotonic()
        if finished(point, folder):
            yield PointResult(point.name, "done before", 0.0)
            continue
        if listener:
            listener({"event": "point_started", "point": point.name, "number": number, "points": len(points)})
        recipe = point.plan.recipe
        if point.plan.source_key not in opened:
            origin, source = open_model(recipe.model, recipe.revision)
            opened[point.plan.source_key] = OpenedRecipe(point.plan, source, origin)
        result = _run_point(replace(opened[point.plan.source_key], plan=point.plan), point, folder, device, listener)
        yield replace(result, seconds=time.monotonic() - started)


def _run_point(
    opened: OpenedRecipe, point: PlannedPoint, folder: Path, device: str, listener: Listener | None
) -> PointResult:
    own = point_folder(folder, point.name)
    try:
        result = run(opened, own, device=device, listener=listener, store=folder)
        return PointResult(point.name, "done", 0.0, result=result)
    except MoecliError as error:
        where = f" ({error.where})" if error.where else ""
        failed = PointResult(point.name, "failed", 0.0, error.message + where, error.hint, error.code)
    except Exception as error:  # a bug in one method must not cost the other points; it is named, and its trace kept
        log = own / "error.log"
        write_text(log, "".join(traceback.format_exception(error)))
        said = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        message = f"{said}; this is a bug in moecli, the whole trace is in {log}"
        failed = PointResult(point.name, "failed", 0.0, message, None, ExitCode.BUG)
    RunFolder(own).append_event({"time": round(time.time(), 3), "event": "run_failed", "message": failed.message})
    return failed


def exit_code(results: Iterable[PointResult]) -> ExitCode:
    """70 when a point met a bug, 1 when one failed, else 0."""
    codes = [result.code for result in results if result.state == "failed"]
    return ExitCode.BUG if ExitCode.BUG in codes else ExitCode.FAILED if codes else ExitCode.DONE


def slurm_script(sweep: Sweep, folder: Path, device: str | None = None) -> str:
    """One array job, a task for each point. Points are named in it: a later edit of the sweep moves none of them."""
    names = [point.name for point in sweep.points]
    command = [sys.executable, "-m", "moecli", "sweep", str(Path(sweep.path).absolute()), "--run-dir",
               str(folder.absolute()), *(["--device", device] if device else []), "--quiet", "--point"]  # fmt: skip
    listed = "\n".join(f"  {shlex.quote(name)}  # {index}" for index, name in enumerate(names))
    return f"""\
#!/bin/bash
# {len(names)} points of the sweep {sweep.name}. Partition, time and GPUs are options of sbatch:
#   sbatch --gres=gpu:1 --time=4:00:00 THIS_FILE
# Tasks that need the same stage wait for each other, so any number may run at a time; a task that is started again
# goes on where it stopped. `moecli report` and `moecli table` take the folder below when all are done.
#SBATCH --job-name={sweep.name}
#SBATCH --array=0-{len(names) - 1}
#SBATCH --output={folder.absolute()}/slurm-%A_%a.log
set -euo pipefail
points=(
{listed}
)
cd {shlex.quote(str(Path.cwd()))}
exec {shlex.join(command)} "${{points[$SLURM_ARRAY_TASK_ID]}}"
"""
