"""From an argument list to an exit code: the one place that turns failures into text.

Expected failures (MoecliError) show what, where and how to fix it. Anything else is a bug: one line, and a
log file with the whole trace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import typer

from moecli import __version__
from moecli.cli import render
from moecli.core.errors import ExitCode, MoecliError, RecipeError, SaidElsewhere, SurroundingsError, UsageError

QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Libraries that would write over our progress lines; set only where the user has not."""


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that what is open gets closed and finished parts are kept."""


SIGNALS: dict[type, signal.Signals] = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
"""What the main thread raises when it gets a signal."""
SOON_S = 0.05
"""After which a signal that was forgotten is sent once more: the object is gone by then."""


def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Nothing is raised."""
    _prepare_streams()
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    try:
        with _sigterm():
            code = _invoke(argv)
            sys.stdout.flush()
            return code
    except SaidElsewhere as error:
        return int(error.code)
    except MoecliError as error:
        return _show(error, argv)
    except KeyboardInterrupt:
        return _stopped("interrupted", ExitCode.INTERRUPTED, argv)
    except Terminated:
        return _stopped("terminated", ExitCode.TERMINATED, argv)
    except BrokenPipeError:
        # The reader of our output went away (`moecli methods | head`): nobody is listening, nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(ExitCode.DONE)
    except Exception as error:
        known = _known(error)
        return _bug(error, argv) if known is None else _show(known, argv)


def _invoke(argv: Sequence[str]) -> int:
    from moecli.cli.app import app

    command = typer.main.get_command(app)
    try:
        with command.make_context("moecli", list(argv)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _CLICK as error:
        raise usage_error(error, argv) from None
    return int(ExitCode.DONE)


_CLICK = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Typer's root of usage errors, wherever this version of typer keeps it."""


def usage_error(error: BaseException, argv: Sequence[str]) -> UsageError:
    """What typer found wrong with the command line, in our words."""
    from moecli.recipe.near import did_you_mean, near

    kind = type(error).__name__
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "moecli"
    helps = f"`{path} --help` shows how"
    said = re.sub(r"\s+", " ", getattr(error, "message", "") or str(error)).strip().rstrip(".")
    if kind == "NoSuchOption":
        option = error.option_name  # type: ignore[attr-defined]
        known = [name for p in context.command.params for name in p.opts] if context is not None else []
        return UsageError(f"unknown option `{option}` of `{path}`", hint=did_you_mean(near(option, known), helps))
    if kind == "MissingParameter":
        name = _parameter_name(error)
        return UsageError(f"`{path}` needs {name}", hint=helps)
    if match := re.match(r"No such command '(.*?)'", said):
        known = list(context.command.commands) if context is not None else []
        hint = did_you_mean(near(match[1], known), "`moecli --help` lists the commands")
        return UsageError(f"unknown command `{match[1]}`", hint=hint)
    if match := re.match(r"Got unexpected extra argument(?:\(?s\)?)? \((.*)\)", said):
        return UsageError(f"`{path}` does not take `{match[1]}`", hint=helps)
    if match := re.match(r"Option '(.*?)' (requires an argument|does not take a value)", said):
        wants = "needs a value" if match[2].startswith("requires") else "takes no value"
        return UsageError(f"`{match[1]}` {wants}", hint=helps)
    if kind == "BadParameter":
        given = _given(error, argv)
        got = f", got `{given}`" if given is not None else ""
        return UsageError(f"{_parameter_name(error)} must be {_wanted(said)}{got}", hint=helps)
    return UsageError(said[:1].lower() + said[1:], hint=helps)


def _parameter_name(error: BaseException) -> str:
    parameter = getattr(error, "param", None)
    if parameter is None:
        return "an argument"
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name or '').upper().strip('[]')}`"
    return f"`{parameter.opts[-1]}`"


def _given(error: BaseException, argv: Sequence[str]) -> str | None:
    """What stands behind the option on the command line."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(argv[index + 1 : index + 2]), None)
    return None


def _wanted(said: str) -> str:
    """What the option takes, from the parser's own sentence."""
    if match := re.search(r"one of (.*)", said):
        return " or ".join(f"`{choice}`" for choice in re.findall(r"'(.*?)'", match[1]))
    kinds = {"integer": "a whole number", "int": "a whole number", "float": "a number", "number": "a number"}
    return next((words for word, words in kinds.items() if re.search(rf"valid {word}\b", said)), "something else")


def _show(error: MoecliError, argv: Sequence[str]) -> int:
    if isinstance(error, RecipeError):
        from moecli.recipe.locate import in_file_order

        error = RecipeError(in_file_order(error.diagnostics), error.path or "the command line")
    lines = render.lines_of({"--set": "\n".join(sets_of(argv))})
    _say(render.failure_text(error, lines, render.wants_colour(sys.stderr)))
    if "--json" in argv:
        _document(error.message, error.code, render.problems_json(error))
    return int(error.code)


def sets_of(argv: Sequence[str]) -> list[str]:
    """What each `--set` on the command line says, for showing it below a message; line ends become spaces."""
    found = []
    for index, word in enumerate(argv):
        if word == "--set" and index + 1 < len(argv):
            found.append(argv[index + 1])
        elif word.startswith("--set="):
            found.append(word.removeprefix("--set="))
    return [re.sub(r"\s", " ", text) for text in found]


def _stopped(how: str, code: ExitCode, argv: Sequence[str]) -> int:
    _say(f"{how}; finished parts are kept, the same command goes on from there")
    if "--json" in argv:
        _document(how, code, [])
    return int(code)


_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO}
)
"""Error numbers that are the machine's doing wherever they come from."""


def _known(error: Exception) -> SurroundingsError | None:
    """Failures of the machine that no room could foresee: disk, permissions, memory."""
    if isinstance(error, OSError) and error.errno in _MACHINE:
        where = f" (`{error.filename}`)" if error.filename else ""
        return SurroundingsError(f"{(error.strerror or str(error)).lower()}{where}")
    if isinstance(error, MemoryError):
        return SurroundingsError("not enough memory", hint="`moecli plan RECIPE` shows how much a run needs")
    return None


def _bug(error: Exception, argv: Sequence[str]) -> int:
    message = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    trace = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="moecli-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as log:
        log.write(f"moecli {__version__}, python {sys.version}\nin {Path.cwd()}\nmoecli {' '.join(argv)}\n\n{trace}")
    _say(f"error: {message}; this is a bug in moecli, the whole trace is in {log.name}")
    if "--json" in argv:
        _document(message, ExitCode.BUG, [], log=log.name)
    return int(ExitCode.BUG)


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _document(message: str, code: ExitCode, problems: list[dict[str, object]], **more: str) -> None:
    document = {"error": message, "exit_code": int(code), "problems": problems, **more}
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(document, ensure_ascii=False, indent=1), flush=True)  # noqa: T201


def _prepare_streams() -> None:
    """A character that the terminal cannot show must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated while a command runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with _heard_in_finalizers():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _heard_in_finalizers() -> Iterator[None]:
    """Python prints and forgets what is raised while an object is finalized: such a signal is sent once more."""
    later: list[threading.Timer] = []
    before = sys.unraisablehook

    def again(forgotten: sys.UnraisableHookArgs) -> None:
        number = SIGNALS.get(forgotten.exc_type)
        if number is None:
            before(forgotten)
            return
        later.append(threading.Timer(SOON_S, os.kill, (os.getpid(), number)))
        later[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in later:
            timer.cancel()
            timer.join()
