"""YAML text -> plain values, and where each of them stands.

YAML is read as PyYAML does (version 1.1), but what reads as something other than it looks is refused rather
than guessed: octal `0100`, `1_000`, base 60 `1:30`, dates, `.nan`, keys that are no text, duplicates, tags.
Anchors, aliases and merge keys work. Paths are dotted: `stages.1.with.keep`; list entries count from 0.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moecli.core.errors import Diagnostic, Place, RecipeError, UsageError
from moecli.recipe.near import as_number

MAX_BYTES = 1 << 20
"""A recipe larger than this is some other file."""
MAX_DEPTH = 60
MAX_VALUES = 50_000
"""Aliases of aliases grow without bound; no recipe comes near."""

Related = tuple[tuple[Place, str], ...]
"""Further places, each with a label, as in `Diagnostic`."""

_TAG = "tag:yaml.org,2002:"
_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
_READ_AS = {"bool": "true or false", "null": "nothing", "float": "a number", "timestamp": "a date"}
_TRUE = ("yes", "true", "on")
_FALSE = ("no", "false", "off")


@dataclass(frozen=True, slots=True)
class Span:
    """Where one value stands. `key` is None for entries of a list."""

    value: Place
    key: Place | None = None
    text: str | None = None
    """What is written there, for scalars."""
    plain: bool = False
    """Written without quotes."""


@dataclass
class Located:
    """Plain values and, by dotted path, where each stands."""

    path: str
    values: Any = None
    spans: dict[str, Span] = field(default_factory=dict)
    suspect: set[str] = field(default_factory=set)
    """Paths that have a diagnostic already."""

    def place(self, path: str, *, key: bool = False) -> Place | None:
        """The value at `path`, or its key; None when nothing was read from a file.

        What is absent is shown at the nearest thing that should hold it: an option at its stage's `with`, or
        else at the stage's name.
        """
        span = self.spans.get(path)
        if span is not None:
            stage = self.spans.get(f"{path}.run")
            if stage is not None and span.key is None:
                return stage.value
            return span.key if key and span.key else span.value
        parent, dot, _ = path.rpartition(".")
        return self.place(parent, key=True) if dot else None

    def text(self, path: str) -> str | None:
        """The scalar at `path` as it is written, without quotes."""
        span = self.spans.get(path)
        return span.text if span else None

    def plain(self, path: str) -> bool:
        """True when the scalar at `path` is written without quotes."""
        span = self.spans.get(path)
        return span is not None and span.plain


def lines_of(text: str) -> list[str]:
    """Lines as YAML counts them: also a lone CR, NEL and the Unicode separators end one."""
    return _BREAK.split(text)


def read(path: Path) -> tuple[Located, list[Diagnostic]]:
    """A recipe file, and what is wrong in it while it can still be read on.

    Raises UsageError when there is no such file, RecipeError where reading cannot go on (encoding, syntax).
    """
    return parse(_text(path), str(path))


def parse(text: str, path: str) -> tuple[Located, list[Diagnostic]]:
    """Like `read`, for text; `path` is only shown."""
    node = _compose(text, path)
    builder = _Builder(path, lines_of(text))
    builder.located.values = builder.build(node, ())
    return builder.located, builder.found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"no recipe at `{path}`", hint=_near_file(path)) from None
    except IsADirectoryError:
        raise UsageError(f"`{path}` is a folder, not a recipe", hint=_recipe_in(path)) from None
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not a file name"
        raise UsageError(f"cannot read `{path}`: {reason}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise _not_utf8(data, problem.start, str(path)) from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"`{path}` is larger than {MAX_BYTES >> 20} MiB and cannot be a recipe")
    return text


def _not_utf8(data: bytes, offset: int, path: str) -> RecipeError:
    before = lines_of(data[:offset].decode("utf-8-sig"))
    place = Place(path, len(before), len(before[-1]) + 1)
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    message = f"the file is not UTF-8: byte 0x{data[offset]:02X} at offset {offset}"
    hint = "it looks like UTF-16" if utf16 else "it looks like Latin-1"
    hint += f"; `iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 {path}` prints it as UTF-8"
    return _fatal(message, place, hint if utf16 or data[offset] >= 0xA0 else None)


def _near_file(path: Path) -> str | None:
    try:
        files = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return f"there is no folder `{path.parent}`"
    found = difflib.get_close_matches(path.name, files, 1, 0.5)
    return f"did you mean `{path.with_name(found[0])}`?" if found else None


def _recipe_in(folder: Path) -> str | None:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"did you mean `{files[0]}`?" if len(files) == 1 else None


def _fatal(
    message: str, place: Place, hint: str | None = None, related: tuple[tuple[Place, str], ...] = ()
) -> RecipeError:
    return RecipeError((Diagnostic(message, place, hint, related),), place.path)


# -- syntax


class _Loader(yaml.SafeLoader):
    """Composes nodes; an alias keeps the place where it is used."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "nested too deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias is not None and node is not None:
            node = copy.copy(node)
            node.start_mark, node.end_mark = alias.start_mark, alias.end_mark
        return node


