"""The pages in a real browser, and that the check finds what is planted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moecli.runner.report import Chart, Paired, Report, Series
from moecli.runner.report_html import render_html, render_several
from moecli.runner.several import load
from tests.runner.reports import bare, small
from tests.runner.test_several import put, report

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_page.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_page", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_page"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> object:
    if script.find_browser() is None:
        pytest.skip("no Chromium on this machine")

    def run(*pages: Path) -> list[list[str]]:
        code = script.main([str(page) for page in pages])
        document = json.loads(capsys.readouterr().out)
        assert code == int(document["status"] == "failed")
        return [page["findings"] for page in document["pages"]]

    return run


def drawn() -> Report:
    """Every figure, every column."""
    lines = tuple(
        Series(name=f"stage {n}", x=(0.0, 1.0, 2.0, 3.0), y=(0.1, None, 0.1 * n + 0.2, 0.3), error=(0.01,) * 4)
        for n in range(8)
    )
    chart = Chart(title="Error by layer", caption="Lower is better.", x_label="layer", y_label="error", series=lines)
    report = small()
    paired = Paired(scale="difference", estimate=-0.25, stderr=0.03, low=-0.31, high=-0.19, items=200, p=1e-9, lost=55,
                    gained=5)  # fmt: skip
    metrics = (report.metrics[0].model_copy(update={"paired": paired}), *report.metrics[1:])
    data = report.figures_data.model_copy(
        update={"charts": (chart, chart.model_copy(update={"title": "On a log scale", "log_y": True}))}
    )
    return report.model_copy(update={"figures_data": data, "metrics": metrics})


def test_our_pages_pass(check: object, tmp_path: Path) -> None:
    pages = {"all": render_html(drawn()), "bare": render_html(bare())}
    runs = [report(f"r{n}", n, 0.6 + n / 50, method="ab"[n % 2]) for n in range(2, 8)]
    pages["several"] = render_several(load(put(tmp_path / "runs", *runs)), {})
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text)
    assert check(*(tmp_path / f"{name}.html" for name in pages)) == [[], [], []]  # type: ignore[operator]


PLANTED = {
    "light: exception": "<script>undefined_name()</script>",
    "light: console.error": "<script>console.error('x')</script>",
    "light: a request to": '<img alt="" src="http://example.invalid/x.png">',
    "light: contrast 1.": '<p style="color:#ccc">pale</p>',
    "dark: contrast": '<p style="color:#222">only readable on paper</p>',
    "phone: the page is 2016 px wide": '<div style="width:2000px">wide</div>',
    "light: a drawing without a name": '<svg width="9" height="9"></svg>',
    "light: a control without a name": "<button></button>",
    "light: the id twice is given twice": '<i id="twice">a</i><i id="twice">b</i>',
    "keyboard: no visible focus on": '<button style="outline:none">bare</button>',
    "keyboard: Tab does not reach": '<button tabindex="-1">lost</button>',
    "light: scrolls but the keyboard": '<p style="overflow-x:scroll;width:5rem"><b style="padding:9rem">x</b></p>',
    "light: a heading of level 4": "<h2>high</h2><h4>deep</h4>",
}


def test_what_is_planted_is_found(check: object, tmp_path: Path) -> None:
    page = render_html(bare())
    paths = []
    for number, planted in enumerate(PLANTED.values()):
        paths.append(tmp_path / f"{number}.html")
        text = page.replace("<h1>", planted + "<h1>", 1)
        if "http:" in planted:  # our own policy would stop it before it is asked for
            text = text.replace("default-src 'none'", "default-src *")
        paths[-1].write_text(text)
    for wanted, findings in zip(PLANTED, check(*paths), strict=True):  # type: ignore[operator]
        assert any(finding.startswith(wanted) for finding in findings), (wanted, findings)


def test_without_a_browser_it_is_skipped(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.html").write_text("x")
    monkeypatch.setattr(script, "BROWSERS", ("no-such-browser",))
    assert script.main([str(tmp_path / "p.html")]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "skipped", "reason": "no Chromium on this machine"}
    assert script.main([str(tmp_path / "gone.html")]) == 2
