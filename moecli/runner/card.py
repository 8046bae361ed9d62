"""The model card: `model/README.md` in the hub's metadata format.

It is part of `model/`, so it is a pure function of the recipe and its results: no times, hosts or folders of this
machine, and the same recipe writes the same bytes again. Notes and warnings stay in the report: they may name both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import yaml

from moecli.runner.report import MetricRow, Report
from moecli.runner.report_words import fenced, metrics_markdown, plain_text, size_markdown

_RELATIONS = (("quantize", "quantized"), ("merge", "merge"))
"""Kind of stage -> the hub's `base_model_relation`; a pruned model counts as a finetune there."""

_TAGS = (
    ("prune", "expert-pruning"),
    ("merge", "expert-merging"),
    ("slim", "expert-slimming"),
    ("quantize", "quantized"),
)
"""Kind of stage -> tag."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDERS = re.compile(r"""(?:file://|(?<![\w/.]))~?/(?![/\s])(?:[^/\n"',\[\]{}]+/)*""")
"""Everything of an absolute path before its last name."""


def render_card(
    report: Report, base_model: str | None = None, *, language: Sequence[str] = (), license: str | None = None
) -> str:
    """The card of a finished run. `base_model` is a hub id; without one the source's folder name stands in the text.

    `language` holds ISO 639-1 codes, `license` the hub's identifier; what is not known is left out.
    """
    base = base_model or PurePath(report.source.name).name
    known = metadata(report, base_model) | ({"license": license} if license else {})
    head = yaml.safe_dump(
        ({"language": list(language)} if language else {}) | known, sort_keys=False, allow_unicode=True, width=1000
    )
    sections = [
        f"---\n{head}---",
        f"# {base}, {report.name}",
        f"A smaller version of `{base}`, made by [moecli](#how-it-was-made) {report.created_by}.",
        "## What it cost\n\n" + metrics_markdown(report.metrics),
        "## Size\n\n" + size_markdown(report.size),
        "## How to load it\n\n" + _loading(report),
        "## How it was made\n\n" + _making(report),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def metadata(report: Report, base_model: str | None = None) -> dict[str, Any]:
    """Front matter as the hub's documentation has it. A source that is no hub model is not named: the hub would
    look for it there."""
    kinds = {stage.name.partition("/")[0] for stage in report.stages}
    methods = sorted(
        {s.name.partition("/")[2] for s in report.stages if not s.name.startswith(("calibrate/", "eval/"))}
    )
    data: dict[str, Any] = {}
    if base_model:
        relation = next((name for kind, name in _RELATIONS if kind in kinds), "finetune")
        data |= {"base_model": base_model, "base_model_relation": relation}
    data |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = [
        "moe",
        "mixture-of-experts",
        "moecli",
        "compression",
        *(tag for kind, tag in _TAGS if kind in kinds),
        *methods,
    ]
    data["tags"] = list(dict.fromkeys(tags))
    if hub := [name for name in _dataset_names(report) if _HUB_ID.fullmatch(name)]:
        data["datasets"] = hub
    if results := _results(report.metrics):
        data["model-index"] = [{"name": report.name, "results": results}]
    return data


def _results(metrics: Sequence[MetricRow]) -> list[dict[str, Any]]:
    """One entry for each task, as `model-index` wants it. YAML on the hub has no infinities: such rows are left out."""
    by_task: dict[str, list[MetricRow]] = {}
    for row in metrics:
        if row.after is not None and math.isfinite(row.after):
            by_task.setdefault(row.task, []).append(row)
    return [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": task, "name": task},
            "metrics": [_result(row) for row in rows],
        }
        for task, rows in by_task.items()
    ]


def _result(row: MetricRow) -> dict[str, Any]:
    known = {"stderr": row.after_stderr, "before": row.before, "samples": row.samples}
    args = {name: _six_digits(value) for name, value in known.items() if value is not None and math.isfinite(value)}
    measured = {"type": row.metric, "name": row.metric, "value": _six_digits(row.after)}
    return measured | ({"args": args} if args else {})


def _six_digits(value: float | None) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _loading(report: Report) -> str:
    checks = report.verification.checks if report.verification else ()
    if not any(check.name == "adapter" for check in checks):
        return _loading_model(report)
    return _loading_model(report) + (
        "\n\nThat is the packed model without its corrections, which the figures above are of. PEFT adds those of "
        "attention, shared experts and dense layers; those of routed experts it can add only where experts are modules "
        "of their own:\n\n"
        + fenced(
            'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, FOLDER + "/adapter")', "python"
        )
    )


def _loading_model(report: Report) -> str:
    stock = "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER"
    if report.export == "gptq":
        vllm = "from vllm import LLM\n\nmodel = LLM(model=FOLDER)"
        return "vLLM, at 4 and 8 bits; stock transformers does not load GPTQ's layout:\n\n" + fenced(vllm, "python")
    if report.export != "compact":
        return "Plain transformers, nothing else needed:\n\n" + fenced(stock + ")", "python")
    return (
        "Its experts are stored in a form that plain transformers does not know. Either\n\n"
        + fenced("import moecli\n" + stock + ")", "python")
        + "\n\nor, with nothing of moecli installed, through the file beside the weights:\n\n"
        + fenced(stock + ", trust_remote_code=True)", "python")
    )


def _making(report: Report) -> str:
    papers = dict.fromkeys(f"[{p}](https://arxiv.org/abs/{p})" for stage in report.stages for p in stage.papers)
    verification = report.verification.status if report.verification else "not run"
    lines = [
        _steps(report),
        _calibrated(report),
        f"Verification of the written model: {verification}.",
        "The recipe, with every default written out:\n\n" + fenced(without_folders(report.recipe), "yaml"),
        _source(report),
        "Papers: " + ", ".join(papers) if papers else "",
    ]
    return "\n\n".join(line for line in lines if line)


def _steps(report: Report) -> str:
    names = list(dict.fromkeys(stage.name for stage in report.stages))
    return "Steps: " + " → ".join(f"`{name}`" for name in names) + "." if names else "No stage was run."


def _source(report: Report) -> str:
    known = [("revision", report.source.revision), ("digest", report.source.digest)]
    words = [f"{name} `{value}`" for name, value in known if value]
    return "Source model: " + ", ".join(words) + "." if words else ""


def _calibrated(report: Report) -> str:
    if report.calibration is None:
        return "No calibration data was used."
    data = ", ".join(f"`{without_folders(name)}`" for name in _dataset_names(report, whole=True))
    tokens = f"{report.calibration.tokens:,} tokens"
    samples = report.calibration.source.get("samples")
    length = report.calibration.source.get("tokens_per_sample")
    how = f", {samples:,} samples of {length:,}" if isinstance(samples, int) and isinstance(length, int) else ""
    digest = report.calibration.source.get("digest")
    which = f" (digest `{plain_text(digest)}`)" if digest else ""
    return f"Calibrated on {tokens} of {data or 'unnamed data'}{which}{how}."


def _dataset_names(report: Report, *, whole: bool = False) -> list[str]:
    """Calibration data sets, from a name, a mapping with `dataset`, or a list of either.

    `whole` keeps `org/name[config](split)` as the recipe has it; else the name alone is left, as the hub knows it.
    """
    value = report.calibration.source.get("dataset") if report.calibration else None
    entries = value if isinstance(value, (list, tuple)) else [value]
    named = [entry.get("dataset") if isinstance(entry, dict) else entry for entry in entries]
    names = [plain_text(name) for name in named if name]
    return list(dict.fromkeys(names if whole else (re.split(r"[\[(:@]", name, maxsplit=1)[0] for name in names)))


def without_folders(text: str) -> str:
    """Text with absolute paths cut to their last name: where a file lay on one machine helps nobody on another."""
    return _FOLDERS.sub("", text)
