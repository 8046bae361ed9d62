"""A recipe as typed values: parsed once, every problem reported with its place, then trusted.

Values go through pydantic as JSON: lists fill tuples, while `"128"` stays text and `yes` stays a boolean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from moecli.core.errors import Diagnostic, Place, RecipeError
from moecli.core.stage import Options
from moecli.recipe.locate import Located, Span, in_file_order, parse, read
from moecli.recipe.near import did_you_mean, near, near_stage
from moecli.recipe.words import Explainer

SET = "--set"
"""Path of places on the command line; their line is the number of the `--set`, counted from 1."""

FRAME_KEYS = ("run", "with", "id", "use")
"""Keys of a stage itself."""
ID = "^[A-Za-z0-9][A-Za-z0-9_.-]*$"

Find = Callable[[str], type[Options]]
"""Stage name -> its options; only called with registered names."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class StageEntry(_Part):
    """One stage of a recipe."""

    run: str
    """The stage: `kind/method`."""
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Options of the stage."""
    id: Annotated[str, Field(pattern=ID)] | None = None
    """A name that `use` of later stages can refer to."""
    use: dict[str, str] = Field(default_factory=dict)
    """Input -> id of the stage to take it from; the newest earlier one of its type by default."""

    _options: Options = PrivateAttr(default_factory=Options)

    @property
    def options(self) -> Options:
        """`with`, validated by the stage's own class."""
        return self._options


class Expected(_Part):
    """A number that was measured elsewhere: `moecli table` shows it beside ours and checks it."""

    task: str
    """Task, as the report names it."""
    metric: str
    """Metric, as the report names it."""
    value: float
    """What was measured there."""
    tolerance: Annotated[float, Field(ge=0)]
    """Largest difference that counts as the same, in the metric's own unit."""
    source: Annotated[str, Field(min_length=1)]
    """Where the number is from: a paper and its table, or a run."""


