"""Two evaluations document by document: how much worse, how sure, how many answers flipped.

Only what was measured the same way is compared. Settings that decide the numbers (task version, few-shot, template,
tokenizer, batch size, dtype, limit, seeds, longest context, harness) must agree, and so must the documents and what was
asked about each; the environment should, and is noted where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecli.core.artifacts import Column, Evaluation, Items, Metric
from moecli.core.errors import SurroundingsError, UsageError
from moecli.io import harness
from moecli.io.durable import read_json
from moecli.io.store import KEY_DIGITS, StageFolder, load_artifact
from moecli.ops import paired
from moecli.runner import lookup
from moecli.runner.execute import RUN_FORMAT
from moecli.runner.report import MetricRow, Paired

_ADD_EVALUATION = "add an `eval/...` stage at the end of its recipe"

_SHOWN = 8
"""Differing settings that one message spells out."""


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of one model. Later evaluations of a task and metric replace earlier ones."""

    name: str
    evaluations: Mapping[str, Evaluation]
    """By the stage that made it."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A, task by task, then totals over the tasks that share a metric."""

    a: str
    b: str
    rows: tuple[MetricRow, ...]
    totals: tuple[MetricRow, ...]
    notes: tuple[str, ...]
    """What was not compared and why, and what could not be checked."""

    def as_json(self) -> dict[str, Any]:
        rows = {name: [row.model_dump(mode="json") for row in getattr(self, name)] for name in ("rows", "totals")}
        return {"a": self.a, "b": self.b, **rows, "notes": list(self.notes)}


# -- reading


def load_sides(a: str, b: str | None) -> tuple[Side, Side]:
    """Both sides of `moecli compare A [B]`; without `b` the source of the run `a` and what it made of it."""
    if b is not None:
        return load_side(a), load_side(b)
    folder = Path(a)
    if not _is_run(folder):
        raise UsageError(f"`{a}` is not a run, so it needs a second side", hint="`moecli compare A B`")
    before, after = _run_evaluations(folder)
    if not before or not after:
        missing = "its source" if after else "the model it made"
        raise UsageError(f"`{a}` has no evaluation of {missing}", hint=_ADD_EVALUATION)
    return Side(f"{a} (source)", before), Side(a, after)


def load_side(name: str) -> Side:
    """A run folder, one evaluation's folder in it, or lm-eval's results.

    A run's evaluations are those of the model it made; of the source, where it made none. UsageError when the path is
    none of these, SurroundingsError when it is damaged, half-written or newer than this moecli.
    """
    path = Path(name)
    if not path.exists():
        raise UsageError(f"there is no `{name}`")
    if _is_run(path):
        before, after = _run_evaluations(path)
        if not (after or before):
            raise UsageError(f"`{name}` has no evaluation", hint=_ADD_EVALUATION)
        return Side(name, after or before)
    folder = path.parent if path.name == "artifact.json" else path
    if (folder / "artifact.json").is_file():
        return Side(name, {folder.parent.name.replace("-", "/", 1): _artifact(folder)})
    if folder.suffix == ".partial" or (folder / "parts").is_dir():
        raise SurroundingsError(f"`{name}` is an evaluation that was not finished")
    if harness.is_results(path):
        return Side(name, {"eval/lm-eval": harness.read_results(path)})
    raise UsageError(f"`{name}` holds no evaluation", hint="name a run, an evaluation in it, or lm-eval's results")


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "events.jsonl").is_file()


def _artifact(folder: Path) -> Evaluation:
    kind = read_json(folder / "artifact.json").get("kind")
    if kind != Evaluation.__name__:
        raise UsageError(f"`{folder}` holds {kind}, not an evaluation")
    return load_artifact(folder, "artifact", Evaluation)


