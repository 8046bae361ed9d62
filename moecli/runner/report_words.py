"""What a report says, in words and Markdown: a pure function of its data. The page uses the same words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from moecli.runner.report import (
    PARTS,
    Calibration,
    Figures,
    MetricRow,
    Part,
    Report,
    SizeRecord,
    SizeSide,
    SpeedEstimate,
    StageRecord,
    Verification,
)

# -- words for numbers ---------------------------------------------------------------------------------------------


def bytes_text(count: float) -> str:
    """Three digits with a binary unit: `61.2 GiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = 0
    while abs(count) >= 1023.5 and step < len(units) - 1:
        count, step = count / 1024, step + 1
    digits = 0 if step == 0 or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f} {units[step]}"


def count_text(count: int) -> str:
    """`30.5 B` (three digits) for large counts, `1,234` for small ones."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {letter}"
    return f"{count:,}"


def duration_text(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 05 s`, `2 h 14 min`"""
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number_text(value: float | None, *, signed: bool = False, size: float | None = None) -> str:
    """Four decimals below ten, as evaluation harnesses print; fewer above; a dash for what was not measured.

    `size` is the number that decides the decimals, where another one stands beside this one.
    """
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if not math.isfinite(value):
        return f"{value:{sign}}"
    size = abs(value) if size is None or not math.isfinite(size) else abs(size)
    return f"{value:{sign}.4f}" if size < 10 else f"{value:{sign}.2f}" if size < 10_000 else f"{value:{sign}.4g}"


def value_texts(value: float | None, stderr: float | None, **options: Any) -> tuple[str, str]:
    """(`0.7412`, `± 0.0088`); the second is empty without a standard error."""
    options = {"size": value} | options
    if value is None or stderr is None:
        return number_text(value, **options), ""
    return number_text(value, **options), "± " + number_text(stderr, size=options["size"])


def value_text(value: float | None, stderr: float | None, **options: Any) -> str:
    """`0.7412 ± 0.0088`, or the value alone."""
    return " ".join(value_texts(value, stderr, **options)).strip()


def delta_texts(row: MetricRow) -> tuple[str, str]:
    """The difference with its sign, to the decimals of the values it came from."""
    return value_texts(row.delta, row.delta_stderr, signed=True, size=row.after)


def metric_name(row: MetricRow) -> str:
    """The metric with the direction that is better: `acc ↑`."""
    return row.metric + {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]


def per_layer_text(counts: Sequence[int]) -> str:
    """`64`, or `48 to 64 (mean 56.2)` where layers differ."""
    if not counts:
        return "–"
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (mean {sum(counts) / len(counts):.1f})"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# -- what the numbers say ------------------------------------------------------------------------------------------


def verdict(report: Report) -> str:
    """One line: what was gained, what it cost, and whether the model may be used."""
    parts = [*_verification_words(report.verification), _size_words(report.size), _metric_words(report.metrics)]
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def _verification_words(verification: Verification | None) -> list[str]:
    if verification is None or verification.status != "failed":
        return []
    failed = ", ".join(check.name for check in verification.checks if not check.passed)
    return ["do not use this model, verification failed" + (f" ({failed})" if failed else "")]


def _size_words(size: SizeRecord | None) -> str:
    if size is None:
        return "size not recorded"
    before, after = size.before, size.after
    if after is None:
        return f"no model was written (the source has {bytes_text(before.bytes)})"
    if before.bytes == after.bytes:
        words = f"same size, {bytes_text(before.bytes)}"
    else:
        ratio = size.ratio or math.inf
        change = f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"
        words = f"{change} ({bytes_text(before.bytes)} → {bytes_text(after.bytes)})"
    if before.experts and after.experts and before.experts != after.experts:
        words += f", {per_layer_text(before.experts)} → {per_layer_text(after.experts)} experts per layer"
    return words


def _metric_words(metrics: Sequence[MetricRow]) -> str:
    compared = [row for row in metrics if row.reading != "not compared"]
    if not metrics:
        return "quality not measured"
    if not compared:
        return "quality not compared with the source"
    count = {r: sum(row.reading == r for row in compared) for r in ("better", "worse", "changed", "no clear change")}
    words = [f"{count['worse']} of {plural(len(compared), 'metric')} clearly worse"]
    worst = max((r for r in compared if r.reading == "worse"), key=_errors_apart, default=None)
    if worst:
        words[0] += f" (most: {worst.task} {worst.metric} {number_text(worst.before)} → {number_text(worst.after)})"
    words += [f"{count['better']} clearly better"]
    words += [f"{count['changed']} changed"] if count["changed"] else []
    words += [f"{count['no clear change']} without clear change"] if count["no clear change"] else []
    return ", ".join(words)


def _errors_apart(row: MetricRow) -> tuple[bool, float]:
    """How sure a difference is; one without a standard error comes after all that have one."""
    known = bool(row.delta_stderr)
    return known, abs(row.delta or 0.0) / (row.delta_stderr or abs(row.before or 0.0) or 1.0)


class LayerCoverage(BaseModel):
    """Tokens per expert of one layer during calibration."""

    layer: int
    experts: int
    least: int
    median: float
    most: int
    starved: tuple[int, ...]
    """Experts that no token reached."""


def coverage(figures: Figures) -> tuple[LayerCoverage, ...]:
    """Coverage by layer, in order; empty when no expert load was recorded."""
    return tuple(_layer_coverage(layer, counts) for layer, counts in sorted(figures.load.items()) if counts)


def _layer_coverage(layer: int, counts: Sequence[int]) -> LayerCoverage:
    ordered, half = sorted(counts), len(counts) // 2
    median = ordered[half] if len(counts) % 2 else (ordered[half - 1] + ordered[half]) / 2
    starved = tuple(expert for expert, count in enumerate(counts) if count == 0)
    return LayerCoverage(
        layer=layer, experts=len(counts), least=ordered[0], median=median, most=ordered[-1], starved=starved
    )


def coverage_text(layers: Sequence[LayerCoverage]) -> str:
    """One sentence on the experts that calibration did not reach."""
    if not layers:
        return "No expert load was recorded in this run."
    experts, starved = sum(c.experts for c in layers), sum(len(c.starved) for c in layers)
    reach = (
        f"Every one of the {experts:,} experts was reached"
        if not starved
        else f"{starved:,} of {plural(experts, 'expert')} ({100 * starved / experts:.1f} %) saw no token"
    )
    least = min(layers, key=lambda c: c.least)
    return f"{reach}; the least used expert saw {plural(least.least, 'token')} (layer {least.layer})."


def size_rows(size: SizeRecord) -> list[tuple[str, str, str, str]]:
    """(what, before, after, what is left) for the size table of every page."""
    before, after = size.before, size.after

    def row(what: str, value: Callable[[SizeSide], int], text: Callable[[int], str]) -> tuple[str, str, str, str]:
        old, new = value(before), value(after) if after else None
        left = f"{100 * new / old:.1f} %" if old and new is not None else "–"
        return what, text(old), "–" if new is None else text(new), left

    rows = [row("total", lambda s: s.bytes, bytes_text), row("parameters", lambda s: s.parameters, count_text)]
    for part in parts_of(size):
        rows += [row(part, partial(_part_bytes, part=part), bytes_text)]
    rows += [_layer_row("experts per layer", before.experts, after.experts if after else ())]
    rows += [_layer_row("router rows per layer", before.router_rows, after.router_rows if after else ())]
    return rows


def _part_bytes(side: SizeSide, part: Part) -> int:
    return side.by_part.get(part, 0)


def _layer_row(what: str, before: Sequence[int], after: Sequence[int]) -> tuple[str, str, str, str]:
    left = f"{100 * sum(after) / sum(before):.1f} %" if sum(before) and after else "–"
    return what, per_layer_text(before), per_layer_text(after), left


def parts_of(size: SizeRecord) -> list[Part]:
    """Parts with bytes on either side, in the order of PARTS."""
    sides = [size.before, size.after or size.before]
    return [part for part in PARTS if any(side.by_part.get(part) for side in sides)]


def experts_left(figures: Figures, layer: int) -> str:
    """Experts of a layer after the run: `0 3 7` or `0(2,5) 3 7(1)`, with what was merged into each in brackets."""
    homes = figures.homes(layer)
    merged: dict[int, list[int]] = {}
    for expert, home in enumerate(homes):
        if home is not None:
            merged.setdefault(home, []).append(expert)
    texts = []
    for home, members in sorted(merged.items()):
        others = ",".join(str(m) for m in members if m != home)
        texts.append(f"{home}({others})" if others else str(home))
    return " ".join(texts)


# -- markdown ------------------------------------------------------------------------------------------------------


def render_markdown(report: Report) -> str:
    """The report as Markdown, a pure function of report.json."""
    sections = [
        f"# {report.name}\n\n**{verdict(report)}.**",
        *([_md_warnings(report.warnings)] if report.warnings else []),
        f"## Quality\n\n{metrics_markdown(report.metrics)}",
        f"## Size\n\n{size_markdown(report.size)}",
        *([f"## Speed on named GPUs\n\n{estimates_markdown(report.estimates)}"] if report.estimates else []),
        f"## Calibration\n\n{_md_calibration(report)}",
        f"## Stages\n\n{_md_stages(report.stages)}",
        f"## Verification\n\n{_md_verification(report.verification)}",
        f"## Recipe\n\n{fenced(report.recipe, 'yaml')}",
        f"## Versions\n\n{_md_versions(report)}",
    ]
    return "\n\n".join(sections) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A pipe table; `right` are the columns to align right."""
    rule = ["---:" if i in set(right) else "---" for i in range(len(head))]
    lines = [list(head), rule, *([_cell(text) for text in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _md(text).replace("|", "\\|")


def _md(text: str) -> str:
    """One line of text that Markdown shows as it is: `<` would open a tag."""
    return _line(text).replace("<", "\\<")


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def metrics_markdown(metrics: Sequence[MetricRow]) -> str:
    """The metric table with its reading, or a line that says that nothing was measured."""
    if not metrics:
        return "No evaluation in this run: what the smaller model lost is not known."
    paired = any(row.paired for row in metrics)
    head = ["task", "metric", "before", "after", "difference", *(PAIRED_HEAD if paired else ()), "samples", "reading"]
    rows = [
        [
            row.task,
            metric_name(row),
            value_text(row.before, row.before_stderr),
            value_text(row.after, row.after_stderr),
            " ".join(delta_texts(row)).strip(),
            *(paired_texts(row) if paired else ()),
            "–" if row.samples is None else f"{row.samples:,}",
            row.reading,
        ]
        for row in metrics
    ]
    table = markdown_table(head, rows, right=range(2, len(head) - 1))
    return "\n\n".join([table, METRIC_LEGEND, *([PAIRED_LEGEND] if paired else [])])


PAIRED_HEAD = ("95 % interval", "lost", "gained", "p")
"""Columns of a comparison document by document."""

PAIRED_LEGEND = (
    "Where both models answered the same documents they are compared document by document: the interval is of the "
    "paired difference, or with × of the ratio after / before; lost and gained count documents that went from right "
    "to wrong and back, p is McNemar's exact test. There, clear means that the interval leaves no change out."
)


def paired_texts(row: MetricRow) -> tuple[str, str, str, str]:
    """(interval, lost, gained, p) of the paired comparison; dashes for what was not compared or cannot be."""
    paired = row.paired
    if paired is None:
        return "–", "–", "–", "–"
    ratio = paired.scale == "ratio"
    ends = [number_text(end, signed=not ratio, size=1.0 if ratio else row.after) if end is not None else "" for end in
            (paired.low, paired.high)]  # fmt: skip
    interval = f"{'× ' if ratio else ''}[{ends[0]}, {ends[1]}]" if all(ends) else "–"
    counts = ["–" if count is None else f"{count:,}" for count in (paired.lost, paired.gained)]
    p = "–" if paired.p is None else "< 0.001" if paired.p < 0.001 else f"{paired.p:.3f}"
    return interval, counts[0], counts[1], p


METRIC_LEGEND = (
    "± is one standard error. The error of a difference treats both evaluations as independent; "
    "a change is called clear when it exceeds two of them, or when no standard error is known. "
    "↑ higher is better, ↓ lower is better."
)


def size_markdown(size: SizeRecord | None) -> str:
    """The size table, or a line that says that sizes are missing."""
    if size is None:
        return "Sizes were not recorded in this run."
    table = markdown_table(["", "before", "after", "left"], size_rows(size), right=(1, 2, 3))
    return table if size.after else table + "\n\nNo model was written in this run."


def estimates_table(estimates: Sequence[SpeedEstimate]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a GPU a row, tokens/s of each step before and after."""
    steps = list(dict.fromkeys((e.what, e.batch) for e in estimates))
    cell = {(e.gpu, e.what, e.batch): _estimate_text(e) for e in estimates}
    rows = [
        [gpu, *(cell[gpu, what, batch] for what, batch in steps)] for gpu in dict.fromkeys(e.gpu for e in estimates)
    ]
    return ["estimate, tokens/s", *(f"{what}, batch {batch}" for what, batch in steps)], rows


def _estimate_text(one: SpeedEstimate) -> str:
    return f"{one.before:,.0f}" + ("" if one.after is None else f" → {one.after:,.0f}")


def estimates_text(estimates: Sequence[SpeedEstimate]) -> str:
    """What keeps the table apart from measurements."""
    tokens = estimates[0].tokens
    memory = {e.batch: e for e in estimates if e.what == "decode"}
    needs = "; ".join(
        f"{bytes_text(e.before_bytes)}{'' if e.after_bytes is None else f' → {bytes_text(e.after_bytes)}'} "
        f"at batch {batch}"
        for batch, e in memory.items()
    )
    return (
        f"Estimate, not measured: the most that each GPU's memory bandwidth and arithmetic allow at {tokens:,} tokens "
        "of context, with weights read as they are stored and independent routing. Real programs are slower, most of "
        f"all at small batches. Memory with the cache: {needs}."
    )


def estimates_markdown(estimates: Sequence[SpeedEstimate]) -> str:
    head, rows = estimates_table(estimates)
    return f"{markdown_table(head, rows, right=range(1, len(head)))}\n\n{estimates_text(estimates)}"


def _md_warnings(warnings: Sequence[str]) -> str:
    return "## Warnings\n\n" + "\n".join(f"- {_md(text)}" for text in warnings)


def _line(text: str) -> str:
    return " ".join(text.split())


def _md_calibration(report: Report) -> str:
    if report.calibration is None and not report.figures_data.load:
        return "No calibration in this run."
    layers, lines = coverage(report.figures_data), []
    if report.calibration:
        lines += [f"- {name}: {_md(text)}" for name, text in calibration_rows(report.calibration)] + [""]
    lines += [coverage_text(layers)]
    if layers:
        head = ["layer", "experts", "least", "median", "most", "without a token"]
        rows = [
            [str(c.layer), f"{c.experts:,}", f"{c.least:,}", f"{c.median:,.0f}", f"{c.most:,}", f"{len(c.starved):,}"]
            for c in layers
        ]
        lines += ["", markdown_table(head, rows, right=range(6))]
    return "\n".join(lines)


def calibration_rows(calibration: Calibration) -> list[tuple[str, str]]:
    """(name, text) of what is known of the calibration data."""
    rows = [
        (name.replace("_", " "), plain_text(value)) for name, value in calibration.source.items() if name != "tokens"
    ]
    return [*rows, ("tokens through each MoE layer", f"{calibration.tokens:,}")]


def plain_text(value: Any) -> str:
    """A JSON value in one line of words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {plain_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain_text(item) for item in value)
    large = isinstance(value, int) and value >= 10_000
    return f"{value:,}" if large else _line(str(value))


def _md_stages(stages: Sequence[StageRecord]) -> str:
    if not stages:
        return "No stage was run."
    head = ["stage", "id", "key", "state", "time", "CPU peak", "GPU peak"]
    rows = [
        [s.name, s.id, s.key[:12], stage_state(s), duration_text(s.seconds), *map(peak_text, peaks(s))] for s in stages
    ]
    text = markdown_table(head, rows, right=(4, 5, 6)) + "\n\n" + stages_text(stages)
    notes = [f"- {s.id}: {_md(note)}" for s in stages for note in s.notes]
    return text + ("\n\nNotes:\n\n" + "\n".join(notes) if notes else "")


def stage_state(stage: StageRecord) -> str:
    return "cached" if stage.cached else "run"


def peaks(stage: StageRecord) -> tuple[int | None, int | None]:
    return stage.peak_cpu_bytes, stage.peak_gpu_bytes


def peak_text(peak_bytes: int | None) -> str:
    return "–" if peak_bytes is None else bytes_text(peak_bytes)


def stages_text(stages: Sequence[StageRecord]) -> str:
    """What of the times belongs to this run."""
    cached = sum(s.cached for s in stages)
    spent = duration_text(sum(s.seconds for s in stages if not s.cached))
    if cached == len(stages):
        return "Every stage came from an earlier run; the times are from then."
    if not cached:
        return f"All stages together took {spent}."
    return f"This run took {spent}; {plural(cached, 'stage')} came from an earlier run, with the time spent then."


def _md_verification(verification: Verification | None) -> str:
    if verification is None:
        return "The written model was not verified in this run."
    lines = [f"Status: {verification.status}."]
    if verification.checks:
        rows = [[c.name, "passed" if c.passed else "FAILED", c.detail] for c in verification.checks]
        lines += ["", markdown_table(["check", "result", "detail"], rows)]
    return "\n".join(lines)


def version_rows(report: Report) -> list[tuple[str, str]]:
    """(name, text) of versions, device and source."""
    source, environment = report.source, report.environment
    rows = [("source model", source.name), ("revision", source.revision), ("digest", source.digest)]
    rows += [("export", report.export), ("moecli", report.created_by)]
    rows += [(name, getattr(environment, name)) for name in ("python", "torch", "transformers")]
    rows += sorted(environment.packages.items())
    rows += [("device", environment.device), ("created", report.created)]
    return [(name, text) for name, text in rows if text]


def _md_versions(report: Report) -> str:
    return "\n".join(f"- {name}: {_md(text)}" for name, text in version_rows(report))
