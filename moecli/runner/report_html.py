"""The report as one page: no request leaves it, it prints, it follows the reader's light or dark setting.

Text and tables come from the same functions as `report.md`; this file adds figures and the numbers behind them.
The page works without JavaScript; with it, tables sort by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from moecli.runner import figures as draw
from moecli.runner import report_words as words
from moecli.runner.report import Figures, MetricRow, Report, SizeRecord

TEMPLATES = Path(__file__).parent / "templates"


def render_html(report: Report) -> str:
    """The whole page, a pure function of report.json."""
    return str(
        _template().render(
            report=report,
            words=words,
            verdict=words.verdict(report),
            tiles=_tiles(report),
            metrics=[_metric(row) for row in report.metrics],
            size=_size(report.size),
            load=_load(report.figures_data),
            tree=_tree(report.figures_data),
            coverage=words.coverage(report.figures_data),
            css=_text("report.css"),
            js=_text("report.js"),
            heat_labels=draw.HEAT_LABELS,
        )
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template("report.html.j2")


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


def _groups(groups: Sequence[int]) -> list[tuple[int, str]]:
    return [(g, " ".join(str(e) for e, at in enumerate(groups) if at == g)) for g in sorted(set(groups))]


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)
