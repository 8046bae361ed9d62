"""The model card: `model/README.md` in the hub's metadata format.

It is part of `model/`, so it is a pure function of the recipe and its results: no times, hosts or folders of this
machine, and the same recipe writes the same bytes again.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import yaml

from moecli.runner.report import (
    MetricRow,
    Report,
    fenced,
    metrics_markdown,
    size_markdown,
)

_RELATIONS = (("quantize", "quantized"), ("merge", "merge"))
"""Kind of stage -> the hub's `base_model_relation`; a pruned model counts as a finetune there."""


def render_card(report: Report, base_model: str | None = None) -> str:
    """The card of a finished run. `base_model` is a hub id; without one the source's folder name stands for it."""
    base = base_model or PurePath(report.source.name).name
    head = yaml.safe_dump(metadata(report, base), sort_keys=False, allow_unicode=True, width=1000)
    sections = [
        f"---\n{head}---",
        f"# {base}, {report.name}",
        f"A smaller version of `{base}`, made by [moecli](#how-it-was-made) {report.created_by}.",
        size_markdown(report.size),
        metrics_markdown(report.metrics),
        "## How to load it\n\n" + _loading(report),
        "## How it was made\n\n" + _making(report),
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def metadata(report: Report, base: str) -> dict[str, Any]:
    """Front matter as the hub's documentation has it."""
    kinds = {stage.name.partition("/")[0] for stage in report.stages}
    relation = next((name for kind, name in _RELATIONS if kind in kinds), "finetune")
    methods = sorted(
        {stage.name.partition("/")[2] for stage in report.stages} - {"statistics", "lm-eval", "perplexity"}
    )
    data: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": relation,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moecli", "mixture-of-experts", "compression", *methods],
    }
    if hub := _hub_dataset(report):
        data["datasets"] = [hub]
    if report.metrics:
        data["model-index"] = [{"name": f"{base}, {report.name}", "results": _results(report.metrics)}]
    return data


def _hub_dataset(report: Report) -> str | None:
    """The calibration data set, where it is one of the hub's."""
    name = str(report.calibration.source.get("dataset", "")) if report.calibration else ""
    name = name.partition("[")[0].partition("(")[0].partition(":")[0]
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and "." not in name else None


def _results(metrics: tuple[MetricRow, ...]) -> list[dict[str, Any]]:
    """One entry for each task, as `model-index` wants it."""
    by_task: dict[str, list[MetricRow]] = {}
    for row in metrics:
        if row.after is not None:
            by_task.setdefault(row.task, []).append(row)
    return [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": task, "name": task},
            "metrics": [{"type": r.metric, "name": r.metric, "value": r.after} for r in rows],
        }
        for task, rows in by_task.items()
    ]


def _loading(report: Report) -> str:
    stock = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER"
    if report.export != "compact":
        return "Plain transformers, nothing else needed:\n\n" + fenced(stock + ")", "python")
    return (
        "Its experts are merged behind an alias map, which plain transformers does not know. Either\n\n"
        + fenced("import moecli\n" + stock + ")", "python")
        + "\n\nor, with nothing of moecli installed, through the file beside the weights:\n\n"
        + fenced(stock + ", trust_remote_code=True)", "python")
    )


def _making(report: Report) -> str:
    papers = dict.fromkeys(f"[{p}](https://arxiv.org/abs/{p})" for stage in report.stages for p in stage.papers)
    lines = [_calibrated(report), fenced(report.recipe.strip(), "yaml")]
    if papers:
        lines.append("Papers: " + ", ".join(papers))
    return "\n\n".join(line for line in lines if line)


def _calibrated(report: Report) -> str:
    if report.calibration is None:
        return ""
    data = PurePath(str(report.calibration.source.get("dataset", "unknown"))).name
    return f"Calibrated on {report.calibration.tokens:,} tokens of `{data}`."
