"""What pydantic found, in our words: one sentence with the value that was given, and something to type."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from moecli.core.errors import Diagnostic
from moecli.recipe.locate import Located
from moecli.recipe.near import as_number, did_you_mean, near

MISSING = object()

_WHOLE = ("int_type", "int_from_float", "int_parsing", "int_parsing_size")
_NUMBER = ("float_type", "float_parsing", "decimal_type", "decimal_parsing")
_LIST = ("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type")
_MAPPING = ("dict_type", "model_type", "model_attributes_type", "mapping_type", "dataclass_type")
_TEXT = ("string_type", "path_type", "string_sub_type")

_EXPECTED: dict[str, str] = {
    **dict.fromkeys(_WHOLE, "a whole number"),
    **dict.fromkeys(_NUMBER, "a number"),
    **dict.fromkeys(_LIST, "a list"),
    **dict.fromkeys(_MAPPING, "a mapping"),
    **dict.fromkeys(_TEXT, "text"),
    "bool_type": "`true` or `false`",
    "bool_parsing": "`true` or `false`",
    "none_required": "left empty",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "string_pattern_mismatch": "text of the form `{pattern}`",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of {max_length} or fewer characters",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
}
"""pydantic's error type -> what goes after "must be"."""


class Explainer(NamedTuple):
    """Turns the errors of one model class into diagnostics."""

    located: Located
    base: str
    """Dotted path of the value that was validated, "" for the whole recipe."""
    model: type[BaseModel]
    owner: Callable[[str], str]
    """Dotted path -> what has the keys there: "`prune/reap`", "a stage"."""
    noun: str
    """What a key is called: "key" or "option"."""

    def diagnostics(self, values: Any, errors: Sequence[ErrorDetails]) -> Iterator[Diagnostic]:
        """One diagnostic per place; members of a union that all failed are joined by "or"."""
        groups: dict[tuple[tuple[int | str, ...], str], list[ErrorDetails]] = {}
        typos = set(self.typos(errors))
        for error in errors:
            if error["type"] == "missing" and error["loc"] in typos:
                continue
            where = _existing(values, error["loc"])
            kind = error["type"] if error["type"] in ("missing", "extra_forbidden") else "value"
            last = str(error["loc"][-1]) if kind == "missing" else ""
            groups.setdefault((where, kind + last), []).append(error)
        for (where, kind), members in groups.items():
            path = self.path(where)
            if kind == "value" and _told_deeper(where, members, groups):
                continue
            if not any(_below(path, suspect) for suspect in self.located.suspect):
                yield self.diagnostic(values, where, members)

    def typos(self, errors: Sequence[ErrorDetails]) -> Iterator[tuple[int | str, ...]]:
        """Where a missing key is there after all, under a name that is nearly its own."""
        for error in errors:
            if error["type"] == "extra_forbidden":
                *parent, name = error["loc"]
                if meant := near(str(name), _keys(_model_at(self.model, parent))):
                    yield (*parent, meant)

    def path(self, loc: Sequence[int | str]) -> str:
        return ".".join([*([self.base] if self.base else []), *map(str, loc)])

    def diagnostic(self, values: Any, where: tuple[int | str, ...], errors: list[ErrorDetails]) -> Diagnostic:
        kind = errors[0]["type"]
        if kind == "missing":
            return self.missing(where, str(errors[0]["loc"][-1]))
        if kind == "extra_forbidden":
            return self.unknown(where)
        path = self.path(where)
        if (said := _said(errors)) is not None:
            return Diagnostic(said, self.located.place(path))
        if all(error["loc"][-1:] == ("[key]",) for error in errors):
            return Diagnostic(f"the key `{where[-1]}` must be {expected(errors)}", self.located.place(path, key=True))
        value = _value_at(values, where)
        name = _name(where) or _name((self.base,))
        message = f"`{name}` must be {expected(errors)}, got {got(value, self.located, path)}"
        hint = _hint(errors, value, str(where[-1]) if where else "", self.located, path)
        return Diagnostic(message, self.located.place(path), hint)

    def missing(self, where: tuple[int | str, ...], name: str) -> Diagnostic:
        path, parent = self.path((*where, name)), self.path(where)
        doc = _doc(_model_at(self.model, where), name)
        hint = f"add `{name}: ...`" + (f", {doc}" if doc else "")
        return Diagnostic(f"{self.owner(parent)} needs `{name}`", self.located.place(path), hint)

    def unknown(self, where: tuple[int | str, ...]) -> Diagnostic:
        name, parent = str(where[-1]), self.path(where[:-1])
        known = _keys(_model_at(self.model, where[:-1]))
        others = f"{self.noun}s are {_listed([f'`{k}`' for k in known])}" if known else "there are none; remove it"
        place = self.located.place(self.path(where), key=True)
        hint = did_you_mean(near(name, known), others)
        return Diagnostic(f"unknown {self.noun} `{name}` of {self.owner(parent)}", place, hint)


def expected(errors: Sequence[ErrorDetails]) -> str:
    """What would have been right: "a whole number or a list"."""
    phrases = []
    for error in errors:
        context = {key: _plain(value) for key, value in (error.get("ctx") or {}).items()}
        if error["type"] in ("literal_error", "enum"):
            context["expected"] = _choices(context.get("expected", ""))
        phrase = _EXPECTED.get(error["type"])
        phrases.append((phrase or "").format_map(context) or "another kind of value")
    return " or ".join(dict.fromkeys(phrases))


