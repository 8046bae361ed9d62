"""Many recipes from one: a base recipe, axes that vary it, and one store for what the points have in common.

    sweep: 1
    base: base.yaml                  # a recipe, relative to this file; or the recipe itself, written here
    matrix:
      method:                        # the id or name of a stage: named stages (or lists of them) in its place
        reap: {run: prune/reap, with: {keep: 16}}
        merged: [{run: cluster/hc-smoe, with: {keep: 16}}, {run: merge/weighted}]
      method.keep: [24, 16, 12]     # an option of a stage: a list of values, or named values
      seed: [0, 1]                   # or `model`, `revision`, `export`
    exclude: [{method: merged, method.keep: 12}]
    include: [{method: reap, method.keep: 8}]

Points are every combination, in the order written (the last axis turns fastest), less `exclude`, then `include`; there,
an axis that is not named keeps the base's value. The first stage in another's place takes over its id, unless it has
one of its own; an option of a stage that a variant does not have does not vary that variant, so `int4: {run:
quantize/rtn, id: int4}` is one point whatever `method.keep` is. A point is a recipe like any other: it is validated
whole, and its problems are shown where the value stands, in the sweep or in the base.

The folder of a sweep:

    sweep.json                       the points, in order
    stages/ parts/ locks/            the store of all points: what has the same key is made once
    points/<name>/                   a run folder like any other, with links to the store
    report/                          report.html, report.md, table.csv, table.tex of all points

Points that calibrate in the same way share one calibration: it collects what any of them needs, so its key is not that
of a single `moecli run` of one of them. An evaluation of the source is the same for all points of one seed and is made
once. Points may run at the same time, on one machine or several: whoever comes second to a stage waits for the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moecli.core.errors import Diagnostic, Place, RecipeError, UsageError
from moecli.recipe import locate
from moecli.recipe.locate import Located, Span
from moecli.recipe.near import did_you_mean, near
from moecli.recipe.schema import ID, Recipe, from_located
from moecli.recipe.words import Explainer
from moecli.runner import lookup

WHOLE = ("seed", "model", "revision", "export")
"""Keys of a recipe that an axis can vary; everything else is a stage."""
MOST_POINTS = 10_000
"""More than this is a mistake in the matrix."""


class SweepFile(BaseModel):
    """A sweep file, as written."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    sweep: Literal[1]
    """Version of the format: 1."""
    name: Annotated[str, Field(pattern=ID)] | None = None
    """What the sweep is called; its file's name by default."""
    base: str | dict[str, Any]
    """The recipe that is varied: a file, or the recipe itself."""
    matrix: dict[str, Any] = Field(default_factory=dict)
    """Axis -> its values."""
    exclude: list[dict[str, Any]] = Field(default_factory=list)
    """Combinations that are left out."""
    include: list[dict[str, Any]] = Field(default_factory=list)
    """Further points."""


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe of a sweep."""

    name: str
    """Name of its run folder."""
    labels: Mapping[str, str]
    """Axis -> what it stands at here."""
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points, validated against the stages' options, not yet against the model."""

    name: str
    path: str
    points: tuple[Point, ...]


# -- reading -------------------------------------------------------------------------------------------------------


def load(path: Path | str) -> Sweep:
    """Read a sweep and its base, and put every point's recipe together.

    Raises RecipeError with all problems of all points, UsageError when a file is missing.
    """
    located, found = _read(Path(path), "sweep")
    file, problems = _frame(located)
    found += problems
    if file is None:
        raise RecipeError(locate.in_file_order(dict.fromkeys(found)), located.path)
    base = _base(located, file, Path(path), found)
    axes = _axes(located, base, found) if not found else {}
    drafts = list(_drafts(located, file, axes, base, found)) if not found else []
    found += _equal_names(drafts) if not found else []
    points = list(_validated(drafts, found)) if not found else []
    if not found and not points:
        found.append(Diagnostic("the sweep has no points", located.place("sweep"), "add axes to `matrix`"))
    if found:
        raise RecipeError(locate.in_file_order(dict.fromkeys(found)), located.path)
    return Sweep(file.name or Path(path).stem, located.path, tuple(points))


