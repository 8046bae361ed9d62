"""The report as one page: no request leaves it, it prints, it follows the reader's light or dark setting.

Text and tables come from the same functions as `report.md`; this file adds figures and the numbers behind them.
The page works without JavaScript; with it, tables sort by column.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli import __version__
from moecli.runner import figures as draw
from moecli.runner import report_words as words
from moecli.runner.report import Chart, Figures, MetricRow, Report, SizeRecord

if TYPE_CHECKING:
    from moecli.runner.several import Key, Row, Several

TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: Report) -> str:
    """The whole page, a pure function of report.json."""
    return str(
        _template("report.html.j2").render(
            report=report,
            words=words,
            verdict=words.verdict(report),
            tiles=_tiles(report),
            metrics=[_metric(row) for row in report.metrics],
            paired=any(row.paired for row in report.metrics),
            size=_size(report.size),
            load=_load(report.figures_data),
            tree=_tree(report.figures_data),
            charts=[chart for one in report.figures_data.charts if (chart := _chart(one))],
            coverage=words.coverage(report.figures_data),
            css=_text("report.css"),
            js=_text("report.js"),
            heat_labels=draw.HEAT_LABELS,
        )
    )


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["blank"] = lambda value: "" if value is None else value
    return jinja.get_template(name)


def _text(name: str) -> Any:
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8").strip())


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(what, number, detail) of the facts a reader looks for first."""
    tiles = []
    size = report.size
    if size and size.after and size.ratio:
        detail = f"{words.bytes_text(size.before.bytes)} → {words.bytes_text(size.after.bytes)}"
        tiles.append(("smaller", f"{size.ratio:.2f}×", detail))
    if size and size.after and size.after.experts and size.before.experts:
        before, after = (words.per_layer_text(side.experts) for side in (size.before, size.after))
        mean = sum(size.after.experts) / len(size.after.experts)
        shown = after if len(set(size.after.experts)) == 1 else f"{mean:.1f}"
        tiles.append(("experts per layer", shown, f"of {before}" if shown == after else f"{after}, of {before}"))
    compared = [row for row in report.metrics if row.reading != "not compared"]
    if compared:
        worse = sum(row.reading == "worse" for row in compared)
        tiles.append(("metrics clearly worse", str(worse), f"of {len(compared)} compared"))
    if report.verification is None:
        return [*tiles, ("verification", "not run", "the model was not verified")]
    return [
        *tiles,
        ("verification", report.verification.status, words.plural(len(report.verification.checks), "check")),
    ]


def _metric(row: MetricRow) -> dict[str, Any]:
    before, after = draw.Dot(row.before, row.before_stderr), draw.Dot(row.after, row.after_stderr)
    bounds = draw.dot_bounds(before, after)
    plot = ""
    if bounds:
        plot = draw.metric_dots(before, after, words.number_text(bounds[0]), words.number_text(bounds[1]), bounds)
    return {"row": row, "plot": _markup(plot), "tone": row.reading.replace(" ", "-")}


def _size(size: SizeRecord | None) -> dict[str, Any] | None:
    if size is None:
        return None
    sides = [("total", size.before.bytes, size.after.bytes if size.after else None)]
    for part in words.parts_of(size):
        sides.append((part, size.before.by_part.get(part, 0), size.after.by_part.get(part, 0) if size.after else None))
    bars = [
        draw.Bar(label, before, after, words.bytes_text(before), "" if after is None else words.bytes_text(after))
        for label, before, after in sides
    ]
    return {"rows": words.size_rows(size), "bars": _markup(draw.size_bars(bars)), "sides": sides}


def _load(data: Figures) -> dict[str, Any] | None:
    """The heatmap and the numbers behind it; None without counts."""
    load = {layer: counts for layer, counts in sorted(data.load.items()) if counts}
    if not load:
        return None
    homes = {layer: data.homes(layer) for layer in load}
    return {
        "svg": _markup(draw.load_heatmap(load, homes)),
        "rows": [(n, f"{sum(c):,}", " ".join(map(str, c)), words.experts_left(data, n)) for n, c in load.items()],
        "dropped": any(home is None for layer in homes.values() for home in layer),
        "merged": any(home is not None and home != e for layer in homes.values() for e, home in enumerate(layer)),
    }


