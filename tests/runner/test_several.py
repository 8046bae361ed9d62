"""Several runs side by side: the frontier, means over seeds, tables, expected numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moecli.cli import main
from moecli.core.errors import MoecliError, RecipeError, SurroundingsError, UsageError
from moecli.recipe.schema import Expected
from moecli.runner import several, table
from moecli.runner.report import MetricRow, Report, SizeRecord, save
from moecli.runner.report_html import render_several
from moecli.runner.several import frontier, links, load, on_frontier
from tests.runner.reports import MIB, small
from tests.runner.test_report_html import Page

# -- the frontier


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12), st.booleans())
def test_frontier_is_what_nothing_beats(points: list[tuple[int, int]], better: bool) -> None:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        good = a[1] >= b[1] if better else a[1] <= b[1]
        return a[0] <= b[0] and good and a != b

    expected = [not any(beats(other, point) for other in points) for point in points]
    assert frontier(points, better) == expected


def test_what_is_not_finite_is_on_no_frontier() -> None:
    assert frontier([(1, math.nan), (2, 5.0), (1, math.inf), (3, 4.0)], False) == [False, True, False, True]


# -- runs in folders


def report(
    name: str, mib: int, value: float, *, seed: int = 0, limit: int = 10, method: str = "a", **more: object
) -> Report:
    """A run whose recipe says what it is."""
    recipe = {"recipe": 1, "name": name, "seed": seed, "stages": [
        {"run": "prune/reap", "with": {"keep": mib}}, {"run": f"x/{method}"},
        {"run": "eval/lm-eval", "with": {"limit": limit, "batch_size": seed + 1}}], **more}  # fmt: skip
    base = small()
    assert base.size is not None and base.size.after is not None
    return base.model_copy(
        update={
            "name": name,
            "recipe": yaml.safe_dump(recipe),
            "size": SizeRecord(before=base.size.before, after=base.size.after.model_copy(update={"bytes": mib * MIB})),
            "metrics": (
                MetricRow(task="arc", metric="acc", before=0.75, before_stderr=0.03, after=value, after_stderr=0.04,
                          samples=200, higher_is_better=True),
                MetricRow(task="text_2", metric="ppl", before=10.5, after=20 - mib, samples=12, higher_is_better=False),
            ),
        }
    )  # fmt: skip


def put(root: Path, *reports: Report) -> list[Path]:
    """A run folder for each, named as the report."""
    folders = []
    for one in reports:
        save(one, root / one.name / "report")
        (root / one.name / "recipe.yaml").write_text(one.recipe)
        folders.append(root / one.name)
    return folders


def rows_of(found: several.Several) -> dict[str, tuple[float, float | None]]:
    return {row.name: (row.cells["arc", "acc"].value, row.cells["arc", "acc"].spread) for row in found.rows}


def test_the_source_once_then_runs_in_the_order_given(tmp_path: Path) -> None:
    found = load(put(tmp_path, report("b", 4, 0.7), report("a", 3, 0.6)))
    assert rows_of(found) == {"source": (0.75, 0.03), "b": (0.7, 0.04), "a": (0.6, 0.04)}
    assert [row.is_source for row in found.rows] == [True, False, False]
    assert found.warnings == ()
    assert list(found.columns.items()) == [(("arc", "acc"), True), (("text_2", "ppl"), False)]
    assert [row.name for row in on_frontier(found, ("arc", "acc"))] == ["a", "b", "source"]


def test_seeds_are_averaged(tmp_path: Path) -> None:
    values = (0.61, 0.64, 0.7)
    found = load(put(tmp_path, *(report(f"x-seed{n}", 4, v, seed=n) for n, v in enumerate(values))))
    assert [row.name for row in found.rows] == ["source", "x"]
    cell = found.rows[1].cells["arc", "acc"]
    assert (cell.value, cell.spread, cell.seeds) == (
        pytest.approx(statistics.fmean(values)), pytest.approx(statistics.stdev(values)), 3)  # fmt: skip
    assert "0.6500 ± 0.0458 (3 seeds)" in table.markdown(found)
    assert found.warnings == ()  # batch_size differs and changes nothing


def test_evaluations_that_differ_are_said(tmp_path: Path) -> None:
    found = load(put(tmp_path, report("a", 4, 0.7), report("b", 3, 0.6, limit=20)))
    assert found.warnings == ("the runs were not evaluated alike: eval/lm-eval limit is 10 or 20",)
    assert [row.name for row in found.rows] == ["source 1", "source 2", "a", "b"]
    assert "**the runs were not evaluated alike" in table.markdown(found)


def test_runs_of_one_name_keep_apart(tmp_path: Path) -> None:
    first, second = put(tmp_path / "x", report("a", 4, 0.7)), put(tmp_path / "y", report("a", 3, 0.6))
    assert [row.name for row in load([*first, *second]).rows[1:]] == [str(first[0]), str(second[0])]


def test_chosen_metrics(tmp_path: Path) -> None:
    folders = put(tmp_path, report("a", 4, 0.7))
    assert list(load(folders, ["text_2.ppl"]).columns) == [("text_2", "ppl")]
    with pytest.raises(UsageError, match="no run has the metric `pplx`") as caught:
        load(folders, ["pplx"])
    assert caught.value.hint == "did you mean `ppl`?"


def test_folders_that_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run in"):
        load([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is not a run folder: it has no recipe"):
        load([tmp_path / "empty"])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "recipe.yaml").write_text("recipe: 1\n")
    with pytest.raises(SurroundingsError, match="stopped before its report was written") as caught:
        load([tmp_path / "half"])
    assert caught.value.hint is not None and caught.value.hint.endswith("goes on")
    (folder,) = put(tmp_path, report("newer", 4, 0.7))
    path = folder / "report" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(MoecliError, match="has format 99, this moecli reads up to"):
        load([folder])


# -- tables


def test_markdown(tmp_path: Path) -> None:
    text = table.markdown(load(put(tmp_path, report("a", 4, 0.7))))
    assert text.split("\n\n")[0].splitlines() == [
        "| run | size | times smaller | experts | arc acc ↑ | text_2 ppl ↓ |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| source | 8.00 MiB | – | 4 | 0.7500 ± 0.0300 | 10.50 |",
        "| a | 4.00 MiB | 2.00× | 2 | 0.7000 ± 0.0400 | 16.00 |",
    ]


def test_csv_has_full_precision(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    found = load(put(tmp_path, report("a", 4, value)))
    rows = list(csv.DictReader(io.StringIO(table.csv_table(found))))
    assert rows[1]["run"] == "a"
    assert float(rows[1]["arc acc"]) == value
    assert (int(rows[1]["bytes"]), rows[1]["text_2 ppl error"]) == (4 * MIB, "")


LATEX_SPECIAL = 'a\\b&c%d$e#f_g{h}i~j^k<l>m|n"o`p'


def cells_of(line: str) -> list[str]:
    return re.split(r"(?<!\\)&", line.removesuffix(r" \\"))


def test_latex(tmp_path: Path) -> None:
    found = load(put(tmp_path, report("a_1", 4, 0.7)))
    text = table.latex_table(found)
    lines = text.splitlines()
    assert lines[2] == r"\begin{tabular}{lrrrrr}" and lines[-1] == r"\end{tabular}"
    body = [line for line in lines if line.endswith(r" \\")]
    spans = [sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)) for line in body]
    assert [len(cells_of(line)) + span for line, span in zip(body, spans, strict=True)] == [6] * len(body)
    assert r"\cmidrule(lr){5-5} \cmidrule(lr){6-6}" in lines
    assert r"a\_1 & 4.00 MiB & 2.00$\times$ & 2 & 0.7000 $\pm$ 0.0400 & 16.00 \\" in lines
    assert [lines.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]


def unescaped(text: str) -> str:
    """What LaTeX would set, for the commands we write; a character it would act on fails."""
    back = {command: plain for plain, command in table._LATEX.items()}
    out, rest = "", text
    commands = sorted(back, key=len, reverse=True)
    while rest:
        command = next((c for c in commands if rest.startswith(c)), None)
        assert command or rest[0] not in "\\&%$#_{}~^", f"{rest[0]} stands bare"
        out, rest = (out + back[command], rest[len(command) :]) if command else (out + rest[0], rest[1:])
    return out


@given(st.text(alphabet=LATEX_SPECIAL + "±×↑ xyz", max_size=30))
def test_latex_sets_every_character(text: str) -> None:
    assert unescaped(table.latex_text(text)) == " ".join(text.split())


# -- expected numbers


def expect(value: float, tolerance: float, **more: object) -> dict[str, object]:
    return {"task": "arc", "metric": "acc", "value": value, "tolerance": tolerance, "source": "Table 2", **more}


def compared(folders: Sequence[Path], tmp_path: Path, entries: list[dict[str, object]]) -> list[table.Compared]:
    path = tmp_path / "expected.yaml"
    path.write_text(yaml.safe_dump({"expected": entries}))
    return table.compare_expected(load(folders), str(path))


def test_expected_of_a_file(tmp_path: Path) -> None:
    folders = put(tmp_path, report("a", 4, 0.7), report("b", 3, 0.65))
    found = compared(folders, tmp_path, [expect(0.71, 0.01), expect(0.75, 0, run="source"), expect(0.7, 0.1, run="b")])
    assert [(c.run, c.agrees) for c in found] == [("a", True), ("b", False), ("source", True), ("b", True)]
    assert found[1].difference == pytest.approx(-0.06)
    text = table.expected_markdown(found)
    assert "| b | arc | acc | 0.7100 | 0.6500 | -0.0600 | 0.01 | NO | Table 2 |" in text
    assert "3 of 4 expected numbers within tolerance" in text


def test_expected_of_the_recipe(tmp_path: Path) -> None:
    folders = put(tmp_path, report("a", 4, 0.7, expected=[expect(0.7, 0.0)]), report("b", 3, 0.6))
    assert [(c.run, c.agrees) for c in table.compare_expected(load(folders))] == [("a", True)]


def test_what_was_not_measured_does_not_agree() -> None:
    one = table.Compared("a", Expected.model_validate(expect(0.5, 1.0)), None)
    assert not one.agrees
    assert table.expected_rows([one])[0][4] == "not measured"
    assert not table.Compared("a", one.expected, math.nan).agrees


def test_mistakes_in_expected_numbers_are_shown_where_they_stand(tmp_path: Path) -> None:
    folders = put(tmp_path, report("a", 4, 0.7))
    with pytest.raises(RecipeError, match="2 problems") as caught:
        compared(folders, tmp_path, [expect(0.7, 0.1, run="aa"), expect(0.7, 0.1) | {"metric": "ac"}])
    assert [(d.message, d.hint) for d in caught.value.diagnostics] == [
        ("no run is called `aa`", "did you mean `a`?"),
        ("no run has `ac` of the task `arc`", "did you mean `arc acc`?"),
    ]
    with pytest.raises(RecipeError, match="1 problem") as caught:
        compared(folders, tmp_path, [expect(0.7, -1.0)])
    found = caught.value.diagnostics[0]
    assert found.message == "`tolerance` must be 0 or more, got -1.0"
    assert found.place is not None and found.place.line == 5


def test_exit_code_says_whether_they_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = put(tmp_path, report("a", 4, 0.7))
    path = tmp_path / "e.yaml"
    for value, code in ((0.7, 0), (0.9, 1)):
        path.write_text(yaml.safe_dump({"expected": [expect(value, 0.05)]}))
        for how in table.FORMATS:
            assert main.run(["table", str(folder), "--format", how, "--expected", str(path)]) == code
            assert "0.7" in capsys.readouterr().out
        assert main.run(["table", str(folder), "--expected", str(path), "--json"]) == code
        assert json.loads(capsys.readouterr().out)["expected"][0]["agrees"] is (code == 0)


# -- the page


@pytest.fixture
def found(tmp_path: Path) -> several.Several:
    return load(put(tmp_path / "runs", *(report(f"r{n}", n, 0.6 + n / 100) for n in range(2, 7))))


def test_page_is_well_formed_and_says_the_numbers(found: several.Several, tmp_path: Path) -> None:
    text = render_several(found, links(found, tmp_path / "out"))
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    hrefs = {str(a["href"]) for a in page.of("a")}
    assert "../runs/r2/report/report.html" in hrefs
    assert {h[1:] for h in hrefs if h.startswith("#")} <= set(ids)
    assert not re.search(r"https?://", text)
    assert "clearly worse" in text and "0.6200" in text
    assert text.count('class="front"') == 2


def test_page_without_a_metric(tmp_path: Path) -> None:
    bare = [report(f"r{n}", n, 0.5).model_copy(update={"metrics": ()}) for n in (2, 3)]
    text = render_several(load(put(tmp_path, *bare)), {})
    Page(text)
    assert "there is no frontier" in text


def test_report_of_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("runs"), report("a", 4, 0.7), report("b", 3, 0.6))
    assert main.run(["report", "runs/a", "runs/b"]) == 0
    assert capsys.readouterr().out == "runs/report/report.html\n"
    assert {p.name for p in Path("runs/report").iterdir()} == {"report.html", "report.md", "table.csv", "table.tex"}
    assert "- arc acc ↑: b (3.00 MiB: 0.6000), a (4.00 MiB: 0.7000), source (8.00 MiB: 0.7500)" in Path(
        "runs/report/report.md").read_text()  # fmt: skip
    assert main.run(["report", "runs/a", "--out", "x"]) == 2
    assert "`--out` is for the page of several runs" in capsys.readouterr().err
    assert main.run(["report", "runs/a", "runs/b", "--out", "x"]) == 0
    assert Path("x/report.html").is_file()