def _read(path: Path, what: str) -> tuple[Located, list[Diagnostic]]:
    try:
        return locate.read(path)
    except UsageError as error:
        raise UsageError(error.message.replace("recipe", what), hint=error.hint) from None


def _frame(located: Located) -> tuple[SweepFile | None, list[Diagnostic]]:
    if not isinstance(located.values, dict):
        message = "a sweep is a mapping with `sweep`, `base` and `matrix`"
        return None, [Diagnostic(message, located.place(""))]
    if "stages" in located.values and "sweep" not in located.values:
        message = f"this is a recipe, `moecli run {located.path}` runs it"
        return None, [Diagnostic(message, located.place("stages", key=True), "a sweep has `sweep: 1` and `base`")]
    try:
        return SweepFile.model_validate_json(json.dumps(located.values)), []
    except ValidationError as problem:
        explainer = Explainer(located, "", SweepFile, lambda _: "a sweep", "key")
        return None, list(explainer.diagnostics(located.values, problem.errors(include_url=False)))


class Piece(NamedTuple):
    """A value cut out of a file, with the places of everything in it; paths are relative, "" is the value itself."""

    value: Any
    spans: Mapping[str, Span]

    @classmethod
    def cut(cls, located: Located, path: str) -> Piece:
        value = located.values
        for step in path.split("."):
            value = value[int(step) if isinstance(value, list) else step]
        return cls.at(located, path, value)

    @classmethod
    def at(cls, located: Located, path: str, value: Any) -> Piece:
        """As `cut`, where a key with a dot in it makes the path ambiguous."""
        under = {"" if p == path else p[len(path) + 1 :]: s for p, s in located.spans.items() if _below(p, path)}
        return cls(value, under)

    def unnamed(self) -> Piece:
        """Without the key it stood under: an entry of a list has none."""
        spans = dict(self.spans)
        if "" in spans:
            spans[""] = replace(spans[""], key=None)
        return Piece(self.value, spans)

    @property
    def place(self) -> Place | None:
        span = self.spans.get("")
        return span.value if span else None

    def put(self, path: str, piece: Piece) -> Piece:
        """With `piece` at the dotted `path` below this one."""
        value = json.loads(json.dumps(self.value))
        *parents, last = path.split(".")
        inner = value
        for step in parents:
            if isinstance(inner, dict) and not isinstance(inner.get(step), dict | list):
                inner[step] = {}
            inner = inner[int(step) if isinstance(inner, list) else step]
        inner[int(last) if isinstance(inner, list) else last] = piece.value
        spans = {p: s for p, s in self.spans.items() if not _below(p, path)}
        return Piece(value, spans | {f"{path}.{p}" if p else path: s for p, s in piece.spans.items()})


def _below(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}.")


@dataclass(frozen=True, slots=True)
class Base:
    """The base recipe in pieces."""

    rest: Mapping[str, Piece]
    """Every key but `stages`."""
    stages: tuple[Piece, ...]


def _base(located: Located, file: SweepFile, path: Path, found: list[Diagnostic]) -> Base:
    whole = Piece.cut(located, "base")
    source = Located(located.path, whole.value, dict(whole.spans))
    if isinstance(file.base, str):
        source, problems = _read(path.parent / file.base, "base recipe")
        found += problems
    values = source.values
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        found.append(Diagnostic("`base` must be a recipe with `stages`", located.place("base")))
        return Base({}, ())
    stages = [Piece.at(source, f"stages.{i}", stage) for i, stage in enumerate(values["stages"])]
    # What the base should reproduce says nothing about its variations.
    rest = {key: Piece.at(source, key, value) for key, value in values.items() if key not in ("stages", "expected")}
    return Base(rest, tuple(stages))


def _names(stage: Piece) -> tuple[str, ...]:
    """Everything an axis may call a stage: id, full name, kind, method."""
    if not isinstance(stage.value, dict):
        return ()
    run, identity = stage.value.get("run"), stage.value.get("id")
    kind, _, method = run.partition("/") if isinstance(run, str) else ("", "", "")
    return tuple(name for name in (identity, run, kind, method) if isinstance(name, str) and name)