class Recipe(_Part):
    """What to do with which model."""

    recipe: Literal[1]
    """Version of the recipe format: 1."""
    model: Annotated[str, Field(min_length=1)]
    """A folder, a hub id such as `Qwen/Qwen3-30B-A3B`, or `demo`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    name: str | None = None
    """What the report calls this run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides everything random."""
    stages: Annotated[list[StageEntry], Field(min_length=1)]
    """What is done, in this order."""
    export: Literal["auto", "stock", "compact", "expanded", "research", "gptq"] = "auto"
    """Form of the finished checkpoint; `auto` is `stock` wherever that is exact, else `compact`. `expanded` and
    `research` are dense; `research` keeps what was packed beside it. `gptq` is GPTQ's layout of packed integers, which
    vLLM loads and transformers does not."""
    expected: list[Expected] = Field(default_factory=list)
    """Numbers this run should reproduce, for `moecli table`; they change nothing in the run."""

    _located: Located = PrivateAttr(default_factory=lambda: Located(""))

    @property
    def path(self) -> str:
        """The file as the user named it, "" for a recipe made in memory."""
        return self._located.path

    @property
    def located(self) -> Located:
        """Where each value stands: `recipe.located.place("stages.1.with.keep")`."""
        return self._located

    def place(self, path: str, *, key: bool = False) -> Place | None:
        """See `Located.place`."""
        return self._located.place(path, key=key)


def load(path: Path | str, find: Find, names: Sequence[str], sets: Sequence[str] = ()) -> Recipe:
    """A recipe file with `--set` applied.

    Raises RecipeError with every problem there is, in file order; UsageError when there is no such file.
    """
    located, found = read(Path(path))
    return _validated(located, found, find, names, sets)


def loads(text: str, find: Find, names: Sequence[str], sets: Sequence[str] = (), path: str = "recipe") -> Recipe:
    """Like `load`, for text; `path` is only shown."""
    located, found = parse(text, path)
    return _validated(located, found, find, names, sets)


def from_values(values: Mapping[str, Any], find: Find, names: Sequence[str]) -> Recipe:
    """A recipe made in memory, by a command that needs a stage or two. Its problems have no places."""
    return _validated(Located("", dict(values)), [], find, names, ())


def from_located(located: Located, find: Find, names: Sequence[str]) -> Recipe:
    """A recipe put together from parts of files, such as a point of a sweep. Raises RecipeError like `load`."""
    return _validated(located, [], find, names, ())


def _validated(
    located: Located, found: list[Diagnostic], find: Find, names: Sequence[str], sets: Sequence[str]
) -> Recipe:
    for number, text in enumerate(sets, 1):
        found += _override(located, number, text)
    if not isinstance(located.values, dict):
        message = "a recipe is a mapping with `recipe`, `model` and `stages`"
        found.append(Diagnostic(message, located.place(""), "`moecli init` prints a commented one"))
        raise RecipeError(in_file_order(found), located.path)
    recipe, problems = _outer(located, names, find)
    found += problems
    options = dict(_options(located, find, names, found))
    found += _equal_ids(located)
    if found or recipe is None:
        raise RecipeError(in_file_order(dict.fromkeys(found)), located.path)
    recipe._located = located
    for index, entry in enumerate(recipe.stages):
        entry._options = options[index]
    return recipe


# -- the frame: everything but options


def _outer(located: Located, names: Sequence[str], find: Find) -> tuple[Recipe | None, list[Diagnostic]]:
    values = located.values
    try:
        return Recipe.model_validate_json(json.dumps(values)), []
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
    explainer = Explainer(located, "", Recipe, _frame_owner, "key")
    special = [error for error in errors if _misplaced(located, error["loc"], names)]
    ignored = {error["loc"][:-1] for error in special}
    rest = [e for e in errors if e not in special and not (e["type"] == "missing" and e["loc"][:-1] in ignored)]
    found = [_refine(d, located) for d in explainer.diagnostics(values, rest)]
    return None, found + [_misplaced_at(located, error["loc"], find) for error in special]


def _frame_owner(parent: str) -> str:
    if parent.startswith("expected."):
        return "an expected value"
    return "a stage" if parent.startswith("stages.") else "a recipe"


def _misplaced(located: Located, loc: tuple[int | str, ...], names: Sequence[str]) -> bool:
    """Stages written as `- prune/reap`, `- prune/reap: {keep: 4}`."""
    stages = located.values.get("stages")
    if loc[:1] != ("stages",) or not isinstance(stages, list) or len(loc) < 2 or not isinstance(loc[1], int):
        return False
    entry = stages[loc[1]]
    if len(loc) == 2:
        return isinstance(entry, str) and entry in names
    return len(loc) == 3 and isinstance(entry, dict) and loc[2] in names and loc[2] in entry


def _misplaced_at(located: Located, loc: tuple[int | str, ...], find: Find) -> Diagnostic:
    path = ".".join(map(str, loc))
    name = located.values["stages"][loc[1]] if len(loc) == 2 else loc[2]
    return Diagnostic(f"the stage `{name}` needs `run:`", located.place(path, key=True), f"write `- run: {name}`")


def _refine(diagnostic: Diagnostic, located: Located) -> Diagnostic:
    """Better hints where the frame itself is known."""
    message, place, hint = diagnostic.message, diagnostic.place, diagnostic.hint
    if message.startswith("a recipe needs `recipe`"):
        hint = "add `recipe: 1` as the first line"
    elif message.startswith("`recipe` must be"):
        hint = "write `recipe: 1`, the only format there is"
    elif message.startswith("a stage needs `run`"):
        hint = "`moecli methods` lists what can run"
    elif message.startswith("`stages` must be a list of"):
        message, hint = "`stages` has no entries", "add `- run: ...` below it"
    elif message.startswith("`stages` must be a list, got a mapping"):
        hint = "start each stage with `- run: ...`"
    elif message.startswith("`stages` must be a list, got nothing"):
        hint = "add `- run: ...` below it"
    elif message.startswith("`stages.") and " must be a mapping" in message:
        hint = "start it with `- run: ...`"
    elif message.startswith("`id` must be text of the form"):
        message = "`id` must be letters, digits, `-`, `_` and `.`, " + message[message.rindex("got ") :]
    elif message.startswith("`with` must be a mapping, got nothing"):
        hint = "write options below it, or remove `with:`"
    elif message.startswith("`model` must be text of"):
        message = "`model` is empty"
    if place is None:
        place = _first_key(located)
    return Diagnostic(message, place, hint, diagnostic.related)


def _first_key(located: Located) -> Place | None:
    """Where to show that the whole recipe lacks something."""
    keys = [span.key for path, span in located.spans.items() if "." not in path and span.key]
    return min(keys, key=lambda place: (place.line, place.column), default=located.place(""))


def _equal_ids(located: Located) -> Iterator[Diagnostic]:
    first: dict[str, int] = {}
    for index, entry in _entries(located):
        identity = entry.get("id")
        if not isinstance(identity, str):
            continue
        place = located.place(f"stages.{index}.id")
        if identity in first:
            earlier = located.place(f"stages.{first[identity]}.id")
            related = ((earlier, "first given here"),) if earlier else ()
            yield Diagnostic(f"the id `{identity}` is given to two stages", place, "rename one of them", related)
        first.setdefault(identity, index)


# -- options


def _entries(located: Located) -> Iterator[tuple[int, dict[str, Any]]]:
    stages = located.values.get("stages")
    for index, entry in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(entry, dict):
            yield index, entry


def _options(
    located: Located, find: Find, names: Sequence[str], found: list[Diagnostic]
) -> Iterator[tuple[int, Options]]:
    """Options of every stage that has a known name; problems are added to `found`."""
    for index, entry in _entries(located):
        name, given = entry.get("run"), entry.get("with", {})
        if not isinstance(name, str):
            continue
        if name not in names:
            found.append(_unknown_stage(located, index, name, names))
            continue
        if f"stages.{index}.run" in located.suspect or not isinstance(given, dict):
            continue
        if "with" not in entry and any(near(key, FRAME_KEYS) == "with" for key in entry):
            continue  # a misspelt `with`: told already, and what it holds is not known
        model = find(name)
        found += _beside_with(located, index, entry, model, found)
        try:
            yield index, model.model_validate_json(json.dumps(given))
        except ValidationError as problem:
            explainer = Explainer(located, f"stages.{index}.with", model, _owner(name), "option")
            errors = problem.errors(include_url=False)
            found += explainer.diagnostics(given, [e for e in errors if not _is_beside(e, entry)])


def _owner(name: str) -> Callable[[str], str]:
    return lambda _: f"`{name}`"


def _is_beside(error: ErrorDetails, entry: Mapping[str, Any]) -> bool:
    """Missing below `with`, but written beside `run`."""
    return error["type"] == "missing" and len(error["loc"]) == 1 and error["loc"][0] in entry


def _beside_with(
    located: Located, index: int, entry: Mapping[str, Any], model: type[Options], found: list[Diagnostic]
) -> Iterator[Diagnostic]:
    """Options written beside `run` instead of below `with`: one better message replaces "unknown key"."""
    options = {field.alias or name for name, field in model.model_fields.items()}
    for key in sorted(options & entry.keys() - set(FRAME_KEYS)):
        place = located.place(f"stages.{index}.{key}", key=True)
        found[:] = [d for d in found if not (d.place == place and d.message.startswith("unknown key"))]
        value = located.text(f"stages.{index}.{key}") or "..."
        yield Diagnostic(f"the option `{key}` stands outside `with`", place, f"write `with: {{{key}: {value}}}`")


def _unknown_stage(located: Located, index: int, name: str, names: Sequence[str]) -> Diagnostic:
    hint = did_you_mean(near_stage(name, names), "`moecli methods` lists them")
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    return Diagnostic(f"unknown stage `{shown}`", located.place(f"stages.{index}.run"), hint)


# -- --set


def _override(located: Located, number: int, text: str) -> list[Diagnostic]:
    """Apply one `--set path=value`; its problems point at the command line."""
    path, equals, value_text = text.partition("=")
    path = path.strip()
    whole = Place(SET, number, 1, max(1, len(text)))
    steps = path.split(".")
    if not equals or not all(steps):
        return [Diagnostic("`--set` takes `path=value`", whole, "such as `--set stages.0.with.samples=16`")]
    shift = len(text) - len(value_text)
    value_place = Place(SET, number, shift + 1, max(1, len(value_text)))
    if not value_text.strip():
        return [Diagnostic(f"`{path}` has no value after `=`", whole, f"`--set {path}=null` for nothing")]
    try:
        given, found = parse(value_text, SET)
    except RecipeError as problem:
        return [_moved(d, number, shift, value_place) for d in problem.diagnostics]
    holder = _holder(located, steps, number, whole)
    if isinstance(holder, Diagnostic):
        return [holder]
    _forget(located, path)
    last = steps[-1]
    if isinstance(holder, list):
        holder[int(last)] = given.values
    else:
        holder[last] = given.values
    key = Place(SET, number, len(path) - len(last) + 1, len(last))
    for below, span in given.spans.items():
        full = f"{path}.{below}" if below else path
        at = _shifted(span.value, number, shift, value_place)
        located.spans[full] = Span(at, key if not below else span.key and at, span.text, span.plain)
    located.suspect |= {f"{path}.{below}" if below else path for below in given.suspect}
    return [_moved(d, number, shift, value_place) for d in found]


def _holder(located: Located, steps: list[str], number: int, whole: Place) -> dict[str, Any] | list[Any] | Diagnostic:
    """The mapping or list that holds the last step; mappings on the way are made."""
    if not isinstance(located.values, dict):
        return Diagnostic("`--set` needs a recipe that is a mapping", whole)
    current: Any = located.values
    for depth, step in enumerate(steps):
        sofar = ".".join(steps[:depth])
        place = Place(SET, number, len(sofar) + 1 + bool(sofar), len(step))
        if isinstance(current, list):
            if not re.fullmatch("[0-9]{1,6}", step) or int(step) >= len(current):
                many = f"its entries are 0 to {len(current) - 1}" if current else "it is empty"
                return Diagnostic(f"`{sofar}` has no entry `{step}`", place, many)
        elif not isinstance(current, dict):
            return Diagnostic(f"`{sofar}` holds a single value, `{step}` cannot be set in it", place)
        if depth == len(steps) - 1:
            break
        if isinstance(current, dict) and current.get(step) is None:
            current[step] = {}
            located.spans[".".join(steps[: depth + 1])] = Span(place, place)
        current = current[int(step) if isinstance(current, list) else step]
    return current  # type: ignore[no-any-return]


def _forget(located: Located, path: str) -> None:
    for gone in [p for p in located.spans if p == path or p.startswith(f"{path}.")]:
        del located.spans[gone]
        located.suspect.discard(gone)


def _shifted(place: Place, number: int, shift: int, whole: Place) -> Place:
    return Place(SET, number, place.column + shift, place.width) if place.line == 1 else whole


def _moved(diagnostic: Diagnostic, number: int, shift: int, whole: Place) -> Diagnostic:
    place = diagnostic.place and _shifted(diagnostic.place, number, shift, whole)
    related = tuple((_shifted(p, number, shift, whole), label) for p, label in diagnostic.related)
    return Diagnostic(diagnostic.message, place, diagnostic.hint, related)


# -- writing


def resolved_values(recipe: Recipe, options: Sequence[Options] | None = None) -> dict[str, Any]:
    """The recipe with every default written out; `options`, one per stage, replace the recipe's own."""
    without = {"stages"} if recipe.expected else {"stages", "expected"}
    values = recipe.model_dump(mode="json", by_alias=True, exclude=without)
    chosen = options or [entry.options for entry in recipe.stages]
    stages = []
    for entry, opt in zip(recipe.stages, chosen, strict=True):
        stage: dict[str, Any] = {"run": entry.run}
        stage |= {"id": entry.id} if entry.id else {}
        stage |= {"use": dict(entry.use)} if entry.use else {}
        stages.append(stage | {"with": opt.model_dump(mode="json", by_alias=True)})
    return values | {"stages": stages}


