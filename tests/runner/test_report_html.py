"""report.html: well formed, alone in the world, and with the numbers of the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from time import process_time

import pytest

from moecli.runner import figures
from moecli.runner.figures import Bar, Dot
from moecli.runner.report import Figures, Report, SizeRecord
from moecli.runner.report_html import render_html
from tests.runner.reports import bare, sized, small

VOID = {"meta", "link", "br", "hr", "img", "input"}
SELF_CLOSED = {"rect", "path", "circle"}


class Page(HTMLParser):
    """Elements of a page; fails on a tag that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str | None] = []
        self.tables: list[list[str | None]] = []
        """For each table, the classes of what it stands in."""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> names an attribute twice"
        if tag == "table":
            self.tables.append(list(self.classes))
        if tag not in VOID:
            self.open.append(tag)
            self.classes.append(dict(attrs).get("class"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSED, f"<{tag}/> is not closed in HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self.classes.pop()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


REPORTS = {"small": small(), "bare": bare(), "one layer": sized(1, 2), "one expert": sized(1, 1), "chain": sized(3, 16)}


@pytest.fixture(params=list(REPORTS))
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]


def test_well_formed(report: Report) -> None:
    page = Page(render_html(report))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {(href or "")[1:] for href in (a["href"] for a in page.of("a")) if (href or "").startswith("#")}
    assert targets <= set(ids)


def test_the_same_report_gives_the_same_bytes(report: Report) -> None:
    assert render_html(report) == render_html(report.model_copy(deep=True))


def test_nothing_is_loaded(report: Report) -> None:
    text = render_html(report)
    page = Page(text)
    assert not re.search(r"@import|url\(|<(img|iframe|object|embed|audio|video)\b", text)
    assert all("src" not in attrs for _, attrs in page.elements)
    assert [link["href"] for link in page.of("link")] == ["data:,"]
    links = {a["href"] for a in page.of("a") if not str(a["href"]).startswith("#")}
    assert links <= {"https://arxiv.org/abs/2410.08589"}
    assert set(re.findall(r"\bhttps?://[^\s\"<]+", text)) == links
    assert next(m["content"] for m in page.of("meta") if m.get("http-equiv")).startswith("default-src 'none';")


def test_phones_dark_pages_and_keyboards() -> None:
    text = render_html(small())
    page = Page(text)
    assert "prefers-color-scheme: dark" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    scrolling = [attrs for _, attrs in page.elements if attrs.get("class") == "scroll"]
    assert scrolling and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    assert page.tables and all("scroll" in around for around in page.tables)


def test_every_figure_has_a_caption_and_its_data() -> None:
    text = render_html(small())
    shown = re.findall(r"<figure.*?</figure>", text, flags=re.S)
    assert len(shown) == 6
    assert all("<figcaption><b>" in figure for figure in shown)
    assert all('<details class="data">' in figure for figure in shown if "<svg" in figure)


def cells(text: str, after: str) -> list[list[str]]:
    """Cells of the table that follows `after`, tags stripped."""
    table = text[text.index(after) :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.S)
    return [
        [
            re.sub(r"<svg.*?</svg>|<[^>]+>", "", cell, flags=re.S).strip()
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
        ]
        for row in rows
    ]


def test_the_metric_table_holds_the_numbers() -> None:
    text = render_html(small())
    assert cells(text, 'class="sortable metrics"')[1:] == [
        ["arc", "acc ↑", "0.7500 ± 0.0300", "0.5000 ± 0.0400", "-0.2500 ± 0.0500", "200", "worse", ""],
        ["arc", "acc_norm ↑", "0.7000 ± 0.0300", "0.7100 ± 0.0300", "+0.0100 ± 0.0424", "200", "no clear change", ""],
        ["text | two", "perplexity ↓", "10.50", "inf", "+inf", "12", "worse", ""],
    ]
    assert 'data-sort="0.75"' in text and 'data-sort="inf"' in text


def test_the_other_tables_hold_the_numbers() -> None:
    text = render_html(small())
    assert ["experts", "6.00 MiB", "3.00 MiB", "50.0 %"] in cells(text, 'aria-label="Size before and after"')
    assert ["experts", "6291456", "3145728"] in cells(text, 'aria-label="Data: bytes by part"')
    assert cells(text, 'aria-label="Data: tokens per expert, and the experts that are left"')[1:] == [
        ["0", "200", "100 50 50 0", "0(2) 1(3)"],
        ["1", "200", "10 20 30 140", "2 3"],
    ]
    assert cells(text, 'aria-label="Stages of the run"')[1][1:] == [
        "text", "aaaaaaaaaaaa", "cached", "2 min 05 s", "3.00 MiB", "–",
    ]  # fmt: skip


def test_absent_parts_say_so() -> None:
    text = render_html(bare())
    for absent in (
        "No evaluation in this run",
        "Sizes were not recorded",
        "No expert load was recorded",
        "No clusters in this run",
        "No calibration in this run",
        "No stage was run",
        "not verified in this run",
    ):
        assert absent in text
    assert "<figure" not in text


def test_a_run_that_wrote_no_model() -> None:
    size = small().size
    assert size is not None
    text = render_html(small().model_copy(update={"size": SizeRecord(before=size.before)}))
    Page(text)
    assert "No model was written in this run" in text


def test_text_is_escaped() -> None:
    hostile = "<script>alert('x')</script> & \"quoted\""
    report = small().model_copy(update={"name": hostile, "recipe": hostile, "warnings": (hostile,)})
    text = render_html(report)
    Page(text)
    assert "alert" in text and "<script>alert" not in text


def test_a_large_model_stays_light() -> None:
    report = sized(94, 256)
    started = process_time()
    text = render_html(report)
    assert process_time() - started < 10
    assert len(text.encode()) < 3_000_000
    assert text.count("<rect") >= 94 * 256


def test_the_middle_layer_is_drawn() -> None:
    assert "experts of layer 2 were grouped, the middle one of 5 layers" in render_html(sized(5, 4))
    assert "experts of layer 0 were grouped, the only layer with clusters" in render_html(small())


# -- drawings ------------------------------------------------------------------------------------------------------


def test_heat_steps_are_factors_of_two() -> None:
    counts = [0, 12, 13, 25, 50, 99, 100, 199, 200, 400]
    assert [figures.heat_class(count, 100.0) for count in counts] == [0, 1, 2, 3, 4, 4, 5, 5, 6, 7]
    assert figures.heat_class(0, 0.0) == 0


def test_a_heat_cell_says_its_numbers() -> None:
    homes = {0: (0, None, 0)}
    svg = figures.load_heatmap({0: (30, 0, 60)}, homes)
    assert "layer 0 expert 0: 30, 1.00× fair<" in svg
    assert "layer 0 expert 1: 0, 0.00× fair, dropped<" in svg
    assert "layer 0 expert 2: 60, 2.00× fair, merged into 0<" in svg
    assert re.findall(r'class="(h\d \w+)"', svg) == ["h0 dropped", "h5 kept", "h6 merged"]


def test_layers_may_differ_in_experts() -> None:
    svg = figures.load_heatmap({0: (1, 2), 5: (1, 2, 3, 4)}, {})
    assert svg.count("<rect") == 6


LINKAGE = ((0.0, 2.0, 0.5, 2.0), (1.0, 3.0, 0.75, 2.0), (4.0, 5.0, 2.0, 4.0))


def test_branches_of_a_dendrogram_do_not_cross() -> None:
    assert figures.leaf_order(LINKAGE, 4) == [0, 2, 1, 3]
    links = figures.links(LINKAGE, 4)
    assert [(m.left, m.right, m.left_height, m.right_height, m.height) for m in links] == [
        (0, 1, 0, 0, 0.5),
        (2, 3, 0, 0, 0.75),
        (0.5, 2.5, 0.5, 0.75, 2.0),
    ]
    assert links[2].members == (0, 2, 1, 3)


def test_leaves_are_in_scipys_order() -> None:
    import numpy as np
    from scipy.cluster.hierarchy import leaves_list, linkage

    points = np.random.default_rng(0).normal(size=(40, 3))
    tree = linkage(points, "average")
    assert figures.leaf_order(tree.tolist(), 40) == leaves_list(tree).tolist()


def test_joins_inside_groups_are_strong() -> None:
    svg = figures.dendrogram(LINKAGE, (0, 1, 0, 1))
    assert re.findall(r'class="(in|out)" .*?<title>(.*?)</title>', svg) == [
        ("in", "group 0: experts 0 2, distance 0.5"),
        ("in", "group 1: experts 1 3, distance 0.75"),
        ("out", "4 experts, distance 2"),
    ]
    assert 'class="cut"' in svg and ">2 groups<" in svg


def test_groups_that_no_cut_gives_have_no_cut() -> None:
    assert 'class="cut"' not in figures.dendrogram(LINKAGE, (0, 1, 2, 1))
    assert 'class="cut"' not in figures.dendrogram(LINKAGE, (0, 0, 0, 0))


def test_equal_experts_draw_a_flat_dendrogram() -> None:
    svg = figures.dendrogram(((0.0, 1.0, 0.0, 2.0),), (0, 0))
    assert "nan" not in svg and "distance 0<" in svg


def test_bars_share_a_scale() -> None:
    svg = figures.size_bars([Bar("a", 200, 50, "200 B", "50 B"), Bar("b", 100, None, "100 B", "")])
    assert re.findall(r'<rect class="(\w+)" .*?width="([\d.]+)%"', svg) == [
        ("before", "78"),
        ("after", "19.5"),
        ("before", "39"),
    ]
    assert 'width="0%"' in figures.size_bars([Bar("nothing", 0, 0, "0 B", "0 B")])


def test_dots_stand_at_their_values() -> None:
    svg = figures.metric_dots(Dot(0.25, 0.125), Dot(0.5, None), "0", "1", (0.0, 1.0))
    assert re.findall(r'circle cx="([\d.]+)"', svg) == ["59", "110"]
    assert re.findall(r'class="(thin|thick)" d="M([\d.]+) 13H([\d.]+)"', svg) == [
        ("thin", "8", "110"),
        ("thick", "33.5", "84.5"),
    ]


def test_bounds_hold_two_standard_errors() -> None:
    low, high = figures.dot_bounds(Dot(0.5, 0.1), Dot(0.2, None)) or (1, 0)
    assert (low, high) == (pytest.approx(0.2 - 0.06), pytest.approx(0.7 + 0.06))
    assert figures.dot_bounds(Dot(None, None), Dot(float("nan"), 0.1)) is None
    low, high = figures.dot_bounds(Dot(0.0, None), Dot(None, None)) or (1, 0)
    assert low < 0 < high


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 5, 10]), (0, 0.9, [0, 0.5]), (0, 7, [0, 2, 4, 6]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert figures.ticks(low, high) == expected


def test_load_without_plan_shows_every_expert_kept() -> None:
    report = small().model_copy(update={"figures_data": Figures(load={0: (5, 5)})})
    text = render_html(report)
    Page(text)
    assert "No expert was dropped or merged." in text and "key h4 merged" not in text