# -- axes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of an axis."""

    label: str
    """What `exclude`, `include` and tables call it."""
    part: str
    """Its part of a point's name."""
    pieces: tuple[Piece, ...]
    """The value; for a stage axis, the stages."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What varies and how. `stage` is None for a key of the recipe itself; `option` is "" for a whole stage."""

    key: str
    stage: str | None
    option: str
    choices: tuple[Choice, ...]
    place: Place | None


def _axes(located: Located, base: Base, found: list[Diagnostic]) -> dict[str, Axis]:
    matrix = located.values.get("matrix", {})
    places = {name for stage in base.stages for name in _names(stage)}
    inside = {name for key in matrix if key in places for stage in _stages_in(matrix[key]) for name in _names(stage)}
    return {
        key: axis
        for key, value in matrix.items()
        if (axis := _axis(located, key, value, base, places, places | inside, found)) is not None
    }


def _stages_in(value: Any) -> Iterator[Piece]:
    for variant in value.values() if isinstance(value, dict) else ():
        for stage in variant if isinstance(variant, list) else [variant]:
            yield Piece(stage, {})


def _axis(
    located: Located, key: str, value: Any, base: Base, places: set[str], known: set[str], found: list[Diagnostic]
) -> Axis | None:
    path = f"matrix.{key}"
    place = located.place(path, key=True)
    target = _target(key, places, known)
    if target is None:
        found.append(_unknown_axis(key, place, places | known))
        return None
    stage, option = target
    if stage is not None and not option:
        if sum(key in _names(s) for s in base.stages) > 1:
            found.append(Diagnostic(f"`{key}` names several stages of the base", place, "give the stage an `id`"))
            return None
        if not isinstance(value, dict) or not value:
            found.append(Diagnostic(f"`{key}` is a whole stage: its values need names", place,
                                    "write `name: {run: ...}` below it, or `name: [{run: ...}, ...]`"))  # fmt: skip
            return None
        choices = [_variant(located, path, name, stages, key, found) for name, stages in value.items()]
    else:
        given = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if not given:
            found.append(Diagnostic(f"`{key}` must be a list of values, or named values", located.place(path)))
            return None
        named = isinstance(value, dict)
        choices = [
            _choice(Piece.at(located, f"{path}.{name}", v), key, str(name) if named else None, found)
            for name, v in given
        ]
    twice = [c for i, c in enumerate(choices) if c.label in {other.label for other in choices[:i]}]
    found += [Diagnostic(f"`{key}` has the value {c.label} twice", c.pieces[0].place) for c in twice]
    return Axis(key, stage, option, tuple(choices), place)


def _target(key: str, places: set[str], known: set[str]) -> tuple[str | None, str] | None:
    """(stage, option) of an axis; None when there is nothing of that name. Stage names may hold dots."""
    if key in WHOLE:
        return None, key
    if key in places:
        return key, ""
    cuts = [i for i, character in enumerate(key) if character == "."]
    return next(((key[:i], key[i + 1 :]) for i in reversed(cuts) if key[:i] in known and key[i + 1 :]), None)


def _unknown_axis(key: str, place: Place | None, known: Iterable[str]) -> Diagnostic:
    stage, dot, option = key.partition(".")
    names = sorted({*known, *WHOLE})
    meant = near(stage if dot else key, names)
    full = f"{meant}.{option}" if meant and dot else meant
    return Diagnostic(
        f"the axis `{key}` varies nothing: no stage of the base is called `{stage}`", place,
        did_you_mean(full, f"an axis is one of {', '.join(f'`{name}`' for name in names)}, or `STAGE.OPTION`"),
    )  # fmt: skip


def _variant(located: Located, path: str, name: str, stages: Any, key: str, found: list[Diagnostic]) -> Choice:
    """Stages under a name. Where none carries the id that the axis is called by, the first one gets it."""
    where = f"{path}.{name}"
    if not re.fullmatch(ID, name):
        message = f"`{name}` cannot be part of a file name"
        found.append(Diagnostic(message, located.place(where, key=True), "letters, digits, `-`, `_` and `.` can"))
    if isinstance(stages, list):
        pieces = [Piece.at(located, f"{where}.{i}", stage) for i, stage in enumerate(stages)]
    else:
        pieces = [Piece.at(located, where, stages).unnamed()]
    if wrong := [p for p in pieces if not isinstance(p.value, dict)]:
        found.append(Diagnostic(f"`{name}` must be a stage or a list of stages", wrong[0].place or located.place(where),
                                "start it with `run: ...`"))  # fmt: skip
    return Choice(name, name, tuple(pieces))