def got(value: Any, located: Located, path: str) -> str:
    """The value as it was given, short enough for one line."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = located.text(path)
    if isinstance(value, str):
        text = value if text is None else text
        text = text if len(text) <= 60 else f"{text[:57]}..."
        shown = text.replace("\n", "\\n").replace("`", "'")
        return f"the text `{shown}`" if located.plain(path) and shown else f'the text `"{shown}"`'
    if isinstance(value, bool) and text is not None and text.lower() not in ("true", "false"):
        return f"`{text}`, which YAML reads as {str(value).lower()}"
    shown = text if text is not None else str(value).lower()
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _hint(errors: Sequence[ErrorDetails], value: Any, name: str, located: Located, path: str) -> str | None:
    kinds = {error["type"] for error in errors}
    key = f"{name}: " if name and not name.isdigit() else ""
    if isinstance(value, str) and kinds & {*_WHOLE, *_NUMBER}:
        return _number_hint(value, not kinds & set(_NUMBER), key, located.plain(path))
    if isinstance(value, float) and kinds & set(_WHOLE) and value.is_integer():
        return f"write `{key}{int(value)}`"
    if isinstance(value, str) and kinds & {"bool_type", "bool_parsing"} and value.lower() in _BOOLS:
        return f"write `{key}{_BOOLS[value.lower()]}` without quotes"
    if isinstance(value, bool | int | float) and kinds & set(_TEXT):
        return f'write `{key}"{located.text(path) or value}"` for text'
    if isinstance(value, str | int | float) and kinds & set(_LIST) and not isinstance(value, bool):
        return f"write `{key}[{value}]`" if len(str(value)) < 40 else None
    if kinds & {"literal_error", "enum"} and not isinstance(value, dict | list):
        return _literal_hint(errors, value, key)
    return None


_BOOLS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def _number_hint(text: str, whole: bool, key: str, plain: bool) -> str | None:
    number = as_number(text, whole)
    if number is None:
        return None
    if not plain:
        return f"write `{key}{number}` without quotes"
    return f"YAML reads `{text}` as text; write `{key}{number}`"


def _literal_hint(errors: Sequence[ErrorDetails], value: Any, key: str) -> str | None:
    said = " ".join(str((error.get("ctx") or {}).get("expected", "")) for error in errors)
    quoted = re.findall(r"'([^']*)'", said)
    numbers = re.findall(r"-?\d+", re.sub(r"'[^']*'", "", said))
    if isinstance(value, str) and value in numbers:
        return f"write `{key}{value}` without quotes"
    word = near(str(value), [*quoted, *numbers]) if isinstance(value, str) else None
    return f"did you mean `{key}{word}`?" if word else None


def _said(errors: Sequence[ErrorDetails]) -> str | None:
    """The sentence of a validator of ours; None when pydantic's own check failed."""
    for error in errors:
        if error["type"] in ("value_error", "assertion_error"):
            return str((error.get("ctx") or {}).get("error", "")).rstrip(".") or "this value cannot be used"
    return None


def _choices(said: str) -> str:
    """pydantic's `'a', 'b' or 'c'` with our backticks."""
    parts = re.findall(r"'[^']*'|[^\s,']+", said)
    return _listed([f"`{part.strip(chr(39))}`" for part in parts if part != "or"], "or")


def _listed(words: Sequence[str], last: str = "and") -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(where: Sequence[int | str]) -> str:
    """The option as a person would call it: `keep`, or `tasks.0` for an entry of a list."""
    words = [str(part) for part in where]
    tail = [words.pop()] if words else []
    while words and tail[0].isdigit():
        tail.insert(0, words.pop())
    return ".".join(tail)


def _told_deeper(
    where: tuple[int | str, ...],
    errors: Sequence[ErrorDetails],
    groups: Mapping[tuple[tuple[int | str, ...], str], Sequence[ErrorDetails]],
) -> bool:
    """True for "must be a number, got a list" where the list was right but for one of its entries."""
    of_union = all(len(error["loc"]) > len(where) for error in errors)
    return of_union and any(len(other) > len(where) and other[: len(where)] == where for other, _ in groups)


def _below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _existing(values: Any, loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The part of an error's path that is in the data; pydantic adds the names of union members to it."""
    found: list[int | str] = []
    for step in loc:
        inside = (isinstance(values, dict) and step in values) or (
            isinstance(values, list) and isinstance(step, int) and step < len(values)
        )
        if inside:
            values = values[step]
            found.append(step)
    return tuple(found)


def _value_at(values: Any, where: Sequence[int | str]) -> Any:
    for step in where:
        values = values[step]
    return values


def _model_at(model: type[BaseModel], where: Sequence[int | str]) -> type[BaseModel] | None:
    """The class that holds the keys at `where`; None inside plain mappings."""
    current: type[BaseModel] | None = model
    for step in where:
        if isinstance(step, int) or current is None:
            continue
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        current = _model_in(fields[step].annotation) if step in fields else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((m for arg in typing.get_args(annotation) if (m := _model_in(arg)) is not None), None)


def _keys(model: type[BaseModel] | None) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _doc(model: type[BaseModel] | None, name: str) -> str:
    fields: Mapping[str, Any] = {f.alias or n: f for n, f in model.model_fields.items()} if model else {}
    text = (fields[name].description or "") if name in fields else ""
    sentence = re.split(r"(?<=[.;:])\s", " ".join(text.split()))[0].rstrip(".;:")
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence
