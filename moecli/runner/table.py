"""The table of several runs: Markdown, CSV and LaTeX, and expected numbers beside the measured ones."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moecli.core.errors import Diagnostic, MoecliError, RecipeError, UsageError
from moecli.recipe import locate
from moecli.recipe.near import did_you_mean, near
from moecli.recipe.schema import Expected
from moecli.recipe.words import Explainer
from moecli.runner.report_words import bytes_text, markdown_table, number_text, per_layer_text, plural, value_text
from moecli.runner.several import Cell, Key, Row, Several, on_frontier

FORMATS = ("md", "csv", "latex")


def direction(better: bool | None) -> str:
    """An arrow towards what is better."""
    return {True: " ↑", False: " ↓", None: ""}[better]


def column_names(several: Several) -> list[str]:
    """`arc acc ↑`; the task is left out where there is only one."""
    tasks = {task for task, _ in several.columns}
    return [
        (metric if len(tasks) == 1 else f"{task} {metric}") + direction(better)
        for (task, metric), better in several.columns.items()
    ]


def cell_text(cell: Cell | None) -> str:
    """`0.5123 ± 0.0241`, with the number of seeds where there are several."""
    if cell is None:
        return "–"
    return value_text(cell.value, cell.spread) + (f" ({cell.seeds} seeds)" if cell.seeds > 1 else "")


def size_cells(row: Row, several: Several) -> list[str]:
    """Bytes, how many times smaller than its source, experts per layer."""
    if row.size is None:
        return ["–", "–", "–"]
    before = row.runs[0].report.size
    ratio = f"{before.before.bytes / row.size.bytes:.2f}×" if before and row.size.bytes and not row.is_source else "–"
    return [bytes_text(row.size.bytes), ratio, per_layer_text(row.size.experts)]


LEGEND = (
    "± is one standard error of the evaluation; where several seeds are averaged it is the standard deviation over "
    "them. ↑ higher is better, ↓ lower is better."
)


def markdown(several: Several) -> str:
    """The table in Markdown, with what is missing or does not compare below it."""
    head = ["run", "size", "times smaller", "experts", *column_names(several)]
    rows = [
        [row.name, *size_cells(row, several), *(cell_text(row.cells.get(key)) for key in several.columns)]
        for row in several.rows
    ]
    lines = [markdown_table(head, rows, right=range(1, len(head)))]
    if several.columns:
        lines.append(LEGEND)
    lines += [f"**{warning}.**" for warning in several.warnings]
    if several.missing:
        lines.append("Not in the table:\n\n" + "\n".join(f"- {m.name}: {m.reason}" for m in several.missing))
    return "\n\n".join(lines) + "\n"


def frontier_words(several: Several) -> list[str]:
    """One sentence for each metric that has a direction: the runs on its frontier, smallest first."""
    sentences = []
    for (task, metric), name in zip(several.columns, column_names(several), strict=True):
        rows = on_frontier(several, (task, metric))
        if len(several.rows) > 1 and rows:
            told = ", ".join(
                f"{row.name} ({bytes_text(row.size.bytes)}: {number_text(row.cells[task, metric].value)})"
                for row in rows
                if row.size
            )
            sentences.append(f"{name}: {told}")
    return sentences


def several_markdown(several: Several) -> str:
    """`report.md` of several runs: the table, and each metric's frontier."""
    text = f"# {several.name}\n\n{markdown(several)}"
    if found := frontier_words(several):
        text += "\n## Frontier\n\nNo other run is at most as large and at least as good:\n\n"
        text += "\n".join(f"- {sentence}" for sentence in found) + "\n"
    return text


