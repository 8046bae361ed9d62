"""report.json keeps what it was given, and report.md says it in words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moecli.core.artifacts import Evaluation, Metric
from moecli.core.errors import MoecliError, SurroundingsError
from moecli.runner.report import Check, Figures, MetricRow, SizeRecord, SizeSide, Verification, load, metric_rows, save
from moecli.runner.report_words import (
    bytes_text,
    count_text,
    coverage,
    duration_text,
    experts_left,
    fenced,
    number_text,
    parts_of,
    per_layer_text,
    render_markdown,
    stages_text,
    value_text,
    verdict,
)
from tests.runner.reports import bare, sized, small

GOLDEN = Path(__file__).with_name("report_small.md")


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    for report in (small(), bare(), sized(3, 4)):
        save(report, tmp_path / report.name)
        assert load(tmp_path / report.name) == report
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == ["report.html", "report.json", "report.md"]


def test_infinity_stays_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    save(small(), tmp_path)
    value = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert (value["schema"], value["metrics"][2]["after"]) == (2, "Infinity")
    assert load(tmp_path).metrics[2].after == math.inf


def test_number_lists_take_one_line(tmp_path: Path) -> None:
    save(small(), tmp_path)
    assert '   "0": [100, 50, 50, 0],\n' in (tmp_path / "report.json").read_text()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": 3, "news": []}')
    with pytest.raises(MoecliError, match=r"report.json has format 3, this moecli reads up to 2") as caught:
        load(tmp_path)
    assert caught.value.hint == "`pip install --upgrade moecli`"


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"no report at .*report\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON \(.*line 1\)"),
        ("[]", "is damaged at the top level"),
        ('{"schema": 2}', "is damaged at name: Field required"),
    ],
)
def test_a_damaged_report(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(MoecliError, match=message):
        load(tmp_path)


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    save(small(), tmp_path)
    value = json.loads((tmp_path / "report.json").read_text())
    value["stages"][0]["second"] = 1
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(MoecliError, match=r"damaged at stages\.0\.second: Extra inputs"):
        load(tmp_path)


def test_markdown_of_a_small_run() -> None:
    assert render_markdown(small()) == GOLDEN.read_text(encoding="utf-8")


def test_markdown_of_a_run_without_anything() -> None:
    text = render_markdown(bare())
    for absent in (
        "Size not recorded; quality not measured",
        "No evaluation in this run",
        "Sizes were not recorded in this run",
        "No calibration in this run",
        "No stage was run",
        "The written model was not verified in this run",
    ):
        assert absent in text


def row(before: float | None, after: float | None, stderr: float | None, up: bool | None = True) -> MetricRow:
    return MetricRow(
        task="t",
        metric="m",
        before=before,
        before_stderr=stderr,
        after=after,
        after_stderr=stderr,
        samples=10,
        higher_is_better=up,
    )


@pytest.mark.parametrize(
    ("metric", "reading"),
    [
        (row(0.5, 0.3, 0.1), "no clear change"),  # 0.2 apart, sqrt(2) * 0.1 each error
        (row(0.5, 0.2, 0.1), "worse"),
        (row(0.5, 0.8, 0.1), "better"),
        (row(0.5, 0.8, 0.1, up=False), "worse"),
        (row(0.5, 0.8, 0.1, up=None), "changed"),
        (row(10.0, 10.1, None, up=False), "worse"),
        (row(10.0, 10.0, None), "no clear change"),
        (row(1.0, 1.0, 0.0), "no clear change"),
        (row(None, 0.5, 0.1), "not compared"),
        (row(0.5, None, 0.1), "not compared"),
        (row(math.inf, math.inf, None), "not compared"),
        (row(10.0, math.inf, None, up=False), "worse"),
    ],
)
def test_how_a_difference_is_read(metric: MetricRow, reading: str) -> None:
    assert metric.reading == reading


def test_error_of_a_difference() -> None:
    metric = small().metrics[0]
    assert (metric.delta, metric.delta_stderr) == (-0.25, pytest.approx(0.05))


def test_evaluations_are_paired_by_task_and_metric() -> None:
    before = Evaluation((Metric("a", "acc", 0.5, 0.1, 20, True), Metric("b", "ppl", 9.0, None, 7, False)))
    after = Evaluation((Metric("c", "acc", 0.1, 0.2, 5, True), Metric("a", "acc", 0.4, 0.2, 10, True)))
    rows = metric_rows(before, after)
    assert [(r.task, r.before, r.before_stderr, r.after, r.after_stderr, r.samples) for r in rows] == [
        ("a", 0.5, 0.1, 0.4, 0.2, 10),
        ("b", 9.0, None, None, None, 7),
        ("c", None, None, 0.1, 0.2, 5),
    ]
    assert [r.reading for r in metric_rows(before, None)] == ["not compared", "not compared"]
    assert metric_rows(None, None) == ()


def test_verdict_of_a_failed_verification() -> None:
    checks = (Check(name="shapes", passed=False), Check(name="names", passed=True))
    report = bare().model_copy(update={"verification": Verification(status="failed", checks=checks)})
    assert verdict(report).startswith("Do not use this model, verification failed (shapes); size")


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (SizeSide(bytes=50, parameters=1), "2.00 times smaller (100 B → 50 B); quality"),
        (SizeSide(bytes=200, parameters=1), "2.00 times larger (100 B → 200 B); quality"),
        (SizeSide(bytes=100, parameters=1), "Same size, 100 B; quality"),
        (None, "No model was written (the source has 100 B); quality"),
    ],
)
def test_verdict_on_size(after: SizeSide | None, words: str) -> None:
    size = SizeRecord(before=SizeSide(bytes=100, parameters=1), after=after)
    assert verdict(bare().model_copy(update={"size": size})).startswith(words)


def test_layers_that_differ_say_so() -> None:
    assert per_layer_text((64, 48, 32)) == "32 to 64 (mean 48.0)"


def test_parts_keep_their_order() -> None:
    before = SizeSide(bytes=6, parameters=1, by_part={"other": 1, "router": 0, "experts": 5})
    after = SizeSide(bytes=3, parameters=1, by_part={"shared": 3})
    assert parts_of(SizeRecord(before=before, after=after)) == ["experts", "shared", "other"]


def test_where_experts_went() -> None:
    figures = Figures(
        load={2: (1, 2, 3)},
        kept={0: (1, 3), 2: (1,)},
        groups={0: (0, 0, 1, 1), 1: (1, -1, 0, 1)},
    )
    assert figures.homes(0) == (1, 1, 3, 3)
    assert figures.homes(1) == (0, None, 2, 0)
    assert figures.homes(2) == (None, 1, None)
    assert figures.homes(9) == ()
    assert [experts_left(figures, n) for n in (0, 1, 2, 9)] == ["1(0) 3(2)", "0(3) 2", "1", ""]


def test_coverage_counts_tokens_and_starved_experts() -> None:
    first, second = coverage(small().figures_data)
    assert (first.least, first.median, first.most, first.starved) == (0, 50, 100, (3,))
    assert (second.least, second.median, second.most, second.starved) == (10, 25, 140, ())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10**9, "954 MiB"), (65_700_000_000, "61.2 GiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_other_numbers() -> None:
    assert [count_text(n) for n in (999_999, 1_000_000, 30_532_122_624)] == ["999,999", "1.00 M", "30.5 B"]
    assert [duration_text(s) for s in (0.421, 59.94, 59.96, 185, 8040)] == [
        "0.42 s",
        "59.9 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 14 min",
    ]
    assert [number_text(v) for v in (None, 0.74123, 12.345, 123456.0, math.nan)] == [
        "–",
        "0.7412",
        "12.35",
        "1.235e+05",
        "nan",
    ]
    assert value_text(0.5, 0.01) == "0.5000 ± 0.0100"
    assert value_text(10.91, 0.5) == "10.91 ± 0.50"


def test_only_stages_that_ran_count_as_time_of_this_run() -> None:
    cached, ran, other = small().stages
    assert stages_text((cached, ran, other)).startswith("This run took 3.50 s; 1 stage came from an earlier run")
    assert stages_text((ran, other)) == "All stages together took 3.50 s."
    assert stages_text((cached,)) == "Every stage came from an earlier run; the times are from then."


def test_a_fence_outgrows_its_text() -> None:
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"
