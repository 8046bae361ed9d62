"""Small SVG drawings for the report: plain numbers in, one `<svg>` string out.

No colour is written here: shapes carry classes (`h0`..`h7`, `before`, `after`, `mark`) and the page's style sheet
gives them a colour for light and for dark. Coordinates are fixed-point, so equal data gives equal bytes.
Drawings that must fit a phone use percentages for x; the wide ones have a natural width and scroll in their frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

HEAT_BOUNDS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Upper bounds, in times the fair share, of heat classes h1..h6; h7 is above all, h0 saw no token."""

HEAT_LABELS = ("0", "<⅛", "<¼", "<½", "<1", "<2", "<4", "≥4")
"""Legend of the heat classes h0..h7."""

Homes = Sequence[int | None]
"""For each expert the one that holds it now, None when dropped; empty when nothing happened."""


class Bar(NamedTuple):
    """One pair of bars. `after` is None when there is no second model."""

    label: str
    before: float
    after: float | None
    before_text: str
    after_text: str


class Dot(NamedTuple):
    """A value with its standard error; both None when not measured."""

    value: float | None
    stderr: float | None


def num(value: float) -> str:
    """A coordinate: at most two decimals, no trailing zeros, never `-0`."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def svg(body: str, width: str, height: float, label: str, extra: str = "") -> str:
    """The frame of a drawing; `label` is what a screen reader says."""
    size = f'width="{width}" height="{num(height)}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}{extra}>{body}</svg>'


# -- expert load ---------------------------------------------------------------------------------------------------


def heat_class(count: int, fair: float) -> int:
    """Class 0..7 of an expert's load against the fair share of its layer."""
    if count == 0 or fair == 0:
        return 0
    return 1 + sum(count >= bound * fair for bound in HEAT_BOUNDS)