def _compose(text: str, path: str) -> yaml.Node:
    try:
        loader = _Loader(text)
        if not loader.check_node():
            raise _fatal("the recipe is empty", Place(path, 1, 1), "`moecli init` prints a commented one")
        node = loader.get_node()
        if loader.check_node():
            mark = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
            place = Place(path, mark.line + 1, mark.column + 1, 3)
            raise _fatal("a recipe is one YAML document, a second one starts here", place)
    except yaml.reader.ReaderError as problem:
        raise _bad_character(text, problem, path) from None
    except yaml.MarkedYAMLError as problem:
        raise _syntax(text, problem, path) from None
    assert isinstance(node, yaml.Node)
    return node


def _bad_character(text: str, problem: yaml.reader.ReaderError, path: str) -> RecipeError:
    before = lines_of(text[: problem.position])
    place = Place(path, len(before), len(before[-1]) + 1)
    code = ord(text[problem.position])
    return _fatal(f"the character U+{code:04X} is not allowed in YAML", place)


_SYNTAX: tuple[tuple[str, str, str | None], ...] = (
    ("mapping values are not allowed here", "a second `:` cannot stand here",
     'text with `: ` in it needs quotes: `"a: b"`'),
    ("(?:block )?sequence entries are not allowed.*", "a list entry cannot start here",
     "put `- ` on a line of its own"),
    ("could not find expected ':'", "a key without `:`", "write `key: value`, with a space after the colon"),
    ("expected <block end>.*", "the indentation fits no line above", None),
    (r"expected ',' or '\]'.*", "the list is not closed: expected `,` or `]`", None),
    (r"expected ',' or '\}'.*", "the mapping is not closed: expected `,` or `}`", None),
    (r"found character '\\t'.*", "YAML allows no tab here", "use spaces"),
    ("found character '(.)'.*", "text cannot start with `{0}` here", "put it in quotes"),
    ("found unknown escape character '?(.+?)'?", r"`\{0}` is no escape in double quotes",
     r"use single quotes for text with `\`"),
    ("found undefined alias '(.*)'", "the alias `*{0}` has no anchor above it",
     "set it with `&{0}` before the value"),
    ("found duplicate anchor '(.*)'.*", "the anchor `&{0}` is set twice", None),
    ("expected alphabetic or numeric character.*", "a name must follow `&` or `*`",
     "put text that starts with `*` or `&` in quotes"),
    ("(?:did not find expected|expected the) node content.*", "a value is missing here", None),
    ("nested too deep", f"nested more than {MAX_DEPTH} levels deep", None),
)  # fmt: skip
"""PyYAML's problem -> message and hint; `{0}` is the pattern's group."""


