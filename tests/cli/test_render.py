"""Diagnostics, tables and progress, letter by letter."""

from __future__ import annotations

import io
from typing import Any

import pytest

from moecli.cli import render
from moecli.core.errors import Diagnostic, MoecliError, Place, RecipeError, StageFailed


def shown(text: str, line: int, column: int, width: int = 1, **more: Any) -> list[str]:
    found = Diagnostic("what", Place("x.yaml", line, column, width), **more)
    return render.diagnostic_text(found, render.lines_of({"x.yaml": text})).split("\n")


def test_the_form_of_a_message() -> None:
    text = "\n" * 7 + "    with: {keep: 160}\n"
    found = Diagnostic(
        "`keep` must be below the model's 128 experts, got 160",
        Place("recipes/half.yaml", 8, 18, 3),
        "`keep` counts the experts left per layer; `keep: 64` halves them",
    )
    assert render.diagnostic_text(found, render.lines_of({"recipes/half.yaml": text})) == (
        "error: `keep` must be below the model's 128 experts, got 160\n"
        "  --> recipes/half.yaml:8:18\n"
        "   |\n"
        " 8 |     with: {keep: 160}\n"
        "   |                  ^^^\n"
        "hint: `keep` counts the experts left per layer; `keep: 64` halves them"
    )


def test_a_caret_below_a_tab_and_below_wide_characters() -> None:
    assert shown("a:\tb", 1, 4)[3:] == [" 1 | a:  b", "   |     ^"]
    assert shown("\u6a21\u578b: \u4e13\u5bb6", 1, 5, 2)[3:] == [" 1 | \u6a21\u578b: \u4e13\u5bb6", "   |       ^^^^"]
    assert shown("e\u0301a: b", 1, 6)[4] == "   |     ^", "a combining accent takes no cell"


def test_nothing_in_a_recipe_moves_the_cursor() -> None:
    text = "\n".join(shown("a: \x1b[31mred\u202e", 1, 4, 3))
    assert "\x1b" not in text and "\u202e" not in text
    assert "a: \ufffd[31mred\ufffd" in text


def test_a_place_behind_the_end_of_a_line() -> None:
    assert shown("tasks: [a", 1, 10)[3:] == [" 1 | tasks: [a", "   |          ^"]
    assert shown("a: b", 1, 4, 99)[4] == "   |    ^"


def test_a_long_line_is_cut_around_the_caret() -> None:
    text = "x" * 300 + "HERE" + "y" * 300
    line, caret = shown(text, 1, 301, 4)[3:]
    assert line.startswith(" 1 | ...x") and line.endswith("y...") and len(line) < 160
    assert line[caret.index("^") :].startswith("HERE") and caret.count("^") == 4


def test_two_places_in_file_order() -> None:
    first = ((Place("x.yaml", 2, 1, 4), "first given here"),)
    assert shown("a\nkeep: 1\nb\nkeep: 2", 4, 1, 4, related=first)[1:] == [
        "  --> x.yaml:4:1",
        "   |",
        " 2 | keep: 1",
        "   | ---- first given here",
        "  ...",
        " 4 | keep: 2",
        "   | ^^^^",
    ]


def test_without_a_file_only_the_place_is_shown() -> None:
    found = Diagnostic("what", Place("gone.yaml", 3, 1))
    assert render.diagnostic_text(found, render.lines_of({})) == "error: what\n  --> gone.yaml:3:1"


def test_all_problems_then_their_number() -> None:
    error = RecipeError((Diagnostic("one"), Diagnostic("two", hint="try")), "x.yaml")
    assert render.failure_text(error, render.lines_of({})) == (
        "error: one\n\nerror: two\nhint: try\n\n2 problems in x.yaml; nothing was run"
    )


def test_a_failure_of_a_stage() -> None:
    error = StageFailed("Hessian not positive definite", where="layer 17 of 48, expert 41", hint="raise `samples`")
    assert render.failure_text(error, render.lines_of({})) == (
        "error: Hessian not positive definite (layer 17 of 48, expert 41)\nhint: raise `samples`"
    )


def test_colour_is_only_added() -> None:
    found = Diagnostic("what", Place("x.yaml", 1, 1), "try")
    lines = render.lines_of({"x.yaml": "a: b"})
    coloured = render.diagnostic_text(found, lines, colour=True)
    assert coloured.startswith("\x1b[1;31merror:\x1b[0m what\n")
    import re

    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == render.diagnostic_text(found, lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_who_gets_colour(
    stream: io.StringIO, environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert render.wants_colour(stream) is wanted


def test_problems_as_json() -> None:
    error = RecipeError((Diagnostic("one", Place("x.yaml", 2, 3), "try"),), "x.yaml")
    assert render.problems_json(error) == [{"path": "x.yaml", "line": 2, "column": 3, "message": "one", "hint": "try"}]
    assert render.problems_json(MoecliError("no disk")) == [
        {"path": None, "line": None, "column": None, "message": "no disk", "hint": None}
    ]


def test_a_table() -> None:
    text = render.table_text(["task", "before"], [["[a](b)", "1.0"], ["longer name", "12.5"]], right=(1,))
    assert text.splitlines() == [
        "task          before",
        "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * 20,
        "[a](b)           1.0",
        "longer name     12.5",
    ]


def plain(events: list[dict[str, Any]], times: list[float]) -> list[str]:
    out, ticks = io.StringIO(), iter(times)
    listener = render.PlainProgress(out, lambda: next(ticks))
    for event in events:
        listener(event)
    return out.getvalue().splitlines()


def step(done: int, eta: float | None = None) -> dict[str, Any]:
    return {"event": "progress", "stage": "prune/reap", "label": "layers", "done": done, "total": 9, "eta_s": eta}


def test_plain_progress_says_one_line_in_ten_seconds() -> None:
    started = {"event": "stage_started", "stage": "prune/reap"}
    finished = {"event": "stage_finished", "stage": "prune/reap", "seconds": 83.2}
    events = [started, step(1), step(2, 70.4), step(3), step(4, 5.0), finished]
    assert plain(events, [0, 3, 11, 11, 12, 20.9, 22, 22]) == [
        "prune/reap: started",
        "prune/reap: layers 2/9, 1 min 10 s left",
        "prune/reap: done in 1 min 23 s",
    ]


def test_what_other_events_say() -> None:
    events = [
        {"event": "stage_cached", "stage": "prune/reap", "key": "ab"},
        {"event": "note", "stage": "prune/reap", "text": "layer 3: no token"},
        {"event": "warning", "stage": "prune/reap", "text": "slow\ndisk"},
        {"event": "run_finished", "report": "x"},
        {"event": "something new"},
    ]
    assert plain(events, []) == [
        "prune/reap: done already",
        "prune/reap: layer 3: no token",
        "warning: prune/reap: slow disk",
    ]


def test_live_progress_leaves_only_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with render.progress(out) as listener:
        assert isinstance(listener, render.LiveProgress)
        listener({"event": "stage_started", "stage": "[a]"})
        listener(step(3, 2.0))
        listener({"event": "note", "stage": "[a]", "text": "[b]"})
        listener({"event": "stage_finished", "stage": "[a]", "seconds": 2.0})
    assert "[a]: [b]" in out.getvalue() and "[a]: done in 2.0 s" in out.getvalue()
    assert isinstance(render.progress(io.StringIO()), render.PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42, "42 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (8040, "2 h 14 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert render.duration_text(seconds) == text