def _choice(piece: Piece, key: str, name: str | None, found: list[Diagnostic]) -> Choice:
    """A value of an option, with its name or one made of the option and the value: `keep16`."""
    value, option = piece.value, key.rpartition(".")[2]
    text = piece.spans[""].text if "" in piece.spans else None
    shown = text if text is not None else json.dumps(value)
    part = name or (shown if isinstance(value, str) else f"{option}{shown}")
    if isinstance(value, dict | list) and name is None:
        part = ""
    if not re.fullmatch(ID, part):
        hint = f"write `{key}: {{some-name: {shown if len(shown) < 30 else '...'}}}`"
        message = f"the value of `{key}` needs a name, it becomes part of a folder's" if not part else (
            f"`{part}` cannot be part of a file name")  # fmt: skip
        found.append(Diagnostic(message, piece.place, hint))
    return Choice(name or shown, part, (piece,))


# -- points --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """A point before its recipe is validated."""

    name: str
    labels: Mapping[str, str]
    located: Located
    place: Place | None
    """Where it comes from, for messages."""


def _drafts(
    located: Located, file: SweepFile, axes: Mapping[str, Axis], base: Base, found: list[Diagnostic]
) -> Iterator[Draft]:
    """Every point, in order. `found` gets what is wrong with axes, `exclude` and `include`."""
    excluded = [_picked(located, f"exclude.{i}", entry, axes, base, found) for i, entry in enumerate(file.exclude)]
    further = [_picked(located, f"include.{i}", entry, axes, base, found) for i, entry in enumerate(file.include)]
    count = 1
    for axis in axes.values():
        count *= len(axis.choices)
    if count > MOST_POINTS:
        message = f"the matrix has {count:,} points, at most {MOST_POINTS:,} are run"
        found.append(Diagnostic(message, located.place("matrix", key=True)))
    if found:
        return
    hits = [0] * len(excluded)
    used: set[str] = set()
    seen: set[tuple[tuple[str, str], ...]] = set()
    for picks in product(*(axis.choices for axis in axes.values())) if axes else ():
        chosen = dict(zip(axes, picks, strict=True))
        draft = _draft(located.path, chosen, axes, base, next(iter(axes.values())).place)
        matches = [i for i, out in enumerate(excluded) if out and all(
            draft.labels.get(key) == choice.label for key, (_, choice) in out.items())]  # fmt: skip
        for i in matches:
            hits[i] += 1
        used |= draft.labels.keys()
        identity = tuple(draft.labels.items())
        if not matches and identity not in seen:
            seen.add(identity)
            yield draft
    for i, picked in enumerate(further):
        own = {key: axis for key, (axis, _) in picked.items()}
        chosen = {key: choice for key, (_, choice) in picked.items()}
        draft = _draft(located.path, chosen, own, base, located.place(f"include.{i}"))
        for key in picked.keys() - draft.labels.keys():
            found.append(Diagnostic(f"`{key}` varies nothing in this point: it has no such stage",
                                    located.place(f"include.{i}.{key}", key=True)))  # fmt: skip
        yield draft
    for i, count in enumerate(hits):
        if not count:
            found.append(Diagnostic("this excludes nothing", located.place(f"exclude.{i}")))
    for key in axes.keys() - used:
        found.append(Diagnostic(f"the axis `{key}` varies nothing: no point has such a stage", axes[key].place))