def _syntax(text: str, problem: yaml.MarkedYAMLError, path: str) -> RecipeError:
    said = str(problem.problem or problem.context)
    mark = problem.problem_mark or problem.context_mark
    lines = lines_of(text)
    if "end of stream" in said or "document separator" in said:
        quote = problem.context_mark or mark
        return _fatal("this quote is never closed", _at(quote, path, lines))
    if said == "could not find expected ':'" and problem.context_mark is not None:
        mark = problem.context_mark
    place = _at(mark, path, lines)
    if said == "mapping values are not allowed here" and (too_deep := _too_deep(place, lines)):
        return too_deep
    for pattern, message, hint in _SYNTAX:
        if match := re.fullmatch(pattern, said, re.DOTALL):
            words = [*match.groups(), ""]
            opened = _opened(problem, path, lines, place) if "closed" in message or "anchor" in message else ()
            return _fatal(message.replace("{0}", words[0]), place, hint and hint.replace("{0}", words[0]), opened)
    return _fatal("this is not valid YAML", place)


def _too_deep(place: Place, lines: list[str]) -> RecipeError | None:
    """The first key of a line, indented so far that it continues the value above it."""
    before = lines[place.line - 1][: place.column - 1]
    above = [line for line in lines[: place.line - 1] if line.strip() and not line.lstrip().startswith("#")]
    if ": " in before or not above:
        return None
    key = before.strip().removeprefix("- ")
    column = len(before) - len(before.lstrip()) + 1
    wanted = len(above[-1]) - len(above[-1].lstrip()) + 1
    if wanted >= column:
        return None
    there = Place(place.path, place.line, column, max(1, len(before.strip())))
    return _fatal(f"`{key}` is indented below a value", there, f"start it in column {wanted}")


def _opened(problem: yaml.MarkedYAMLError, path: str, lines: list[str], place: Place) -> Related:
    if problem.context_mark is None:
        return ()
    there = _at(problem.context_mark, path, lines)
    return () if there == place else ((there, "opened here"),)


def _at(mark: Any, path: str, lines: list[str]) -> Place:
    """The mark, moved back to the last line that has something when it stands at the end of the file."""
    line, column = mark.line, mark.column
    if line >= len(lines) or (line == len(lines) - 1 and not lines[line].strip()):
        filled = [i for i, text in enumerate(lines) if text.strip()] or [0]
        line, column = filled[-1], len(lines[filled[-1]].rstrip())
    return Place(path, line + 1, column + 1)


# -- values


