"""Diagnostics, tables and progress as text. Nothing here decides anything.

A diagnostic says what is wrong, shows the line, and offers something to type (`hint`). Colour only where a
person looks: a terminal, and `NO_COLOR` unset.
"""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from moecli.core.errors import Diagnostic, MoecliError, Place, RecipeError

Lines = Callable[[str], Sequence[str] | None]
"""Path of a place -> the lines of that text, None when it cannot be read."""

TAB_CELLS = 4
MOST_CELLS = 140
"""Longer lines are cut around the caret."""

_COLOURS = {"error": "1;31", "warning": "1;33", "arrow": "34", "caret": "1;31", "related": "34", "hint": "36"}
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def wants_colour(stream: TextIO) -> bool:
    """True on a terminal that shows colours, unless `NO_COLOR` is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def lines_of(texts: Mapping[str, str]) -> Lines:
    """Lines by path: from `texts` (the command line's `--set`), else from the file."""
    from moecli.recipe.locate import lines_of as split

    def lines(path: str) -> Sequence[str] | None:
        if path in texts:
            return texts[path].split("\n")
        try:
            return split(Path(path).read_bytes().decode("utf-8-sig", errors="replace"))
        except OSError:
            return None

    return lines


# -- diagnostics


def failure_text(error: MoecliError, lines: Lines, colour: bool = False) -> str:
    """An expected failure as it is shown on stderr; no line end at its end."""
    if isinstance(error, RecipeError):
        blocks = [diagnostic_text(d, lines, colour) for d in error.diagnostics]
        return "\n\n".join([*blocks, error.message])
    where = f" ({error.where})" if error.where else ""
    return diagnostic_text(Diagnostic(error.message + where, hint=error.hint), lines, colour)


def diagnostic_text(diagnostic: Diagnostic, lines: Lines, colour: bool = False) -> str:
    """One problem: message, excerpt with caret, hint."""
    paint = _painter(colour)
    out = [f"{paint('error', 'error:')} {_safe(diagnostic.message)}"]
    if diagnostic.place is not None:
        marks = [(diagnostic.place, ""), *diagnostic.related]
        for path in dict.fromkeys(place.path for place, _ in marks):
            out += _excerpt([m for m in marks if m[0].path == path], diagnostic.place, lines(path), paint)
    if diagnostic.hint:
        out.append(f"{paint('hint', 'hint:')} {_safe(diagnostic.hint)}")
    return "\n".join(out)


def problems_json(error: MoecliError) -> list[dict[str, Any]]:
    """The same problems as objects with path, line, column, message and hint."""
    found = error.diagnostics if isinstance(error, RecipeError) else (Diagnostic(error.message, hint=error.hint),)
    return [
        {
            "path": d.place.path if d.place else None,
            "line": d.place.line if d.place else None,
            "column": d.place.column if d.place else None,
            "message": d.message,
            "hint": d.hint,
        }
        for d in found
    ]


def _painter(colour: bool) -> Callable[[str, str], str]:
    def paint(role: str, text: str) -> str:
        return f"\x1b[{_COLOURS[role]}m{text}\x1b[0m" if colour else text

    return paint


def _excerpt(
    marks: Sequence[tuple[Place, str]],
    main: Place,
    text: Sequence[str] | None,
    paint: Callable[[str, str], str],
) -> list[str]:
    """`--> path:line:column`, then each marked line once, in file order, with its carets below it."""
    first = marks[0][0]
    digits = max(len(str(place.line)) for place, _ in marks)
    typed = first.path.startswith("--")
    where = first.path if typed else f"{first.path}:{first.line}:{first.column}"
    margin = " " * (digits + 2)
    out = [f"{' ' * (digits + 1)}{paint('arrow', '-->' if first == main else ':::')} {where}"]
    shown = [mark for mark in marks if text is not None and mark[0].line <= len(text) and text[mark[0].line - 1]]
    if not shown or text is None:
        return out
    out.append(f"{margin}{paint('arrow', '|')}")
    last = None
    for number in sorted({place.line for place, _ in shown}):
        if last is not None and number > last + 1:
            out.append(f"{' ' * (digits + 1)}...")
        here = [mark for mark in shown if mark[0].line == number]
        out += _marked_line(text[number - 1], here, main, "" if typed else str(number), digits, paint)
        last = number
    return out


def _marked_line(
    text: str,
    marks: Sequence[tuple[Place, str]],
    main: Place,
    number: str,
    digits: int,
    paint: Callable[[str, str], str],
) -> list[str]:
    cells = _Cells(text, focus=marks[0][0].column - 1)
    bar, margin = paint("arrow", "|"), " " * (digits + 2)
    out = [f" {number:>{digits}} {bar} {cells.text}".rstrip()]
    for place, label in marks:
        start, width = cells.span(place.column - 1, place.width)
        sign = paint("caret", "^" * width) if place == main else paint("related", "-" * width)
        out.append(f"{margin}{bar} {' ' * start}{sign}{' ' + label if label else ''}")
    return out


class _Cells:
    """One source line as a terminal shows it: tabs widened, controls visible, cut around `focus`."""

    def __init__(self, text: str, focus: int) -> None:
        shown: list[str] = []
        at = [0]
        for character in text:
            piece = _visible(character, at[-1])
            shown.append(piece)
            at.append(at[-1] + _cells(piece))
        self._at = at
        start, stop = 0, len(shown)
        if at[-1] > MOST_CELLS:
            focus = min(focus, len(shown) - 1)
            start = next(i for i in range(len(shown)) if at[i] >= at[focus] - MOST_CELLS // 2)
            stop = max(i for i in range(len(shown) + 1) if at[i] <= at[start] + MOST_CELLS)
        cut = "..." if start else ""
        self.text = cut + "".join(shown[start:stop]) + ("..." if stop < len(shown) else "")
        self._offset = len(cut) - at[start]
        self._end = at[stop] + self._offset

    def span(self, column: int, width: int) -> tuple[int, int]:
        """First cell and number of cells of characters column..column+width, at least one."""
        last = len(self._at) - 1
        start = self._at[min(column, last)] + self._offset + max(0, column - last)
        stop = min(self._at[min(column + width, last)] + self._offset, max(self._end, start + 1))
        return start, max(1, stop - start)


def _visible(character: str, cell: int) -> str:
    if character == "\t":
        return " " * (TAB_CELLS - cell % TAB_CELLS)
    if unicodedata.category(character) in ("Cc", "Cs") or character in _BIDI:
        return "\N{REPLACEMENT CHARACTER}"
    return character


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _safe(text: str) -> str:
    """A message on one line, with nothing in it that moves the cursor."""
    return "".join(_visible(c, 0) if c != "\n" else " " for c in text)


# -- tables


def table_text(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), width: int | None = None
) -> str:
    """Columns under a rule; `right` are the columns to align right. Wraps only on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for index, title in enumerate(head):
        table.add_column(title, justify="right" if index in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_safe(cell)) for cell in row))
    out = sys.stdout
    colour = wants_colour(out)
    if width is None:
        width = None if out.isatty() else 10_000
    console = Console(file=out, width=width, no_color=not colour, highlight=False, force_terminal=colour)
    with console.capture() as capture:
        console.print(table, soft_wrap=False)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


# -- progress


def duration_text(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 14 min`"""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class PlainProgress:
    """One line when a stage starts and ends, and at most one every ten seconds in between."""

    every_s = 10.0

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock = out, clock
        self._last: dict[str, float] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        stage, kind = str(event.get("stage", "")), event["event"]
        if kind == "progress":
            if self.clock() - self._last.get(stage, float("-inf")) < self.every_s:
                return
            self._last[stage] = self.clock()
        elif kind == "stage_started":
            self._last[stage] = self.clock()
        if line := event_line(event):
            self.out.write(line + "\n")
            self.out.flush()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def event_line(event: Mapping[str, Any]) -> str | None:
    """An event of a run as one line; None for those that say nothing to a person."""
    stage, kind = event.get("stage", ""), event["event"]
    if kind == "stage_started":
        return f"{stage}: started"
    if kind == "point_started":
        return f"\npoint {event['number']} of {event['points']}: {event['point']}"
    if kind == "stage_cached":
        return f"{stage}: done already"
    if kind == "stage_finished":
        return f"{stage}: done in {duration_text(event.get('seconds', 0))}"
    if kind in ("note", "warning"):
        prefix = "warning: " if kind == "warning" else ""
        return _safe(f"{prefix}{stage + ': ' if stage else ''}{event.get('text', '')}")
    if kind == "progress" and event.get("total"):
        eta = event.get("eta_s")
        left = f", {duration_text(eta)} left" if eta is not None and event["done"] < event["total"] else ""
        return f"{stage}: {event.get('label', '')} {event['done']}/{event['total']}{left}"
    return None


class LiveProgress:
    """A bar with the time left for the stage that runs; everything else scrolls above it."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=out, no_color=not wants_colour(out), highlight=False, markup=False)
        left = TextColumn("{task.fields[left]}", markup=False)
        what = TextColumn("{task.description}", markup=False)
        columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
        self._bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        self._task: Any = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind, stage = event["event"], event.get("stage", "")
        if kind == "stage_started":
            self._clear()
            self._task = self._bar.add_task(str(stage), total=None, left="")
        elif kind == "progress" and self._task is not None:
            eta = event.get("eta_s")
            self._bar.update(
                self._task, completed=event.get("done"), total=event.get("total"),
                description=f"{stage}: {event.get('label', '')}",
                left=f"{duration_text(eta)} left" if eta is not None else "",
            )  # fmt: skip
        else:
            if kind == "stage_finished":
                self._clear()
            if line := event_line(event):
                self._bar.console.print(line, soft_wrap=True)

    def _clear(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def progress(out: TextIO) -> PlainProgress | LiveProgress:
    """The listener that fits: bars on a terminal, plain lines elsewhere."""
    return LiveProgress(out) if out.isatty() and os.environ.get("TERM") != "dumb" else PlainProgress(out)
