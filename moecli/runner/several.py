"""Several runs side by side: which are the same but for their seed, what each measured, and which are on the frontier.

A run is on the frontier of a metric when no other run (nor the source) is at most as large and at least as good, with
one of the two strictly. It is judged by what was measured: two runs whose errors overlap may swap places.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moecli.core.errors import SurroundingsError, UsageError
from moecli.core.stage import RunSetting
from moecli.io.durable import write_text
from moecli.runner import lookup
from moecli.runner.points import failure_of, is_sweep, read_index
from moecli.runner.report import MetricRow, Report, SizeSide
from moecli.runner.report import load as load_report

Key = tuple[str, str]
"""(task, metric)"""
SOURCE_NAME = "source"


@dataclass(frozen=True, slots=True)
class Run:
    """One run with its report."""

    name: str
    folder: Path
    labels: Mapping[str, str]
    """Axis -> value, for a point of a sweep."""
    report: Report


@dataclass(frozen=True, slots=True)
class Missing:
    """A point of a sweep without a report."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of a row. With several seeds `value` is their mean and `spread` their standard deviation."""

    value: float
    spread: float | None
    """One standard error of the evaluation; of several seeds the standard deviation (n - 1) over them."""
    seeds: int = 1
    samples: int | None = None
    rows: tuple[MetricRow, ...] = ()
    """What the reports say of it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: the source, or one recipe with all of its seeds."""

    name: str
    runs: tuple[Run, ...]
    cells: Mapping[Key, Cell]
    size: SizeSide | None
    is_source: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        return len(self.runs)