def _picked(
    located: Located, path: str, entry: Mapping[str, Any], axes: Mapping[str, Axis], base: Base, found: list[Diagnostic]
) -> dict[str, tuple[Axis, Choice]]:
    """What one entry of `exclude` or `include` says, by axis."""
    picked: dict[str, tuple[Axis, Choice]] = {}
    names = {name for stage in base.stages for name in _names(stage)}
    known = names | {n for a in axes.values() for c in a.choices for p in c.pieces for n in _names(p)}
    for key, value in entry.items():
        place = located.place(f"{path}.{key}", key=True)
        axis = axes.get(key)
        choice = next((c for c in axis.choices if str(value) == c.label or [value] == [p.value for p in c.pieces]),
                      None) if axis else None  # fmt: skip
        if choice is None and (path.startswith("exclude") or (axis and axis.stage and not axis.option)):
            labels = [c.label for c in axis.choices] if axis else []
            hint = did_you_mean(near(str(value), labels) if axis else near(key, axes),
                                f"there are {', '.join(f'`{n}`' for n in labels or axes)}")  # fmt: skip
            message = f"`{key}` has no value `{value}`" if axis else f"the matrix has no axis `{key}`"
            found.append(Diagnostic(message, located.place(f"{path}.{key}", key=axis is None), hint))
            continue
        if axis is None:
            target = _target(key, set(), known)
            if target is None:
                found.append(_unknown_axis(key, place, {*axes, *known}))
                continue
            axis = Axis(key, *target, (), place)
        if choice is None:
            choice = _choice(Piece.at(located, f"{path}.{key}", value), key, None, found)
        picked[key] = (axis, choice)
    return picked


def _draft(path: str, chosen: Mapping[str, Choice], axes: Mapping[str, Axis], base: Base, place: Place | None) -> Draft:
    """The recipe with these choices: whole stages first, then options."""
    rest, stages = dict(base.rest), list(base.stages)
    labels: dict[str, str] = {}
    for key, axis in axes.items():
        if axis.stage is not None and not axis.option:
            at = next(i for i, stage in enumerate(stages) if key in _names(stage))
            stages[at : at + 1] = _in_place_of(stages[at], chosen[key].pieces)
            labels[key] = chosen[key].label
    for key, axis in axes.items():
        if axis.option and axis.stage is None:
            rest[axis.option] = chosen[key].pieces[0]
            labels[key] = chosen[key].label
        elif axis.option:
            for at in [i for i, stage in enumerate(stages) if axis.stage in _names(stage)]:
                stages[at] = stages[at].put(f"with.{axis.option}", chosen[key].pieces[0])
                labels[key] = chosen[key].label
    ordered = {key: labels[key] for key in axes if key in labels}
    name = "-".join(chosen[key].part for key in ordered) or "base"
    values = {key: piece.value for key, piece in rest.items()}
    values |= {"name": name, "stages": [stage.value for stage in stages]}
    spans: dict[str, Span] = {}
    for prefix, piece in [*rest.items(), *((f"stages.{i}", stage) for i, stage in enumerate(stages))]:
        spans |= {f"{prefix}.{p}" if p else prefix: span for p, span in piece.spans.items()}
    return Draft(name, ordered, Located(path, values, spans), place)


def _in_place_of(stage: Piece, pieces: Sequence[Piece]) -> list[Piece]:
    """A variant's stages; the first one takes over the id of the stage they replace, unless it has one."""
    identity = stage.value.get("id")
    if (
        identity is None
        or not pieces
        or any(p.value.get("id") == identity for p in pieces)
        or pieces[0].value.get("id")
    ):
        return list(pieces)
    first = Piece({**pieces[0].value, "id": identity}, pieces[0].spans)
    return [first, *pieces[1:]]


def _equal_names(drafts: Iterable[Draft]) -> Iterator[Diagnostic]:
    first: dict[str, Draft] = {}
    for draft in drafts:
        if (earlier := first.setdefault(draft.name, draft)) is not draft:
            related = ((earlier.place, "first one here"),) if earlier.place and earlier.place != draft.place else ()
            hint = "give one of its values another name" if earlier.labels != draft.labels else "remove one of them"
            yield Diagnostic(f"two points are called `{draft.name}`", draft.place, hint, related)


def _validated(drafts: Iterable[Draft], found: list[Diagnostic]) -> Iterator[Point]:
    for draft in drafts:
        try:
            recipe = from_located(draft.located, lambda name: lookup.find(name).options, lookup.names())
            yield Point(draft.name, draft.labels, recipe)
        except RecipeError as error:
            found += error.diagnostics