def load_heatmap(load: Mapping[int, Sequence[int]], homes: Mapping[int, Homes]) -> str:
    """Layers down, experts across, darkness by load. Merged experts are half cells, dropped ones flat."""
    layers = sorted(load)
    experts = max((len(load[layer]) for layer in layers), default=0)
    if not experts:
        return ""
    cell = min(26, max(4, 1024 // experts))
    height = min(26, max(8, 600 // len(layers)))
    left, top = 42, 22
    parts = [_expert_ticks(experts, cell, left, top)]
    every = math.ceil(13 / height)
    for row, layer in enumerate(layers):
        label = f'<text x="{left - 6}" y="{num(height / 2 + 4)}" class="end">{layer}</text>' if row % every == 0 else ""
        body = _heat_row(layer, load[layer], homes.get(layer, ()), cell, height)
        shift = f"translate(0 {top + row * height})"
        parts.append(f'<g transform="{shift}">{label}<g transform="translate({left})">{body}</g></g>')
    label = f"Heatmap of expert load: {len(layers)} layers by {experts} experts"
    style = f' class="heat" style="--cell:{num(cell - (1 if cell > 6 else 0.5))}px;--rise:{height - 1}px"'
    return svg("".join(parts), str(left + experts * cell + 2), top + len(layers) * height + 4, label, style)


def _expert_ticks(experts: int, cell: int, left: int, top: int) -> str:
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 30) if s * cell >= 24)
    ticks = [
        f'<text x="{num(left + (e + 0.5) * cell)}" y="{top - 6}" class="mid">{e}</text>'
        for e in range(0, experts, step)
    ]
    return f'<text x="{left - 6}" y="{top - 6}" class="end dim">layer</text>' + "".join(ticks)


def _heat_row(layer: int, counts: Sequence[int], homes: Homes, cell: int, height: int) -> str:
    """One layer, its cells gathered by class: what they share is written once."""
    fair = sum(counts) / len(counts) if counts else 0.0
    cells: dict[tuple[str, int], str] = {}
    for expert, count in enumerate(counts):
        fate, words = _fate(expert, homes)
        share = f"{count / fair:.2f}" if fair else "0"
        title = f"layer {layer} expert {expert}: {count:,}, {share}× fair{words}"
        look = fate, heat_class(count, fair)
        cells[look] = cells.get(look, "") + f'<rect x="{expert * cell}"><title>{title}</title></rect>'
    down = {"kept": 0.0, "merged": (height - 1) * 0.5, "dropped": (height - 1) * 0.78}
    return "".join(
        f'<g class="h{heat} {fate}" transform="translate(0 {num(down[fate])})">{rects}</g>'
        for (fate, heat), rects in sorted(cells.items())
    )


def _fate(expert: int, homes: Homes) -> tuple[str, str]:
    home = homes[expert] if expert < len(homes) else expert
    if home is None:
        return "dropped", ", dropped"
    return ("kept", "") if home == expert else ("merged", f", merged into {home}")


# -- dendrogram ----------------------------------------------------------------------------------------------------


UPRIGHT = 22
"""Least width of a leaf, in pixels, whose expert number is written upright."""


class Link(NamedTuple):
    """One merge of a dendrogram, in leaf units across and distance up."""

    left: float
    right: float
    left_height: float
    right_height: float
    height: float
    members: tuple[int, ...]


def leaf_order(linkage: Sequence[Sequence[float]], experts: int) -> list[int]:
    """Leaves from left to right so that no branches cross."""
    if not linkage:
        return list(range(experts))
    order, todo = [], [experts + len(linkage) - 1]
    while todo:
        node = todo.pop()
        if node < experts:
            order.append(node)
        else:
            left, right = linkage[node - experts][:2]
            todo += [int(right), int(left)]
    return order


def links(linkage: Sequence[Sequence[float]], experts: int) -> list[Link]:
    """Every merge with its place, in the order of the linkage matrix."""
    place: dict[int, tuple[float, float, tuple[int, ...]]] = {
        leaf: (float(x), 0.0, (leaf,)) for x, leaf in enumerate(leaf_order(linkage, experts))
    }
    made = []
    for step, (a, b, height, _) in enumerate(linkage):
        left, right = sorted((place[int(a)], place[int(b)]), key=lambda p: p[0])
        members = left[2] + right[2]
        made.append(Link(left[0], right[0], left[1], right[1], float(height), members))
        place[experts + step] = ((left[0] + right[0]) / 2, float(height), members)
    return made


def dendrogram(linkage: Sequence[Sequence[float]], groups: Sequence[int]) -> str:
    """Experts along the bottom, joined at the distance of their clusters; joins inside a group are drawn strong."""
    experts = len(groups)
    order, merges = leaf_order(linkage, experts), links(linkage, experts)
    top_height = max((m.height for m in merges), default=0.0) or 1.0
    step = min(30.0, max(3.5, 936 / max(experts, 1)))
    left, top, tall = 58, 14, 230
    labels_tall = 14 if step >= UPRIGHT else 26 if step >= 10 else 0
    width, height = math.ceil(left + experts * step + 78), top + tall + labels_tall + 22

    def x(leaf: float) -> float:
        return left + (leaf + 0.5) * step

    def y(distance: float) -> float:
        return top + tall * (1 - distance / top_height)

    parts = [_distance_axis(top_height, left, top, tall, width)]
    cut = _cut(merges, groups)
    if cut is not None:
        parts.append(f'<path class="cut" d="M{left} {num(y(cut))}H{width - 72}"/>')
        parts.append(f'<text class="cutlabel" x="{width - 68}" y="{num(y(cut) + 4)}">{len(set(groups))} groups</text>')
    for m in merges:
        inside = len({groups[e] for e in m.members}) == 1
        d = f"M{num(x(m.left))} {num(y(m.left_height))}V{num(y(m.height))}H{num(x(m.right))}V{num(y(m.right_height))}"
        what = f"group {groups[m.members[0]]}: experts {_ids(m.members)}" if inside else f"{len(m.members)} experts"
        title = f"<title>{what}, distance {m.height:.4g}</title>"
        parts.append(f'<path class="{"in" if inside else "out"}" d="{d}">{title}</path>')
    parts.append(_leaves(order, groups, x, top + tall, step, labels_tall))
    label = f"Dendrogram of {experts} experts in {len(set(groups))} groups"
    return svg("".join(parts), str(width), height, label, ' class="tree"')


def _ids(members: Iterable[int], limit: int = 16) -> str:
    ordered = sorted(members)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return " ".join(str(e) for e in ordered[:limit]) + more


def _cut(merges: Sequence[Link], groups: Sequence[int]) -> float | None:
    """A distance that separates joins inside groups from joins between them, if one exists."""
    inside = [m.height for m in merges if len({groups[e] for e in m.members}) == 1]
    between = [m.height for m in merges if len({groups[e] for e in m.members}) > 1]
    if not between or (inside and max(inside) > min(between)):
        return None
    return (max(inside, default=0.0) + min(between)) / 2


def _distance_axis(top_height: float, left: int, top: int, tall: int, width: int) -> str:
    parts = []
    for value in ticks(0.0, top_height):
        y = num(top + tall * (1 - value / top_height))
        parts.append(f'<path class="grid" d="M{left} {y}H{width - 72}"/>')
        parts.append(f'<text class="end" x="{left - 6}" y="{y}" dy="4">{value:g}</text>')
    return "".join(parts) + f'<text class="dim" x="0" y="{top - 4}">distance</text>'


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between low and high, roughly `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * f for f in (1, 2, 5, 10) if size * f >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _leaves(
    order: Sequence[int], groups: Sequence[int], x: Callable[[float], float], base: int, step: float, labels_tall: int
) -> str:
    """Expert ids and, under them, a band that spans each group of two or more."""
    parts = []
    for place, expert in enumerate(order):
        if labels_tall:
            spot = f'x="{num(x(place))}" y="{base + 13}" class="mid"'
            if step < UPRIGHT:
                spot = f'transform="translate({num(x(place) + 4)} {base + 6}) rotate(-90)" class="end"'
            parts.append(f"<text {spot}>{expert}</text>")
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(order), 1) if groups[a] != groups[b]), len(order)]
    band = base + labels_tall + 8
    for start, stop in pairwise(starts):
        kind = "band many" if stop - start > 1 else "band one"
        title = f"group {groups[order[start]]}: experts {_ids(order[start:stop])}"
        reach = f"M{num(x(start) - step * 0.35)} {band}H{num(x(stop - 1) + step * 0.35)}"
        parts.append(f'<path class="{kind}" d="{reach}"><title>{title}</title></path>')
    return "".join(parts)


# -- bars and dots -------------------------------------------------------------------------------------------------


def size_bars(bars: Sequence[Bar]) -> str:
    """Two bars for each part, before above after, on one scale."""
    most = max((max(bar.before, bar.after or 0.0) for bar in bars), default=0.0) or 1.0
    parts = []
    for row, bar in enumerate(bars):
        y = row * 54
        parts.append(f'<text y="{y + 13}" class="name">{escape(bar.label)}</text>')
        parts.append(_bar(bar.before / most, y + 19, "before", bar.before_text))
        if bar.after is not None:
            parts.append(_bar(bar.after / most, y + 33, "after", bar.after_text))
    return svg("".join(parts), "100%", len(bars) * 54, "Bytes by part, before and after", ' class="bars"')


def _bar(share: float, y: float, kind: str, text: str) -> str:
    percent = num(78 * share)
    title = f"<title>{kind}: {escape(text)}</title>"
    bar = f'<rect class="{kind}" x="0" y="{y}" width="{percent}%" height="12">{title}</rect>'
    return bar + f'<text x="{percent}%" dx="6" y="{y + 10.5}">{escape(text)}</text>'


def metric_dots(before: Dot, after: Dot, low_text: str, high_text: str, bounds: tuple[float, float]) -> str:
    """One row of a forest plot, 220 px wide: before (hollow) over after (filled); thick bar one standard error, thin
    bar two. `bounds` are the ends of the scale, `low_text` and `high_text` their labels."""
    low, high = bounds
    parts = ['<path class="grid" d="M8 44H212M8 41v6M212 41v6"/>']
    if before.value is not None and math.isfinite(before.value):
        at = num(8 + 204 * (before.value - low) / (high - low))
        parts.append(f'<path class="guide" d="M{at} 4V44"/>')
    parts += [_whiskers(before, 13, "before", low, high), _whiskers(after, 30, "after", low, high)]
    parts.append(f'<text x="4" y="58">{escape(low_text)}</text>')
    parts.append(f'<text x="216" y="58" class="end">{escape(high_text)}</text>')
    return svg("".join(parts), "220", 62, "Before and after with standard errors", ' class="dots"')


def _whiskers(dot: Dot, y: int, kind: str, low: float, high: float) -> str:
    value, stderr = dot
    if value is None or not math.isfinite(value):
        return ""

    def x(at: float) -> str:
        return num(8 + 204 * (min(max(at, low), high) - low) / (high - low))

    bars = ""
    if stderr is not None and math.isfinite(stderr):
        bars = f'<path class="thin" d="M{x(value - 2 * stderr)} {y}H{x(value + 2 * stderr)}"/>'
        bars += f'<path class="thick" d="M{x(value - stderr)} {y}H{x(value + stderr)}"/>'
    return f'<g class="{kind}">{bars}<circle cx="{x(value)}" cy="{y}" r="4.5"/></g>'


def dot_bounds(before: Dot, after: Dot) -> tuple[float, float] | None:
    """The span of one row: both values with two standard errors and a little air. None when nothing can be drawn."""
    ends = [
        end
        for value, stderr in (before, after)
        if value is not None and math.isfinite(value)
        for reach in (2 * stderr if stderr is not None and math.isfinite(stderr) else 0.0,)
        for end in (value - reach, value + reach)
    ]
    if not ends:
        return None
    low, high = min(ends), max(ends)
    air = 0.12 * (high - low) or 0.05 * abs(low) or 0.05
    return low - air, high + air