@dataclass(frozen=True, slots=True)
class Several:
    """Everything a table or a page of several runs shows."""

    name: str
    rows: tuple[Row, ...]
    """Sources first, then runs in the order given."""
    columns: Mapping[Key, bool | None]
    """(task, metric) -> whether higher is better, in order of first appearance."""
    missing: tuple[Missing, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the sweeps that the runs belong to; what seeds are averaged over is none."""
        return tuple(dict.fromkeys(axis for row in self.rows for axis in row.labels))


# -- reading -------------------------------------------------------------------------------------------------------


def load(places: Sequence[str | Path], metrics: Sequence[str] = ()) -> Several:
    """Runs and sweeps by their folders, put side by side. `metrics` keeps only these (`acc`, or `task.acc`).

    Raises UsageError for a folder that is no run, SurroundingsError for a run without a report (points of a sweep are
    listed as missing instead), MoecliError for a report that is damaged or newer.
    """
    runs: list[Run] = []
    missing: list[Missing] = []
    names: list[str] = []
    for place in places:
        folder = Path(place)
        if is_sweep(folder):
            name, points = read_index(folder)
            names.append(name)
            for point in points:
                if (point.folder / "report" / "report.json").is_file():
                    report = load_report(point.folder / "report")
                    runs.append(Run(point.name, point.folder, point.labels, report))
                else:
                    missing.append(Missing(point.name, _why_missing(point.folder)))
        else:
            runs.append(Run(folder.resolve().name, folder, {}, _report_of(folder)))
    if not runs:
        raise SurroundingsError(f"no point of `{places[0]}` has a report yet",
                                hint="`moecli sweep SWEEP.yaml --dry-run` shows what is left")  # fmt: skip
    runs = _distinct(runs)
    return _several(" and ".join(names) or f"{len(runs)} runs", runs, missing, metrics)


def _report_of(folder: Path) -> Report:
    if not folder.is_dir():
        raise UsageError(f"there is no run in `{folder}`")
    if not (folder / "report" / "report.json").is_file():
        if not (folder / "recipe.yaml").is_file():
            raise UsageError(f"`{folder}` is not a run folder: it has no recipe.yaml")
        raise SurroundingsError(f"the run in `{folder}` stopped before its report was written",
                                hint=f"`moecli run {folder / 'recipe.yaml'} --run-dir {folder}` goes on")  # fmt: skip
    return load_report(folder / "report")


def _why_missing(folder: Path) -> str:
    if failure := failure_of(folder):
        return f"failed: {failure}"
    return "stopped before its end" if folder.is_dir() else "not run yet"


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name get their folders for names."""
    count: dict[str, int] = {}
    for run in runs:
        count[run.name] = count.get(run.name, 0) + 1
    return [
        Run(str(run.folder), run.folder, run.labels, run.report) if count[run.name] > 1 else run for run in runs
    ]  # fmt: skip


def _several(name: str, runs: Sequence[Run], missing: Sequence[Missing], metrics: Sequence[str]) -> Several:
    columns: dict[Key, bool | None] = {}
    for run in runs:
        for row in run.report.metrics:
            columns.setdefault((row.task, row.metric), row.higher_is_better)
    columns = _chosen(columns, metrics)
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault((*_origin(run.report), _without_seed(run.report)), []).append(run)
    rows = [*_sources(runs, columns), *(_row(group, columns) for group in groups.values())]
    return Several(name, tuple(rows), columns, tuple(missing), tuple(_differences(runs)))


def _chosen(columns: Mapping[Key, bool | None], metrics: Sequence[str]) -> dict[Key, bool | None]:
    from moecli.recipe.near import did_you_mean, near

    words = {word for task, metric in columns for word in (metric, f"{task}.{metric}")}
    for wanted in metrics:
        if wanted not in words:
            hint = did_you_mean(near(wanted, words), f"there are {', '.join(sorted(words))}")
            raise UsageError(f"no run has the metric `{wanted}`", hint=hint)
    return {
        (task, metric): better
        for (task, metric), better in columns.items()
        if not metrics or {metric, f"{task}.{metric}"} & set(metrics)
    }


def _recipe(report: Report) -> dict[str, Any]:
    values = yaml.safe_load(report.recipe)
    return values if isinstance(values, dict) else {}


def _without_seed(report: Report) -> str:
    """What makes two runs the same but for their seed: the recipe, less what cannot change a result."""
    values = {key: value for key, value in _recipe(report).items() if key not in ("seed", "name", "expected")}
    return yaml.safe_dump(values | {"stages": _stages(report)}, sort_keys=True)


def _stages(report: Report) -> list[dict[str, Any]]:
    """The stages of a run's recipe without their run settings."""
    found = []
    for stage in _recipe(report).get("stages", []):
        name = str(stage.get("run", ""))
        fields = lookup.find(name).options.model_fields if name in lookup.names() else {}
        free = {n for n, info in fields.items() if any(isinstance(mark, RunSetting) for mark in info.metadata)}
        options = {key: value for key, value in stage.get("with", {}).items() if key not in free}
        found.append(stage | {"run": name, "with": options})
    return found


def _origin(report: Report) -> tuple[str, str | None]:
    return report.source.name, report.source.digest


def _evaluation(report: Report) -> dict[str, Any]:
    """Settings of the evaluations of a run."""
    return {
        f"{stage['run']} {key}": value
        for stage in _stages(report)
        if stage["run"].startswith("eval/")
        for key, value in stage["with"].items()
    }


def _differences(runs: Sequence[Run]) -> Iterable[str]:
    """What of the evaluations is not the same in all runs: their numbers do not compare."""
    found = [_evaluation(run.report) for run in runs]
    for key in dict.fromkeys(key for settings in found for key in settings):
        values = list(dict.fromkeys(repr(settings[key]) for settings in found if key in settings))
        if len(values) > 1:
            yield f"the runs were not evaluated alike: {key} is {' or '.join(values)}"
    if len({_origin(run.report) for run in runs}) > 1:
        yield "the runs start from different source models"


def _sources(runs: Sequence[Run], columns: Mapping[Key, bool | None]) -> list[Row]:
    """A row for each source model and way of evaluating it: the mean over the seeds it was evaluated with."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr((_origin(run.report), sorted(_evaluation(run.report).items()))), []).append(run)
    rows = []
    for number, group in enumerate(groups.values(), 1):
        by_seed = {_recipe(run.report).get("seed"): run for run in reversed(group)}
        cells = {key: cell for key in columns if (cell := _cell(list(by_seed.values()), key, "before"))}
        size = next((run.report.size.before for run in group if run.report.size), None)
        if cells or size:
            name = SOURCE_NAME if len(groups) == 1 else f"{SOURCE_NAME} {number}"
            rows.append(Row(name, tuple(by_seed.values()), cells, size, True))
    return rows


def _row(group: Sequence[Run], columns: Mapping[Key, bool | None]) -> Row:
    cells = {key: cell for key in columns if (cell := _cell(group, key, "after"))}
    size = next((run.report.size.after for run in group if run.report.size), None)
    first, name = group[0], group[0].name
    labels = dict(first.labels)
    if len(group) > 1:
        name = re.sub(r"-?\bseed\d+\b", "", name) or name
        labels.pop("seed", None)
    return Row(name, tuple(group), cells, size, False, labels)


def _cell(group: Sequence[Run], key: Key, side: str) -> Cell | None:
    found = [row for run in group for row in run.report.metrics if (row.task, row.metric) == key]
    measured = [(row, getattr(row, side)) for row in found if getattr(row, side) is not None]
    if not measured:
        return None
    values = [value for _, value in measured]
    rows = tuple(row for row, _ in measured)
    if len(values) == 1:
        return Cell(values[0], getattr(rows[0], f"{side}_stderr"), 1, rows[0].samples, rows)
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else None
    return Cell(math.fsum(values) / len(values), spread, len(values), rows[0].samples, rows)


# -- the frontier --------------------------------------------------------------------------------------------------


def frontier(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[bool]:
    """For each (size, value) whether no other point is at most as large and at least as good, one of them strictly.

    Points with a value that is not finite are never on it and keep none off it. O(n log n).
    """
    sign = 1.0 if higher_is_better else -1.0
    order = sorted((size, -sign * value, i) for i, (size, value) in enumerate(points) if math.isfinite(value))
    on = [False] * len(points)
    best = math.inf
    last: tuple[float, float] | None = None
    for size, loss, i in order:
        if loss < best or (size, loss) == last:
            on[i] = True
            best, last = loss, (size, loss)
    return on


def on_frontier(several: Several, key: Key) -> list[Row]:
    """The rows on the frontier of a metric, smallest first; empty when nobody says which direction is better."""
    better = several.columns[key]
    rows = [row for row in several.rows if row.size is not None and key in row.cells]
    if better is None:
        return []
    flags = frontier([(row.size.bytes, row.cells[key].value) for row in rows if row.size], better)
    chosen = [row for row, flag in zip(rows, flags, strict=True) if flag]
    return sorted(chosen, key=lambda row: row.size.bytes if row.size else 0)


# -- pages ---------------------------------------------------------------------------------------------------------


def write_pages(several: Several, folder: Path) -> Path:
    """`report.html`, `report.md`, `table.csv` and `table.tex` of several runs in `folder`; the path of the page."""
    from moecli.runner.report_html import render_several
    from moecli.runner.table import csv_table, latex_table, several_markdown

    write_text(folder / "report.md", several_markdown(several))
    write_text(folder / "table.csv", csv_table(several))
    write_text(folder / "table.tex", latex_table(several))
    write_text(folder / "report.html", render_several(several, links(several, folder)))
    return folder / "report.html"


def links(several: Several, folder: Path) -> dict[str, str]:
    """Name of a run -> its own page, as seen from `folder`."""
    found = {}
    for row in several.rows:
        page = row.runs[0].folder / "report" / "report.html"
        if not row.is_source and row.seeds == 1 and page.is_file():
            found[row.name] = Path(os.path.relpath(page.resolve(), folder.resolve())).as_posix()
    return found