def _run_evaluations(run: Path) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Evaluations of the source and of what a run made, by stage label without ` (source)`."""
    if not (run / "manifest.json").is_file():
        raise SurroundingsError(
            f"the run `{run}` did not finish: it has no manifest.json",
            hint=f"`moecli run {run / 'recipe.yaml'} --run-dir {run}` goes on with it",
        )
    manifest = read_json(run / "manifest.json")
    if manifest.get("format", 1) > RUN_FORMAT:
        raise SurroundingsError(
            f"the run `{run}` has format {manifest['format']}, this moecli reads up to {RUN_FORMAT}",
            hint="`pip install --upgrade moecli`",
        )
    before: dict[str, Evaluation] = {}
    after: dict[str, Evaluation] = {}
    try:
        stages = [(stage["label"], stage["stage"], stage["key"]) for stage in manifest["stages"]]
        source_key = manifest["source_key"]
    except (KeyError, TypeError) as error:
        raise SurroundingsError(f"`{run / 'manifest.json'}` is damaged: no {error}") from error
    for label, name, key in stages:
        if not name.startswith("eval/") or not issubclass(lookup.find(name).output, Evaluation):
            continue
        folder = StageFolder(run / "stages" / name.replace("/", "-", 1) / key[:KEY_DIGITS])
        inputs = folder.manifest()["identity"]["inputs"].values()
        (before if source_key in inputs else after)[label.removesuffix(" (source)")] = folder.load(Evaluation)
    return before, after


# -- comparing


def compare(a: Side, b: Side) -> Comparison:
    """Every task that both sides measured. UsageError when settings or documents differ, or nothing is shared."""
    notes: list[str] = []
    measured = [_by_task(side) for side in (a, b)]
    shared = [task for task in measured[0] if task in measured[1]]
    if not shared:
        names = [", ".join(f"`{task}`" for task in side) or "nothing" for side in measured]
        raise UsageError(f"no task was measured on both sides: {names[0]} in A, {names[1]} in B")
    for letter, side, other in (("A", *measured), ("B", *reversed(measured))):
        alone = [f"`{task}`" for task in side if task not in other]
        notes += [f"only {letter} has {', '.join(alone)}"] if alone else []
    sides = [[side[task] for task in shared] for side in measured]
    notes += _check_settings(shared, *sides)
    rows: list[MetricRow] = []
    pools: list[_Pool] = []
    for task, old, new in zip(shared, *sides, strict=True):
        for row, pool in _rows(task, old, new):
            rows.append(row)
            pools += [pool] if pool else []
    unpaired = [f"`{row.task} {row.metric}`" for row in rows if row.paired is None]
    notes += [f"not compared document by document: {', '.join(unpaired)}"] if unpaired else []
    return Comparison(a.name, b.name, tuple(rows), tuple(_totals(rows, pools, sides[0])), tuple(notes))


def pair(before: Evaluation, after: Evaluation) -> tuple[dict[tuple[str, str], Paired], list[str]]:
    """(task, metric) -> comparison of two evaluations of one run, and notes on what could not be compared."""
    sides = (Side("before", {"": before}), Side("after", {"": after}))
    if not before.items or not after.items:
        return {}, []
    try:
        found = compare(*sides)
    except UsageError as error:
        return {}, [f"evaluations are not compared document by document: {error.message}"]
    return {(row.task, row.metric): row.paired for row in found.rows if row.paired is not None}, []


def _by_task(side: Side) -> dict[str, Evaluation]:
    return {metric.task: found for found in side.evaluations.values() for metric in found.metrics}


def _check_settings(tasks: Sequence[str], before: Sequence[Evaluation], after: Sequence[Evaluation]) -> list[str]:
    """Notes on what could not be checked. UsageError names each setting that differs, with both values."""
    differing: dict[str, tuple[Any, Any]] = {}
    unknown: dict[str, str] = {}
    elsewhere: dict[str, tuple[Any, Any]] = {}
    for task, old, new in zip(tasks, before, after, strict=True):
        flat = [_flat(found.settings, task) for found in (old, new)]
        for name in dict.fromkeys([*flat[0], *flat[1]]):
            if name not in flat[0] or name not in flat[1]:
                unknown[name] = "A" if name not in flat[0] else "B"
            elif flat[0][name] != flat[1][name]:
                values = (flat[0][name], flat[1][name])
                (elsewhere if name.startswith("environment.") else differing)[name] = values
    if differing:
        several = f"{len(differing)} settings differ" if len(differing) > 1 else "a setting differs"
        said = "; ".join(_both(name, *values) for name, values in list(differing.items())[:_SHOWN])
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UsageError(
            f"the two sides were not measured the same way, {several}: {said}{more}",
            hint="evaluate one of them again with the settings of the other",
        )
    notes = [_both(name.removeprefix("environment."), *values) for name, values in elsewhere.items()]
    for letter in ("A", "B"):
        names = [f"`{name.removeprefix('environment.')}`" for name, side in unknown.items() if side == letter]
        notes += [f"could not be checked, as {letter} does not record it: {', '.join(names)}"] if names else []
    return notes


def _flat(settings: Mapping[str, Any], task: str, above: str = "") -> dict[str, Any]:
    """Dotted name -> value; of what holds for single tasks only this one's, under the task's name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if not above and name == "tasks":
            flat |= _flat(value.get(task, {}), task, f"{task}.")
        elif isinstance(value, Mapping) and value:
            flat |= _flat(value, task, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat


def _both(name: str, a: Any, b: Any) -> str:
    return f"`{name}` is {_short(a)} in A and {_short(b)} in B"


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- one metric


@dataclass(frozen=True, slots=True)
class _Pool:
    """Documents of one row, for totals: the stratum, and flips where outcomes are right or wrong."""

    task: str
    metric: str
    form: str
    stratum: paired.Stratum
    flips: tuple[int, int] | None
    """(lost, gained)"""


def _rows(task: str, before: Evaluation, after: Evaluation) -> Iterator[tuple[MetricRow, _Pool | None]]:
    new_metrics = {metric.metric: metric for metric in after.metrics if metric.task == task}
    columns = [_columns(found, task) for found in (before, after)]
    order = _order(task, _documents(before, task), _documents(after, task))
    for old in before.metrics:
        new = new_metrics.get(old.metric) if old.task == task else None
        if new is None:
            continue
        pool = None
        if order is not None and all(old.metric in side for side in columns):
            pool = _pool(task, old.metric, columns[0][old.metric], columns[1][old.metric], order)
        yield _row(old, new, _paired([pool]) if pool else None), pool


def _row(old: Metric, new: Metric, found: Paired | None) -> MetricRow:
    return MetricRow(
        task=old.task, metric=old.metric, before=old.value, before_stderr=old.stderr, after=new.value,
        after_stderr=new.stderr, samples=min(old.samples, new.samples), higher_is_better=new.higher_is_better,
        paired=found,
    )  # fmt: skip


def _members(found: Evaluation, task: str) -> list[Items]:
    """The items of a task, or of every task that a group pools; empty where some are missing."""
    by_task = {items.task: items for items in found.items}
    own = by_task.get(task)
    if own is None:
        return []
    return [by_task[m] for m in own.members if m in by_task] if own.members else [own]


def _documents(found: Evaluation, task: str) -> dict[str, str]:
    """Document -> digest of what was asked about it, in order."""
    return {
        f"{items.task} {doc}": prompt
        for items in _members(found, task)
        for doc, prompt in zip(items.docs, items.prompts, strict=True)
    }


def _columns(found: Evaluation, task: str) -> dict[str, Column]:
    """By metric; of a group those that pooling its documents reproduces."""
    members = _members(found, task)
    if len(members) < 2:
        return dict(members[0].columns) if members else {}
    values = {metric.metric: metric.value for metric in found.metrics if metric.task == task}
    pooled = {}
    for name, value in values.items():
        parts = [items.columns[name] for items in members if name in items.columns]
        if len(parts) == len(members) and len({(part.form, bool(part.weights)) for part in parts}) == 1:
            column = Column(parts[0].form, *(tuple(x for p in parts for x in getattr(p, f)) for f in _PARTS))
            if math.isclose(column.total(), value, rel_tol=1e-9, abs_tol=1e-12):
                pooled[name] = column
    return pooled


_PARTS = ("values", "weights")


def _order(task: str, before: Mapping[str, str], after: Mapping[str, str]) -> list[int] | None:
    """Where each document of A is in B; None without documents. UsageError when they are not the same ones."""
    if not before or not after:
        return None
    if before.keys() != after.keys():
        only = [len(before.keys() - after.keys()), len(after.keys() - before.keys())]
        raise UsageError(f"`{task}` was measured on other documents: {only[0]} only in A, {only[1]} only in B")
    other = [doc for doc in before if before[doc] != after[doc]]
    if other:
        more = f" and of {len(other) - 1} more" if len(other) > 1 else ""
        raise UsageError(
            f"`{task}` asks differently: the prompt or the expected answer of document "
            f"{other[0].split(' ')[-1].partition(':')[0]}{more} is not the same"
        )
    place = {doc: index for index, doc in enumerate(after)}
    return [place[doc] for doc in before]


def _pool(task: str, metric: str, old: Column, new: Column, order: Sequence[int]) -> _Pool | None:
    if old.form != new.form:
        return None
    after = [new.values[i] for i in order]
    weights = [new.weights[i] for i in order] if new.weights else []
    if list(old.weights) != weights:
        raise UsageError(f"`{task}` weighs documents differently in `{metric}`: the texts or the tokenizer differ")
    sign = 1.0 if old.form == "mean" else -1.0
    scale = math.log(2) if old.form == "bits" else 1.0
    stratum = paired.stratum([sign * (b - a) / scale for a, b in zip(old.values, after, strict=True)], weights)
    flips = None
    if old.form == "mean" and not weights and set(old.values) | set(after) <= {0.0, 1.0}:
        changes = [b - a for a, b in zip(old.values, after, strict=True)]
        flips = (changes.count(-1.0), changes.count(1.0))
    return _Pool(task, metric, old.form, stratum, flips)


def _paired(pools: Sequence[_Pool]) -> Paired:
    """One row's pool, or several for a total: tasks weigh the same, documents are resampled within tasks."""
    strata = [pool.stratum for pool in pools]
    flips = [pool.flips for pool in pools if pool.flips is not None]
    items = sum(len(s.num_N) for s in strata)
    estimate, error = paired.difference(strata), paired.standard_error(strata)
    ends = paired.interval(strata)
    lost = gained = p = detectable = None
    if len(flips) == len(pools):
        lost, gained = (sum(direction) for direction in zip(*flips, strict=True))
        p = paired.mcnemar(lost, gained)
        if ends is None:
            bound = paired.no_flip_bound([len(s.num_N) for s in strata])
            ends = (max(-1.0, estimate - bound), min(1.0, estimate + bound))
        if len(pools) == 1:
            detectable = paired.detectable(items, (lost + gained) / items)
    if pools[0].form == "perplexity":
        estimate = math.exp(estimate)
        error = None if error is None else error * estimate
        ends = None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
    low, high = ends or (None, None)
    return Paired(
        scale="ratio" if pools[0].form == "perplexity" else "difference", estimate=estimate, stderr=error, low=low,
        high=high, items=items, p=p, lost=lost, gained=gained, detectable=detectable,
    )  # fmt: skip


def _totals(rows: Sequence[MetricRow], pools: Sequence[_Pool], before: Sequence[Evaluation]) -> Iterator[MetricRow]:
    """For each metric that several tasks share, the mean over tasks; a group counts as one task.

    Values of perplexities are geometric means. p is the sign test on all flips together: under no change each flip is
    as likely to go either way, whatever task it is in.
    """
    tasks = {row.task for row in rows}
    inside = {m for found in before for items in found.items if items.task in tasks for m in items.members}
    by_key: dict[tuple[str, str], list[_Pool]] = {}
    for pool in pools:
        if pool.task not in inside:
            by_key.setdefault((pool.metric, pool.form), []).append(pool)
    known = {(row.task, row.metric): row for row in rows}
    for (metric, form), group in by_key.items():
        if len(group) < 2:
            continue
        members = [known[pool.task, metric] for pool in group]
        found = _paired(group)
        yield MetricRow(
            task=f"mean of {len(group)} tasks", metric=metric, before=_mean([m.before for m in members], form),
            after=_mean([m.after for m in members], form), samples=found.items,
            higher_is_better=members[0].higher_is_better, paired=found,
        )  # fmt: skip


def _mean(values: Sequence[float | None], form: str) -> float:
    known = [value for value in values if value is not None]
    if form == "perplexity":
        return math.exp(math.fsum(map(math.log, known)) / len(known))
    return math.fsum(known) / len(known)