def _tree(data: Figures) -> dict[str, Any] | None:
    """The dendrogram of the middle layer that has one."""
    layers = [layer for layer, tree in sorted(data.dendrograms.items()) if tree.linkage]
    if not layers:
        return None
    layer = layers[len(layers) // 2]
    tree = data.dendrograms[layer]
    return {
        "layer": layer,
        "layers": len(layers),
        "experts": len(tree.groups),
        "groups": _groups(tree.groups),
        "joins": [(int(a), int(b), f"{distance:.6g}", int(size)) for a, b, distance, size in tree.linkage],
        "svg": _markup(draw.dendrogram(tree.linkage, tree.groups)),
    }


def _chart(chart: Chart) -> dict[str, Any] | None:
    """A chart of a stage, with its numbers; None when there is nothing to draw."""
    lines = [draw.Line(line.name, line.x, line.y, line.error) for line in chart.series]
    drawn = draw.line_chart(lines, chart.x_label, chart.y_label, chart.title, chart.log_x, chart.log_y)
    if not drawn:
        return None
    at = sorted({x for line in chart.series for x in line.x})
    columns = [dict(zip(line.x, line.y, strict=True)) for line in chart.series]
    return {
        "title": chart.title,
        "caption": f"{chart.title}. {chart.caption}",
        "svg": _markup(drawn),
        "lines": [(line.name, draw.look(i)) for i, line in enumerate(chart.series)],
        "head": [chart.x_label, *(line.name for line in chart.series)],
        "rows": [[f"{x:.10g}", *("" if (y := c.get(x)) is None else f"{y:.10g}" for c in columns)] for x in at],
    }


def _groups(groups: Sequence[int]) -> list[tuple[int, str]]:
    return [(g, " ".join(str(e) for e, at in enumerate(groups) if at == g)) for g in sorted(set(groups))]


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


# -- several runs --------------------------------------------------------------------------------------------------


Fronts = Mapping["Key", Collection[int]]
"""Metric -> ids of the rows on its frontier."""
MOST_PLOTS = 8
"""Metrics that get a frontier plot; the table has all."""


def render_several(several: Several, links: Mapping[str, str]) -> str:
    """One page for several runs: a frontier plot for each metric, and the table. `links` lead to the runs' pages."""
    from moecli.runner.several import on_frontier
    from moecli.runner.table import LEGEND, column_names, direction, frontier_words

    fronts = {key: {id(row) for row in on_frontier(several, key)} for key in several.columns}
    series = _series(several)
    numbers = {id(row): str(i) for i, row in enumerate((r for r in several.rows if not r.is_source), 1)}
    judged = [key for key, better in several.columns.items() if better is not None]
    plots = [_frontier(several, key, fronts[key], series, numbers) for key in judged[:MOST_PLOTS]]
    return str(
        _template("several.html.j2").render(
            several=several,
            version=__version__,
            verdict=several_verdict(several),
            tiles=_several_tiles(several, fronts),
            plots=[plot for plot in plots if plot],
            unplotted=[f"{task} {metric}" for task, metric in judged[MOST_PLOTS:]],
            keys=[(name, draw.look(i)) for i, name in enumerate(dict.fromkeys(series.values()))],
            columns=list(zip(several.columns, column_names(several), strict=True)),
            rows=[
                _several_row(row, several, fronts, numbers.get(id(row), ""), links.get(row.name))
                for row in several.rows
            ],
            sentences=frontier_words(several),
            legend=LEGEND,
            direction=direction,
            words=words,
            css=_text("report.css"),
            js=_text("report.js"),
        )
    )


def _series(several: Several) -> dict[int, str]:
    """id of a row -> what colours it: its value on the first axis that has a few of them."""
    runs = [row for row in several.rows if not row.is_source]
    for axis in several.axes:
        values = {row.labels.get(axis, "none") for row in runs}
        if 1 < len(values) <= 2 * draw.LOOKS:
            return {id(row): row.labels.get(axis, "none") for row in runs}
    return {id(row): "runs" for row in runs}


def _frontier(
    several: Several, key: Key, on: Collection[int], series: Mapping[int, str], numbers: Mapping[int, str]
) -> dict[str, Any] | None:
    from moecli.runner.table import direction

    rows = [row for row in several.rows if row.size is not None and key in row.cells]
    unit, name = _unit(max((row.size.bytes for row in rows if row.size), default=1))
    looks = {name: i for i, name in enumerate(dict.fromkeys(series.values()))}
    dots = [
        draw.Candidate(numbers.get(id(row), row.name), row.name, row.size.bytes / unit, row.cells[key].value,
                       row.cells[key].spread, id(row) in on, None if row.is_source else looks[series[id(row)]])
        for row in rows
        if row.size
    ]  # fmt: skip
    title = f"{key[0]} {key[1]}"
    drawn = draw.frontier_plot(dots, f"size, {name}", key[1] + direction(several.columns[key]), f"{title} against size")
    if not drawn:
        return None
    return {
        "title": title,
        "svg": _markup(drawn),
        "left_out": sum(not math.isfinite(dot.y) for dot in dots),
        "caption": f"{title}{direction(several.columns[key])} against size on disk.",
        "rows": [
            (
                numbers.get(id(row), ""),
                row.name,
                row.size.bytes,
                row.cells[key].value,
                row.cells[key].spread,
                id(row) in on,
            )
            for row in rows
            if row.size
        ],
    }


def _unit(most: float) -> tuple[float, str]:
    """The binary unit in which the largest size has one to four digits."""
    step = min(4, max(0, math.floor(math.log(max(most, 1), 1024))))
    return 1024.0**step, ("B", "KiB", "MiB", "GiB", "TiB")[step]


def _several_row(row: Row, several: Several, fronts: Fronts, number: str, link: str | None) -> dict[str, Any]:
    from moecli.runner.table import size_cells

    size, ratio, experts = size_cells(row, several)
    cells = []
    for key in several.columns:
        cell = row.cells.get(key)
        readings = {r.reading for r in cell.rows} if cell and not row.is_source else set()
        tone = next(iter(readings)) if len(readings) == 1 else ""
        cells.append({"cell": cell, "tone": tone if tone in ("better", "worse") else "", "on": id(row) in fronts[key]})
    experts_each = row.size.experts if row.size else ()
    return {
        "row": row,
        "number": number,
        "link": link,
        "size": size,
        "ratio": ratio,
        "experts": experts,
        "bytes": row.size.bytes if row.size else "",
        "mean_experts": sum(experts_each) / len(experts_each) if experts_each else "",
        "cells": cells,
    }


def several_verdict(several: Several) -> str:
    """One line: how many runs, how small, and the smallest that nothing shows to be worse."""
    runs = [row for row in several.rows if not row.is_source]
    parts = [words.plural(len(runs), "run")]
    sized = sorted((row for row in runs if row.size), key=lambda row: row.size.bytes if row.size else 0)
    if sized and sized[0].size and sized[-1].size:
        ends = dict.fromkeys(words.bytes_text(row.size.bytes) for row in (sized[0], sized[-1]) if row.size)
        parts.append(" to ".join(ends))
    best = _unharmed(sized)
    if best and best.size:
        parts.append(f"the smallest without a clear loss is {best.name} ({words.bytes_text(best.size.bytes)})")
    elif any(row.reading != "not compared" for run in runs for cell in run.cells.values() for row in cell.rows):
        parts.append("every one is clearly worse than its source in some metric")
    return ", ".join(parts)


def _unharmed(runs: Sequence[Row]) -> Row | None:
    """The first run that was compared with its source and is clearly worse in nothing."""
    for run in runs:
        readings = [row.reading for cell in run.cells.values() for row in cell.rows]
        if any(reading != "not compared" for reading in readings) and "worse" not in readings:
            return run
    return None


def _several_tiles(several: Several, fronts: Fronts) -> list[tuple[str, str, str]]:
    runs = [row for row in several.rows if not row.is_source]
    seeds = max((row.seeds for row in runs), default=1)
    words_of = [f"up to {seeds} seeds each"] if seeds > 1 else []
    words_of += [f"{words.plural(len(several.missing), 'point')} missing"] if several.missing else []
    tiles = [("runs", str(len(runs)), ", ".join(words_of) or "every one with its report")]
    sized = sorted((row for row in runs if row.size), key=lambda row: row.size.bytes if row.size else 0)
    if sized and sized[0].size:
        tiles.append(("smallest", words.bytes_text(sized[0].size.bytes), sized[0].name))
    if (best := _unharmed(sized)) and best.size:
        tiles.append(("smallest without a clear loss", words.bytes_text(best.size.bytes), best.name))
    judged = [key for key, better in several.columns.items() if better is not None]
    everywhere = [row for row in runs if judged and all(id(row) in fronts[key] for key in judged)]
    if judged:
        tiles.append(("on every frontier", str(len(everywhere)), f"of {words.plural(len(judged), 'metric')}"))
    return tiles