def csv_table(several: Several) -> str:
    """One line a row, everything at full precision; seeds and axes have columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["run", "seeds", *several.axes, "bytes", "parameters", "experts_mean"]
    for task, metric in several.columns:
        head += [f"{task} {metric}", f"{task} {metric} error"]
    writer.writerow(head)
    for row in several.rows:
        size = row.size
        experts = sum(size.experts) / len(size.experts) if size and size.experts else None
        cells: list[Any] = [row.name, row.seeds, *(row.labels.get(axis, "") for axis in several.axes)]
        cells += [size.bytes, size.parameters, experts] if size else [None, None, None]
        for key in several.columns:
            cell = row.cells.get(key)
            cells += [cell.value, cell.spread] if cell else [None, None]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


# -- LaTeX ---------------------------------------------------------------------------------------------------------


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "→": r"$\to$", "∞": r"$\infty$", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def latex_table(several: Several) -> str:
    r"""A `tabular` with booktabs rules: tasks above their metrics. Needs `\usepackage{booktabs}` and, for `"` in
    names, T1 fonts."""
    by_task: dict[str, list[tuple[Key, bool | None]]] = {}
    for key, better in several.columns.items():
        by_task.setdefault(key[0], []).append((key, better))
    keys = [key for columns in by_task.values() for key, _ in columns]
    lines = [
        rf"% {several.name.replace(chr(10), ' ')}",
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{l" + "r" * (3 + len(keys)) + "}",
        r"\toprule",
    ]
    if by_task:
        groups = [rf"\multicolumn{{{len(c)}}}{{c}}{{{latex_text(task)}}}" for task, c in by_task.items()]
        lines += [" & & & & " + " & ".join(groups) + r" \\", _rules(list(by_task.values()))]
    metrics = [metric + direction(better) for columns in by_task.values() for (_, metric), better in columns]
    lines += [_latex_row(["run", "size", "times smaller", "experts", *metrics]), r"\midrule"]
    for i, row in enumerate(several.rows):
        cells = [row.name, *size_cells(row, several), *(cell_text(row.cells.get(key)) for key in keys)]
        if i and several.rows[i - 1].is_source and not row.is_source:
            lines.append(r"\midrule")
        lines.append(_latex_row(cells))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _rules(groups: Sequence[Sequence[Any]]) -> str:
    start, rules = 5, []
    for group in groups:
        rules.append(rf"\cmidrule(lr){{{start}-{start + len(group) - 1}}}")
        start += len(group)
    return " ".join(rules)


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(latex_text(cell) for cell in cells) + r" \\"


# -- expected numbers ----------------------------------------------------------------------------------------------


class ExpectedOf(Expected):
    """A number expected of some runs."""

    run: str | None = None
    """The row it belongs to, or `source`; every run without it."""


class ExpectedFile(BaseModel):
    """A file of expected numbers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    expected: list[ExpectedOf]
    """What should come out."""


@dataclass(frozen=True, slots=True)
class Compared:
    """An expected number beside the measured one."""

    run: str
    expected: Expected
    measured: float | None

    @property
    def difference(self) -> float | None:
        return None if self.measured is None else self.measured - self.expected.value

    @property
    def agrees(self) -> bool:
        """Within the tolerance; the ends belong to it, up to rounding of the difference itself."""
        if self.difference is None or math.isnan(self.difference):
            return False
        slack = 1e-12 * max(abs(self.expected.value), abs(self.measured or 0.0))
        return abs(self.difference) <= self.expected.tolerance + slack


def compare_expected(several: Several, path: str | None = None) -> list[Compared]:
    """Expected numbers of the runs' own recipes, then those of a file.

    Raises UsageError when there is no such file, RecipeError for what is wrong in it.
    """
    found = []
    for row in several.rows:
        if not row.is_source:
            own = _recipe_expected(row)
            found += [Compared(row.name, one, _measured(row, one)) for one in own]
    for one in _read_expected(path, several) if path else []:
        rows = [r for r in several.rows if one.run in _called(r)] if one.run else [
            r for r in several.rows if not r.is_source]  # fmt: skip
        found += [Compared(row.name, one, _measured(row, one)) for row in rows]
    return found


def _called(row: Row) -> set[str]:
    return {row.name} if row.is_source else {row.name, *(run.name for run in row.runs)}


def _measured(row: Row, expected: Expected) -> float | None:
    cell = row.cells.get((expected.task, expected.metric))
    return cell.value if cell else None