class _Builder:
    def __init__(self, path: str, lines: list[str]) -> None:
        self.path, self.lines = path, lines
        self.located = Located(path)
        self.found: list[Diagnostic] = []
        self.open: list[int] = []
        self.count = 0

    def build(self, node: yaml.Node, path: tuple[str, ...], key: Place | None = None) -> Any:
        """The plain value of a node; its place is noted under the dotted `path`."""
        self.count += 1
        place = self.place_of(node, key)
        if self.count > MAX_VALUES:
            raise _fatal(f"aliases make this recipe more than {MAX_VALUES} values large", place)
        scalar = isinstance(node, yaml.ScalarNode)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        self.located.spans[".".join(path)] = Span(place, key, node.value if scalar else None, plain)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path, place)
        if id(node.value) in self.open:
            raise _fatal("the alias stands inside its own anchor", place)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self.tag(node, path, place)
        self.open.append(id(node.value))
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.open.pop()
        return value

    def sequence(self, node: yaml.Node, path: tuple[str, ...]) -> list[Any]:
        return [self.build(child, (*path, str(i))) for i, child in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, Place] = {}
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged += self.merge(value_node)
                continue
            place = self.place_of(key_node)
            key = self.key(key_node, place, path)
            if key in first:
                related = ((first[key], "first given here"),)
                self.found.append(Diagnostic(f"`{key}` is given twice", place, "remove one of them", related))
                continue
            first[key] = place
            values[key] = self.build(value_node, (*path, key), place)
        for key_node, value_node in merged:
            place = self.place_of(key_node)
            key = self.key(key_node, place, path)
            if key not in values:
                values[key] = self.build(value_node, (*path, key), place)
        return values

    def merge(self, node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
        """Entries that `<<` brings in; where two bring the same key, the first wins."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        entries: list[tuple[yaml.Node, yaml.Node]] = []
        for child in nodes:
            if not isinstance(child, yaml.MappingNode):
                self.found.append(Diagnostic("`<<` takes a mapping or a list of mappings", self.place_of(child)))
                continue
            if id(child.value) in self.open:
                raise _fatal("the alias stands inside its own anchor", self.place_of(child))
            self.open.append(id(child.value))
            nested = [pair for k, v in child.value if k.tag == f"{_TAG}merge" for pair in self.merge(v)]
            self.open.pop()
            entries += [(k, v) for k, v in child.value if k.tag != f"{_TAG}merge"] + nested
        return entries

    def key(self, node: yaml.Node, place: Place, path: tuple[str, ...]) -> str:
        """The key as text. Whole numbers are allowed, for options that count layers."""
        if not isinstance(node, yaml.ScalarNode):
            name = f"<line {place.line}>"
            self.wrong((*path, name), place, "a key must be text")
            return name
        kind = node.tag.removeprefix(_TAG)
        if node.style is None and kind in _READ_AS:
            message = f"YAML reads the key `{node.value}` as {_READ_AS[kind]}"
            self.wrong((*path, node.value), place, message, f'write `"{node.value}":` for text')
        return str(node.value)

    def scalar(self, node: yaml.ScalarNode, path: tuple[str, ...], place: Place) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", "value", "merge"):
            return self.string(text, path, place)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        if kind in ("int", "float"):
            return self.number(text, kind == "int", path, place)
        if kind == "timestamp":
            self.wrong(path, place, f"YAML reads `{text}` as a date", f'write `"{text}"` for text')
            return text
        self.tag(node, path, place)
        return text

    def string(self, text: str, path: tuple[str, ...], place: Place) -> str:
        if any("\ud800" <= c <= "\udfff" for c in text):
            self.wrong(path, place, "half of a surrogate pair is not text", "write the character itself")
            return "?"
        return text

    def number(self, text: str, whole: bool, path: tuple[str, ...], place: Place) -> int | float | str:
        if ":" in text:
            self.wrong(path, place, f"YAML reads `{text}` as a number in base 60", f'write `"{text}"` for text')
            return text
        if "_" in text:
            hint = as_number(text, whole)
            self.wrong(
                path,
                place,
                f"`{text}` is a number for some YAML readers and text for others",
                hint and f"write `{hint}`",
            )
            return text
        if whole and re.fullmatch(r"[-+]?0[0-9]+", text):
            value = int(text, 8) if not re.search("[89]", text) else None
            octal = f" and means {value}" if value is not None else ""
            self.wrong(path, place, f"YAML reads `{text}` as octal{octal}", f"write `{int(text)}`")
            return text
        try:
            number = _whole(text) if whole else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            self.wrong(path, place, f"`{_short(text)}` is not a number that can be used")
            return 0
        if isinstance(number, float) and not math.isfinite(number):
            self.wrong(path, place, f"`{_short(text)}` is not a finite number")
            return 0.0
        return number

    def tag(self, node: yaml.Node, path: tuple[str, ...], place: Place) -> None:
        name = node.tag.replace(_TAG, "!!")
        self.wrong(path, place, f"the tag `{name}` has no meaning in a recipe", f"remove `{name}`")

    def wrong(self, path: tuple[str, ...], place: Place, message: str, hint: str | None = None) -> None:
        self.located.suspect.add(".".join(path))
        self.found.append(Diagnostic(message, place, hint))

    def place_of(self, node: yaml.Node, key: Place | None = None) -> Place:
        """The node's range on its first line; what is empty is shown at its key."""
        start, end = node.start_mark, node.end_mark
        line = self.lines[start.line] if start.line < len(self.lines) else ""
        stop = end.column if end.line == start.line else len(line.rstrip())
        if stop <= start.column and key is not None:
            return key
        return Place(self.path, start.line + 1, start.column + 1, max(1, stop - start.column))


def _whole(text: str) -> int:
    sign, digits = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    return sign * (int(digits, 0) if digits[:2].lower() in ("0x", "0b") else int(digits))


def _fraction(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def in_file_order(found: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """By line and column; what has no place comes last."""

    def order(diagnostic: Diagnostic) -> tuple[bool, bool, int, int]:
        place = diagnostic.place
        if place is None:
            return (True, False, 0, 0)
        return (False, place.path.startswith("--"), place.line, place.column)

    return tuple(sorted(found, key=order))
