"""lm-eval's results as an Evaluation: from the values it returns, or from the files its own command writes.

results_<date>.json            the table, with versions and settings
samples_<task>_<date>.jsonl    one line a document (and filter), with `--log_samples`
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moecli.core.artifacts import Column, Evaluation, Items, Metric
from moecli.core.errors import SurroundingsError, UsageError
from moecli.io.durable import read_json

Results = Mapping[str, Any]
Samples = Mapping[str, Sequence[Mapping[str, Any]]]

_DIGITS = 16
"""Hex digits of a document's digest that are kept: 64 bits."""


def evaluation_of(
    results: Results,
    samples: Samples,
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Evaluation:
    """`settings` are those that results do not tell, or tell less well."""
    found = metrics(results)
    values = {(metric.task, metric.metric): metric.value for metric in found}
    items = [*(_items(task, rows, values) for task, rows in samples.items()), *_groups(results)]
    return Evaluation(tuple(found), settings_of(results) | dict(settings or {}), dict(files or {}), tuple(items))


def metrics(results: Results) -> list[Metric]:
    """lm-eval's result table as metrics; a standard error of "N/A" becomes None.

    Perplexities of rolling tasks have no standard error in lm-eval.
    """
    found = []
    for task, row in sorted(results["results"].items()):
        samples = (
            results["n-samples"].get(task, {}).get("effective") or row.get("sample_count") or row.get("sample_len") or 0
        )
        if isinstance(samples, Mapping):
            samples = next(iter(samples.values()))
        for key, value in row.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{name}_stderr,{filtered}")
            stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            better = results["higher_is_better"].get(task, {}).get(name)
            found.append(Metric(task, label(name, filtered), float(value), stderr, int(samples), better))
    return found


def label(metric: str, filtered: str) -> str:
    """`acc`, or `exact_match (strict-match)` behind a filter."""
    return metric if filtered == "none" else f"{metric} ({filtered})"


def settings_of(results: Results) -> dict[str, Any]:
    """What lm-eval itself records of the settings that must agree before two results are compared."""
    config = results["config"]
    dtype = str(config.get("model_dtype") or "").removeprefix("torch.")
    batch_size = config.get("batch_size")
    known = {
        "harness": f"lm-eval {results.get('lm_eval_version')}",
        "backend": config.get("model") or None,
        "batch_size": int(batch_size) if str(batch_size).isdigit() else batch_size,
        "dtype": dtype or None,
        "max_length": results.get("max_length"),
        "special_tokens": {name: results.get(f"tokenizer_{name}_token") for name in ("bos", "eos", "pad")},
    }
    machine = {"transformers": results.get("transformers_version"), "device": config.get("device")}
    return {name: value for name, value in known.items() if value is not None} | {
        "limit": _whole(config.get("limit")),
        "generation": config.get("gen_kwargs") or {},
        "seeds": {name: config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")},
        "template": results.get("chat_template_sha"),
        "system_instruction": results.get("system_instruction_sha"),
        "tasks": {task: _task_settings(results, task) for task in results["versions"]},
        "environment": {name: value for name, value in machine.items() if value is not None},
    }


def _whole(limit: float | None) -> float | None:
    """12 for the 12.0 of lm-eval's own command; a share stays what it is."""
    return int(limit) if limit is not None and limit == int(limit) else limit


def _task_settings(results: Results, task: str) -> dict[str, Any]:
    config = results.get("configs", {}).get(task, {})
    return {
        "version": results["versions"][task],
        "num_fewshot": results.get("n-shot", {}).get(task),
        "generation": config.get("generation_kwargs"),
        "repeats": config.get("repeats"),
    }


# -- items


def _items(task: str, rows: Sequence[Mapping[str, Any]], values: Mapping[tuple[str, str], float]) -> Items:
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["doc_id"])):
        by_filter.setdefault(row["filter"], []).append(row)
    documents = next(iter(by_filter.values()), [])
    columns = {}
    for filtered, found in by_filter.items():
        for name in found[0]["metrics"]:
            total = values.get((task, label(name, filtered)))
            column = None if total is None else _column([row.get(name) for row in found], total)
            if column is not None and len(found) == len(documents):
                columns[label(name, filtered)] = column
    docs = tuple(f"{row['doc_id']}:{row['doc_hash'][:_DIGITS]}" for row in documents)
    prompts = tuple(row["prompt_hash"][:_DIGITS] + row["target_hash"][:_DIGITS] for row in documents)
    return Items(task, docs, prompts, columns)


def _column(values: Sequence[Any], total: float) -> Column | None:
    """Values as a column of the form that gives lm-eval's own total; None when no form does."""
    if all(isinstance(value, bool | int | float) for value in values):
        numbers = tuple(float(value) for value in values)
        candidates = [Column("mean", numbers), Column("perplexity", numbers)]
    elif all(_is_pair(value) for value in values):
        numbers, weights = (tuple(float(value[i]) for value in values) for i in (0, 1))
        candidates = [Column("perplexity", numbers, weights), Column("bits", numbers, weights)]
    else:
        return None
    return next((c for c in candidates if _same(c, total)), None)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def _same(column: Column, total: float) -> bool:
    try:
        return math.isclose(column.total(), total, rel_tol=1e-9, abs_tol=1e-12)
    except (OverflowError, ZeroDivisionError):
        return False


def _groups(results: Results) -> Iterator[Items]:
    """Groups with the tasks at their ends; a group of groups has the tasks of all."""
    children = results.get("group_subtasks", {})

    def leaves(name: str) -> Iterable[str]:
        return [leaf for child in children[name] for leaf in leaves(child)] if children.get(name) else [name]

    for group, below in children.items():
        if below:
            yield Items(group, (), (), {}, tuple(dict.fromkeys(leaves(group))))


# -- files


def is_results(path: Path) -> bool:
    """Whether `path` is lm-eval's results file, or a folder with one in it or one level below."""
    return path.name.startswith("results") and path.suffix == ".json" if path.is_file() else bool(_result_files(path))


def read_results(path: Path) -> Evaluation:
    """What lm-eval's own command wrote. UsageError when there are several results to choose from;
    SurroundingsError when samples are missing or a file is damaged.
    """
    file = path if path.is_file() else _only(path, _result_files(path))
    results = read_json(file)
    if not {"results", "versions", "config", "n-samples", "higher_is_better"} <= results.keys():
        raise SurroundingsError(f"`{file}` is not a results file of lm-eval 0.4")
    date = file.stem.removeprefix("results")
    samples = {task: _read_rows(_samples_file(file, task, date)) for task in results["n-samples"]}
    try:
        return evaluation_of(results, samples)
    except (KeyError, ValueError, TypeError) as error:
        raise SurroundingsError(f"`{file}` or its samples are damaged: {type(error).__name__} {error}") from error


def _result_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("results*.json"), *folder.glob("*/results*.json")])


def _only(folder: Path, files: Sequence[Path]) -> Path:
    if len(files) > 1:
        newest = max(files, key=lambda file: re.sub(r"^results_?", "", file.stem))
        raise UsageError(f"`{folder}` has {len(files)} results files", hint=f"name one, such as `{newest}`")
    return files[0]


def _samples_file(results: Path, task: str, date: str) -> Path:
    file = results.with_name(f"samples_{task}{date}.jsonl")
    if not file.is_file():
        raise SurroundingsError(
            f"`{results}` has no samples of `{task}` beside it", hint="run lm_eval again with `--log_samples`"
        )
    return file


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise SurroundingsError(f"`{file}` is damaged: line {number} is not JSON") from None
    return rows
