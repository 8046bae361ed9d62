"""Recipes as typed values, and every problem in our own words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from pydantic_core._pydantic_core import list_all_errors

from moecli.core.errors import Diagnostic, RecipeError
from moecli.core.stage import Options
from moecli.recipe import words
from moecli.recipe.near import as_number, near, near_stage
from moecli.recipe.schema import Recipe, from_values, json_schema, load, loads, resolved_values, resolved_yaml
from moecli.runner import lookup


class Band(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    low: float
    """Lower end."""
    high: float = 1.0


class Everything(Options):
    """One option of each kind."""

    keep: PositiveInt
    """Experts left per layer."""
    linkage: Literal["average", "single"] = "average"
    bits: Literal[4, 8] = 4
    damp: Annotated[float, Field(ge=0, le=1)] = 0.01
    fast: bool = False
    name: str | None = None
    tasks: tuple[str, ...] = ("arc_easy",)
    per_layer: dict[int, int] = Field(default_factory=dict)
    width: int | list[int] = 3
    band: Band = Band(low=0.0)
    step: Annotated[int, Field(multiple_of=8, lt=100)] = 8

    @field_validator("name")
    @classmethod
    def no_spaces(cls, name: str | None) -> str | None:
        if name and " " in name:
            raise ValueError(f"`name` has a space in it: `{name}`.")
        return name


class Nothing(Options):
    """No options."""


KNOWN = {"prune/everything": Everything, "merge/nothing": Nothing}
NAMES = tuple(KNOWN)


def recipe(options: str, more: str = "", sets: Sequence[str] = ()) -> Recipe:
    text = f"recipe: 1\nmodel: tiny\n{more}stages:\n  - run: prune/everything\n    with: {options}\n"
    return loads(text, KNOWN.__getitem__, NAMES, sets, "x.yaml")


def problems(options: str, more: str = "", sets: Sequence[str] = ()) -> list[Diagnostic]:
    with pytest.raises(RecipeError, match="nothing was run") as error:
        recipe(options, more, sets)
    return list(error.value.diagnostics)


def test_a_recipe_is_typed() -> None:
    found = recipe("{keep: 8, tasks: [a, b], damp: 1, per_layer: {3: 4}, band: {low: 0.5}}", "seed: 7\n")
    assert (found.recipe, found.model, found.seed, found.export, found.revision) == (
        1,
        "tiny",
        7,
        "auto",
        None,
    )
    options = found.stages[0].options
    assert isinstance(options, Everything)
    assert (options.keep, options.tasks, options.damp, options.per_layer) == (8, ("a", "b"), 1.0, {3: 4})
    assert found.place("stages.0.with.keep") is not None


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("{}", "`prune/everything` needs `keep`", "add `keep: ...`, experts left per layer"),
        ("{keep: x}", "`keep` must be a whole number, got the text `x`", None),
        ('{keep: "x`y"}', "`keep` must be a whole number, got the text `\"x'y\"`", None),
        ("{keep: 8.0}", "`keep` must be a whole number, got 8.0", "write `keep: 8`"),
        ("{keep: -1}", "`keep` must be above 0, got -1", None),
        ("{keep: true}", "`keep` must be a whole number, got true", None),
        ("{keep: 1 000}", "`keep` must be a whole number, got the text `1 000`",
         "YAML reads `1 000` as text; write `keep: 1000`"),
        ("{keep: 8, damp: 1e-2}", "`damp` must be a number, got the text `1e-2`",
         "YAML reads `1e-2` as text; write `damp: 1.0e-2`"),
        ("{keep: 8, damp: '0.1'}", '`damp` must be a number, got the text `"0.1"`',
         "write `damp: 0.1` without quotes"),
        ("{keep: 8, damp: 2}", "`damp` must be 1 or less, got 2", None),
        ("{keep: 8, damp: -0.5}", "`damp` must be 0 or more, got -0.5", None),
        ("{keep: 8, step: 12}", "`step` must be a multiple of 8, got 12", None),
        ("{keep: 8, step: 104}", "`step` must be below 100, got 104", None),
        ("{keep: 8, linkage: averag}", "`linkage` must be `average` or `single`, got the text `averag`",
         "did you mean `linkage: average`?"),
        ("{keep: 8, bits: '8'}", '`bits` must be `4` or `8`, got the text `"8"`', "write `bits: 8` without quotes"),
        ("{keep: 8, bits: true}", "`bits` must be `4` or `8`, got true", None),
        ("{keep: 8, fast: 'yes'}", '`fast` must be `true` or `false`, got the text `"yes"`',
         "write `fast: true` without quotes"),
        ("{keep: 8, fast: 1}", "`fast` must be `true` or `false`, got 1", None),
        ("{keep: 8, name: 12}", "`name` must be text, got 12", 'write `name: "12"` for text'),
        ("{keep: 8, name: off}", "`name` must be text, got `off`, which YAML reads as false",
         'write `name: "off"` for text'),
        ("{keep: 8, name: a b}", "`name` has a space in it: `a b`", None),
        ("{keep: 8, tasks: a}", "`tasks` must be a list, got the text `a`", "write `tasks: [a]`"),
        ("{keep: 8, tasks: {a: 1}}", "`tasks` must be a list, got a mapping", None),
        ("{keep: 8, tasks: [a, ~]}", "`tasks.1` must be text, got nothing", None),
        ("{keep: 8, per_layer: [4]}", "`per_layer` must be a mapping, got a list", None),
        ("{keep: 8, per_layer: {first: 4}}", "the key `first` must be a whole number", None),
        ("{keep: 8, width: x}", "`width` must be a whole number or a list, got the text `x`", None),
        ("{keep: 8, width: [1, x]}", "`width.1` must be a whole number, got the text `x`", None),
        ("{keep: 8, band: 3}", "`band` must be a mapping, got 3", None),
        ("{keep: 8, band: {lwo: 0.1}}", "unknown option `lwo` of `prune/everything`", "did you mean `low`?"),
        ("{keep: 8, band: {}}", "`prune/everything` needs `low`", "add `low: ...`, lower end"),
        ("{keep: 8, kep: 9}", "unknown option `kep` of `prune/everything`", "did you mean `keep`?"),
    ],
)  # fmt: skip
def test_options_in_our_words(options: str, message: str, hint: str | None) -> None:
    first = problems(options)[0]
    assert (first.message, first.hint) == (message, hint)
    assert first.place is not None and first.place.line in (5, 6)


@pytest.mark.parametrize("kind", list_all_errors(), ids=lambda kind: kind["type"])
def test_no_error_of_pydantic_breaks_the_words(kind: dict[str, Any]) -> None:
    context = kind["example_context"] or {}
    phrase = words.expected([{"type": kind["type"], "loc": (), "msg": "", "input": 1, "ctx": context}])
    assert phrase and "{" not in phrase and "Input" not in phrase


def test_all_problems_at_once_in_file_order() -> None:
    found = problems("{keep: '8', linkege: x, bits: 3}", "sed: 1\n", ["stages.0.with.damp=9", "seed=x"])
    assert [(d.place and (d.place.path, d.place.line), d.message) for d in found] == [
        (("x.yaml", 3), "unknown key `sed` of a recipe"),
        (("x.yaml", 6), '`keep` must be a whole number, got the text `"8"`'),
        (("x.yaml", 6), "unknown option `linkege` of `prune/everything`"),
        (("x.yaml", 6), "`bits` must be `4` or `8`, got 3"),
        (("--set", 1), "`damp` must be 1 or less, got 9"),
        (("--set", 2), "`seed` must be a whole number, got the text `x`"),
    ]


def test_a_trap_is_told_once() -> None:
    assert [d.message for d in problems("{keep: 010}")] == ["YAML reads `010` as octal and means 8"]


def test_set_replaces_adds_and_parses() -> None:
    found = recipe("{keep: 8}", sets=["stages.0.with.keep=4", "stages.0.with.tasks=[x, y]", "model=a/b", "seed=3"])
    options = found.stages[0].options
    assert isinstance(options, Everything)
    assert (options.keep, options.tasks, found.model, found.seed) == (4, ("x", "y"), "a/b", 3)


def test_set_makes_what_is_not_there() -> None:
    text = "recipe: 1\nmodel: tiny\nstages:\n  - run: prune/everything\n"
    found = loads(text, KNOWN.__getitem__, NAMES, ["stages.0.with.keep=4"])
    assert found.stages[0].with_ == {"keep": 4}


def test_set_heals_what_the_file_has_wrong() -> None:
    assert recipe('{keep: "8"}', sets=["stages.0.with.keep=8"]).stages[0].with_ == {"keep": 8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seed", "`--set` takes `path=value`"),
        ("=3", "`--set` takes `path=value`"),
        ("stages..keep=3", "`--set` takes `path=value`"),
        ("seed=", "`seed` has no value after `=`"),
        ("stages.1.run=x", "`stages` has no entry `1`"),
        ("stages.first.run=x", "`stages` has no entry `first`"),
        ("model.name=x", "`model` holds a single value, `name` cannot be set in it"),
        ("seed=[1", "the list is not closed: expected `,` or `]`"),
        ("seed=010", "YAML reads `010` as octal and means 8"),
    ],
)
def test_set_that_cannot_be(given: str, message: str) -> None:
    (found,) = problems("{keep: 8}", sets=[given])
    assert found.message == message
    assert found.place is not None and found.place.path == "--set"
    assert 1 <= found.place.column <= len(given) + 1


def test_from_values_has_no_places() -> None:
    values = {"recipe": 1, "model": "tiny", "stages": [{"run": "prune/everything", "with": {"keep": 0}}]}
    with pytest.raises(RecipeError, match="1 problem") as error:
        from_values(values, KNOWN.__getitem__, NAMES)
    assert [(d.message, d.place) for d in error.value.diagnostics] == [("`keep` must be above 0, got 0", None)]


def test_what_is_written_out_loads_to_the_same() -> None:
    before = recipe("{keep: 8, damp: 1.0e-5, name: 'no', tasks: ['1e3'], per_layer: {0: 2}}", "name: '2025-01-01'\n")
    again = loads(resolved_yaml(before), KNOWN.__getitem__, NAMES)
    assert again.stages[0].options == before.stages[0].options
    assert resolved_values(again) == resolved_values(before)
    assert resolved_values(again)["stages"][0]["with"]["linkage"] == "average"


def test_written_out_options_may_be_replaced() -> None:
    found = recipe("{keep: 8}")
    text = resolved_yaml(found, [Everything(keep=3)])
    assert yaml.safe_load(text)["stages"][0]["with"]["keep"] == 3


def check_schema() -> jsonschema.Draft202012Validator:
    schema = json_schema({name: lookup.find(name).options for name in lookup.names()})
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


ROOT = Path(__file__).parents[2]


def test_the_schema_accepts_every_recipe_of_ours() -> None:
    validator = check_schema()
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert files
    for path in files:
        validator.validate(yaml.safe_load(path.read_text()))
        load(path, lambda name: lookup.find(name).options, lookup.names())


@pytest.mark.parametrize(
    "name",
    ["key-typo", "model-missing", "stage-typo", "option-typo", "option-missing", "option-unknown", "number-quoted",
     "choice-typo", "choice-number", "list-is-text", "with-list", "stages-mapping", "format-2", "number-zero"],
)  # fmt: skip
def test_the_schema_refuses_what_check_refuses(name: str) -> None:
    values = yaml.safe_load((ROOT / "tests" / "golden" / f"{name}.yaml").read_text())
    with pytest.raises(jsonschema.ValidationError, match=r"is not|was expected|unexpected|required|less than"):
        check_schema().validate(values)


def test_the_schema_tells_an_editor_what_options_mean() -> None:
    schema = json_schema(KNOWN)
    options = schema["$defs"]["prune.everything"]
    assert options["properties"]["keep"]["description"] == "Experts left per layer."
    assert schema["$defs"]["StageEntry"]["properties"]["run"]["enum"] == list(NAMES)
    assert schema["$defs"]["prune.everything.Band"]["properties"]["low"]["description"] == "Lower end."


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [("linkege", ["metric", "linkage"], "linkage"), ("batchsize", ["batch_size"], "batch_size"),
     ("Keep", ["keep"], "keep"), ("zzz", ["keep"], None), ("k", ["keep", "kind"], None)],
)  # fmt: skip
def test_near(word: str, known: list[str], meant: str | None) -> None:
    assert near(word, known) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [("cluster/hcsmoe", "cluster/hc-smoe"), ("prune/hc-smoe", "cluster/hc-smoe"), ("reap", "prune/reap"),
     ("prune/reep", "prune/reap"), ("distil/all", None)],
)  # fmt: skip
def test_near_stage(name: str, meant: str | None) -> None:
    assert near_stage(name, ["calibrate/statistics", "cluster/hc-smoe", "prune/reap", "prune/frequency"]) == meant


@pytest.mark.parametrize(
    ("text", "whole", "number"),
    [("1e-2", False, "1.0e-2"), ("1.5e3", False, "1.5e+3"), ("1e3", True, "1000"), ("1e-3", True, None),
     ("0128", True, "128"), ("1,024", True, "1024"), ("0x10", True, "16"), ("0o17", True, "15"), ("x", True, None),
     ("nan", False, None), ("3", False, "3"), ("2E5", False, "2.0e+5")],
)  # fmt: skip
def test_as_number(text: str, whole: bool, number: str | None) -> None:
    assert as_number(text, whole) == number
    if number is not None:
        assert isinstance(yaml.safe_load(number), int if whole else int | float)


EXPECTED = "expected:\n  - {task: arc, metric: acc, value: 0.5, tolerance: 0.01, source: Table 2}\n"


def test_expected_numbers_survive_resolving() -> None:
    from moecli.recipe.schema import resolved_yaml
    from moecli.runner import lookup

    text = "recipe: 1\nmodel: demo\nstages:\n  - run: quantize/rtn\n"
    without = loads(text, lambda name: lookup.find(name).options, lookup.names())
    assert "expected" not in resolved_yaml(without)
    recipe = loads(text + EXPECTED, lambda name: lookup.find(name).options, lookup.names())
    again = loads(resolved_yaml(recipe), lambda name: lookup.find(name).options, lookup.names())
    assert again.expected == recipe.expected
    assert recipe.expected[0].tolerance == 0.01


def test_an_expected_number_needs_its_source() -> None:
    from moecli.runner import lookup

    text = "recipe: 1\nmodel: demo\nstages:\n  - run: quantize/rtn\n" + EXPECTED.replace(", source: Table 2", "")
    with pytest.raises(RecipeError) as caught:
        loads(text, lambda name: lookup.find(name).options, lookup.names())
    assert caught.value.diagnostics[0].message == "an expected value needs `source`"