def resolved_yaml(recipe: Recipe, options: Sequence[Options] | None = None) -> str:
    """`resolved_values` as YAML that loads to the same recipe."""
    values = resolved_values(recipe, options)
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))


def json_schema(stages: Mapping[str, type[Options]]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of recipes, for editors: a stage's name brings the options of its class."""
    frame = Recipe.model_json_schema(by_alias=True)
    defs: dict[str, Any] = frame.pop("$defs")
    entry = defs.pop("StageEntry")
    rules = []
    for name, model in stages.items():
        reference, needed = _options_schema(name, model, defs)
        then: dict[str, Any] = {"properties": {"with": reference}} | ({"required": ["with"]} if needed else {})
        rules.append({"if": {"properties": {"run": {"const": name}}, "required": ["run"]}, "then": then})
    entry["properties"]["run"] |= {"enum": list(stages)}
    entry["properties"]["with"] = {
        "type": "object",
        "description": entry["properties"]["with"]["description"],
    }
    defs["StageEntry"] = entry | {"allOf": rules}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **frame,
        "title": "moecli recipe",
        "$defs": defs,
    }


def _options_schema(name: str, model: type[Options], defs: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """Adds the options of one stage to `defs`; nested definitions are prefixed so that none collide."""
    prefix = name.replace("/", ".")
    schema = model.model_json_schema(by_alias=True, ref_template=f"#/$defs/{prefix}.{{model}}")
    for nested, definition in schema.pop("$defs", {}).items():
        defs[f"{prefix}.{nested}"] = definition
    defs[prefix] = schema
    return {"$ref": f"#/$defs/{prefix}"}, bool(schema.get("required"))
