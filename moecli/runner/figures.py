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


# -- charts --------------------------------------------------------------------------------------------------------


LOOKS = 6
"""Colours of lines and markers; further series use them again with another dash or shape."""
_WIDE, _TALL = 400, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 22, 42


class Scale(NamedTuple):
    """Values to pixels along one axis."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.stop - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values inside the scale; 1, 2, 5 of each decade where it is logarithmic."""
        if not self.log:
            return ticks(self.low, self.high, 6)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [f * 10.0**d for d in decades for f in (1, 2, 5) if self.low <= f * 10.0**d <= self.high]
        tens = [v for v in found if f"{v:e}".startswith("1.")]
        return tens if len(found) > 7 and len(tens) > 1 else found


def scale_over(values: Iterable[float], start: float, stop: float, log: bool = False, air: float = 0.06) -> Scale:
    """A scale over all values with a little air at both ends; a single value stands in its middle."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = min(known, default=1.0), max(known, default=2.0)
    if log:
        factor = (high / low) ** air if high > low else 1.5
        return Scale(low / factor, high * factor, start, stop, True)
    room = air * (high - low) or 0.1 * abs(low) or 1.0
    return Scale(low - room, high + room, start, stop)


def tick_text(value: float) -> str:
    """`0.25`, `1,500`, `1e+06`: short, without a unit."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 and value == round(value) else f"{value:.6g}"


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, whole_x: bool = False) -> str:
    bottom = _TALL - _BOTTOM
    parts = []
    for value in y.ticks():
        at = num(y(value))
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{_WIDE - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{at}" dy="4">{tick_text(value)}</text>')
    for value in x.ticks():
        if not whole_x or value == round(value):
            at = num(x(value))
            parts.append(f'<path class="grid" d="M{at} {bottom}v4"/>')
            parts.append(f'<text class="mid" x="{at}" y="{bottom + 16}">{tick_text(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDE - _RIGHT}"/>')
    parts.append(
        f'<text class="mid dim" x="{num((_LEFT + _WIDE - _RIGHT) / 2)}" y="{_TALL - 6}">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="dim" x="2" y="12">{escape(y_label)}</text>')
    return "".join(parts)


def _chart_frame(body: str, label: str) -> str:
    return svg(body, str(_WIDE), _TALL, label, f' viewBox="0 0 {_WIDE} {_TALL}" class="chart"')


def look(index: int) -> str:
    """Classes of a series: its colour, and its dash once colours repeat."""
    return f"s{index % LOOKS}" + (f" again{min(index // LOOKS, 2)}" if index >= LOOKS else "")


class Line(NamedTuple):
    """One series of a chart; None leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float] = ()


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, label: str, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines with a dot at each point (few points), error bars where they are known."""
    drawn = [
        [(a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None and _drawable(a, b, log_x, log_y)]
        for line in lines
    ]
    reach = [b + s * e for line in lines for b, e in zip(line.y, line.error or [0.0] * len(line.y), strict=True)
             if b is not None for s in (-1, 1)]  # fmt: skip
    if not any(drawn):
        return ""
    x = scale_over((a for points in drawn for a, _ in points), _LEFT, _WIDE - _RIGHT, log_x, 0.03)
    y = scale_over([*(b for points in drawn for _, b in points), *reach], _TALL - _BOTTOM, _TOP, log_y)
    whole = all(float(a).is_integer() for line in lines for a in line.x)
    parts = [_axes(x, y, x_label, y_label, whole)]
    for index, line in enumerate(lines):
        pieces, gap = [], True
        for a, b in zip(line.x, line.y, strict=True):
            if not _drawable(a, b, log_x, log_y):
                gap = True
                continue
            pieces.append(f"{'M' if gap else 'L'}{num(x(a))} {num(y(b or 0.0))}")
            gap = False
        body = f'<path class="line" d="{"".join(pieces)}"/>'
        for i, (a, b) in enumerate(zip(line.x, line.y, strict=True)):
            if b is None or not _drawable(a, b, log_x, log_y) or len(line.x) > 80:
                continue
            if line.error and (not log_y or b > line.error[i]):
                body += f'<path class="thin" d="M{num(x(a))} {num(y(b - line.error[i]))}V{num(y(b + line.error[i]))}"/>'
            title = f"{escape(line.name)}: {tick_text(a)}, {b:.6g}"
            body += f'<circle cx="{num(x(a))}" cy="{num(y(b))}" r="2.6"><title>{title}</title></circle>'
        parts.append(f'<g class="{look(index)}">{body}</g>')
    return _chart_frame("".join(parts), label)


def _drawable(a: float, b: float | None, log_x: bool, log_y: bool) -> bool:
    return b is not None and math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x) and (b > 0 or not log_y)


class Candidate(NamedTuple):
    """One run in a frontier plot."""

    number: str
    """What stands beside its marker, and in the table."""
    name: str
    x: float
    y: float
    error: float | None
    on: bool
    """On the frontier."""
    series: int | None
    """Its colour; None for a source."""


def frontier_plot(found: Sequence[Candidate], x_label: str, y_label: str, label: str) -> str:
    """Quality against size: filled markers are on the frontier, which is the stepped line; bars are one standard
    error. The value axis is logarithmic where values span more than a factor of twenty."""
    dots = [c for c in found if math.isfinite(c.y)]
    if not dots:
        return ""
    values = [c.y for c in dots]
    log = min(values) > 0 and max(values) > 20 * min(values)
    ends = [c.y + s * (c.error or 0.0) for c in dots for s in (-1, 1)]
    x = scale_over((c.x for c in dots), _LEFT, _WIDE - _RIGHT, air=0.08)
    y = scale_over(ends if not log else values, _TALL - _BOTTOM, _TOP, log)
    parts = [_axes(x, y, x_label, y_label)]
    steps = sorted((c.x, c.y) for c in dots if c.on)
    if steps:
        d = f"M{num(x(steps[0][0]))} {num(y(steps[0][1]))}"
        d += "".join(f"H{num(x(a))}V{num(y(b))}" for a, b in steps[1:])
        parts.append(f'<path class="front" d="{d}"/>')
    for c in dots:
        parts.append(_candidate(c, x, y, log))
    boxes = [(x(c.x) - 5, y(c.y) - 5, x(c.x) + 5, y(c.y) + 5) for c in dots]
    parts += [_number(c, x(c.x), y(c.y), boxes) for c in dots]
    return _chart_frame("".join(parts), label)


def _candidate(c: Candidate, x: Scale, y: Scale, log: bool) -> str:
    at_x, at_y = num(x(c.x)), num(y(c.y))
    kind = ("source" if c.series is None else look(c.series)) + (" on" if c.on else "")
    bar = ""
    if c.error is not None and math.isfinite(c.error) and (not log or c.y > c.error):
        bar = f'<path class="thin" d="M{at_x} {num(y(c.y - c.error))}V{num(y(c.y + c.error))}"/>'
    words = f"{escape(c.name)}: {c.y:.4g}" + (f" ± {c.error:.2g}" if c.error is not None else "")
    words += ", on the frontier" if c.on else ""
    title = f"<title>{words}</title>"
    mark = f'<circle cx="{at_x}" cy="{at_y}" r="4.5">{title}</circle>'
    if c.series is None:
        mark = f'<path class="mark" d="M{num(x(c.x) - 5)} {at_y}l5 -5l5 5l-5 5z">{title}</path>'
    return f'<g class="{kind}">{bar}{mark}</g>'


def _number(c: Candidate, x: float, y: float, boxes: list[tuple[float, float, float, float]]) -> str:
    """The run's number where it covers least: right, left, above or below its marker."""
    wide = 6.4 * len(c.number)
    spots = [(x + 7, y + 3.5, "", x + 7), (x - 7, y + 3.5, "end", x - 7 - wide), (x, y - 8, "mid", x - wide / 2),
             (x, y + 15, "mid", x - wide / 2)]  # fmt: skip

    def covered(spot: tuple[float, float, str, float]) -> float:
        left, top, right, bottom = spot[3], spot[1] - 9, spot[3] + wide, spot[1] + 1
        out = max(0.0, right - _WIDE) + max(0.0, _LEFT - left) + max(0.0, 12 - top) + max(0.0, bottom - _TALL + _BOTTOM)
        return out * 20 + sum(
            max(0.0, min(right, r) - max(left, a)) * max(0.0, min(bottom, b) - max(top, t)) for a, t, r, b in boxes
        )

    at_x, at_y, anchor, left = min(spots, key=covered)
    boxes.append((left, at_y - 9, left + wide, at_y + 1))
    kind = f' class="tag {anchor}"' if anchor else ' class="tag"'
    return f'<text x="{num(at_x)}" y="{num(at_y)}"{kind}>{escape(c.number)}</text>'


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