def _recipe_expected(row: Row) -> list[Expected]:
    values = [entry for run in row.runs for entry in (yaml.safe_load(run.report.recipe) or {}).get("expected", [])]
    try:
        found = [Expected.model_validate(value) for value in values]
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise MoecliError(f"the recipe of {row.name} has an `expected` that cannot be read ({where})") from None
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _read_expected(path: str, several: Several) -> list[ExpectedOf]:
    try:
        located, problems = locate.read(Path(path))
    except UsageError as error:
        raise UsageError(error.message.replace("recipe", "file of expected numbers"), hint=error.hint) from None
    if not isinstance(located.values, dict):
        message = "expected numbers stand in a mapping with the one key `expected`"
        raise RecipeError((Diagnostic(message, located.place("")),), located.path)
    try:
        file = ExpectedFile.model_validate_json(json.dumps(located.values))
    except ValidationError as error:
        explainer = Explainer(located, "", ExpectedFile, lambda p: "an expected value" if p else "the file", "key")
        problems += explainer.diagnostics(located.values, error.errors(include_url=False))
        raise RecipeError(locate.in_file_order(problems), located.path) from None
    names = {name for row in several.rows for name in _called(row)}
    for i, one in enumerate(file.expected):
        if one.run is not None and one.run not in names:
            hint = did_you_mean(near(one.run, names), f"the runs are {', '.join(sorted(names))}")
            problems.append(Diagnostic(f"no run is called `{one.run}`", located.place(f"expected.{i}.run"), hint))
        if (one.task, one.metric) not in several.columns:
            known = {f"{task} {metric}" for task, metric in several.columns}
            hint = did_you_mean(near(f"{one.task} {one.metric}", known), f"there are {', '.join(sorted(known))}")
            message = f"no run has `{one.metric}` of the task `{one.task}`"
            problems.append(Diagnostic(message, located.place(f"expected.{i}"), hint))
    if problems:
        raise RecipeError(locate.in_file_order(problems), located.path)
    return file.expected


_EXPECTED_HEAD = ["run", "task", "metric", "expected", "measured", "difference", "tolerance", "agrees", "source"]


def expected_rows(compared: Sequence[Compared]) -> list[list[str]]:
    """A line for each expected number."""
    return [
        [
            c.run,
            c.expected.task,
            c.expected.metric,
            number_text(c.expected.value),
            "not measured" if c.measured is None else number_text(c.measured, size=c.expected.value),
            number_text(c.difference, signed=True, size=c.expected.value),
            f"{c.expected.tolerance:g}",
            "yes" if c.agrees else "NO",
            c.expected.source,
        ]
        for c in compared
    ]


def expected_markdown(compared: Sequence[Compared]) -> str:
    """The comparison as a table, and how many agree."""
    agree = sum(c.agrees for c in compared)
    table = markdown_table(_EXPECTED_HEAD, expected_rows(compared), right=(3, 4, 5, 6))
    return f"{table}\n\n{agree} of {plural(len(compared), 'expected number')} within tolerance\n"


def _expected_csv(compared: Sequence[Compared]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_EXPECTED_HEAD)
    for c in compared:
        e = c.expected
        values = [c.run, e.task, e.metric, e.value, c.measured, c.difference, e.tolerance, c.agrees, e.source]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


def _expected_latex(compared: Sequence[Compared]) -> str:
    lines = [r"\begin{tabular}{lllrrrrll}", r"\toprule", _latex_row(_EXPECTED_HEAD), r"\midrule"]
    lines += [_latex_row(row) for row in expected_rows(compared)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_RENDER: Mapping[str, tuple[Callable[[Several], str], Callable[[Sequence[Compared]], str]]] = {
    "md": (markdown, expected_markdown),
    "csv": (csv_table, _expected_csv),
    "latex": (latex_table, _expected_latex),
}


def render(several: Several, compared: Sequence[Compared], how: str) -> str:
    """The table in one of `FORMATS`, expected numbers below it."""
    table, expected = _RENDER[how]
    return table(several) + (f"\n{expected(compared)}" if compared else "")


def document(several: Several, compared: Sequence[Compared]) -> dict[str, Any]:
    """The same as plain values."""
    rows = [
        {
            "name": row.name,
            "source": row.is_source,
            "axes": dict(row.labels),
            "runs": [str(run.folder) for run in row.runs],
            "bytes": row.size.bytes if row.size else None,
            "metrics": [
                {"task": task, "metric": metric, "value": cell.value, "error": cell.spread, "seeds": cell.seeds,
                 "samples": cell.samples}
                for (task, metric), cell in row.cells.items()
            ],
        }
        for row in several.rows
    ]  # fmt: skip
    return {
        "name": several.name,
        "rows": rows,
        "missing": [{"name": m.name, "reason": m.reason} for m in several.missing],
        "warnings": list(several.warnings),
        "expected": [
            {"run": c.run, **c.expected.model_dump(include=set(Expected.model_fields)), "measured": c.measured,
             "agrees": c.agrees}
            for c in compared
        ],
    }  # fmt: skip
