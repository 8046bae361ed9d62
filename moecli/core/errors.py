"""What can go wrong for a user, as values. Only `cli` renders them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command (one meaning each, see README)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    SURROUNDINGS = 3
    BUG = 70
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True, slots=True)
class Place:
    """A range in a text file; `line` and `column` count from 1, `width` in characters."""

    path: str
    line: int
    column: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one option, found from `config.json` facts before any weight is read.

    `option` is the option's name, or a dotted path into it (`layers.0`); "" means the stage itself.
    """

    option: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem with its place, ready to be shown: the line and caret are read from `source`."""

    message: str
    place: Place | None = None
    hint: str | None = None
    related: tuple[tuple[Place, str], ...] = ()
    """Further places worth showing, each with a short label (the first of two duplicate keys)."""


class MoecliError(Exception):
    """An expected failure: one sentence what is wrong, where it is, and what to type about it.

    `where` is free text ("layer 17 of 48, expert 41") for failures that have no place in a recipe.
    """

    code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.where, self.hint = message, where, hint


class StageFailed(MoecliError):
    """A stage failed while running; finished work is kept (exit 1)."""


class UsageError(MoecliError):
    """The command line is wrong; nothing was run (exit 2)."""

    code = ExitCode.USAGE


class SurroundingsError(MoecliError):
    """Device, memory, disk, packages or model files are missing or broken (exit 3)."""

    code = ExitCode.SURROUNDINGS


class SaidElsewhere(MoecliError):
    """Another process of this run says what happened; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__("another process of this run says what happened")


class RecipeError(MoecliError):
    """A recipe with all of its problems, in file order (exit 2)."""

    code = ExitCode.USAGE

    def __init__(self, diagnostics: tuple[Diagnostic, ...], path: str) -> None:
        count = len(diagnostics)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in {path}; nothing was run")
        self.diagnostics, self.path = diagnostics, path
