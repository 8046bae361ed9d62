"""YAML to values and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moecli.core.errors import Diagnostic, Place, RecipeError, UsageError
from moecli.recipe.locate import Located, lines_of, parse, read

RECIPE = """\
recipe: 1
model: "tiny"
stages:
  - run: calibrate/statistics
    with: {samples: 4, texts: [a, 'b c']}
  - run: prune/reap
    with:
      keep: 8
"""


def at(line: int, column: int, width: int) -> Place:
    return Place("x.yaml", line, column, width)


def said(text: str) -> list[tuple[str, str | None]]:
    return [(d.message, d.hint) for d in problems(text)]


def problems(text: str) -> list[Diagnostic]:
    try:
        return parse(text, "x.yaml")[1]
    except RecipeError as error:
        return list(error.diagnostics)


def test_places_of_values_and_keys() -> None:
    located, found = parse(RECIPE, "x.yaml")
    assert found == []
    assert located.place("model") == at(2, 8, 6)
    assert located.place("model", key=True) == at(2, 1, 5)
    assert located.place("stages.0.with.texts.1") == at(5, 35, 5)
    assert located.place("stages.0.with") == at(5, 11, 31)
    assert located.place("stages.1.with.keep") == at(8, 13, 1)
    assert located.text("model") == "tiny"
    assert located.plain("stages.1.with.keep") and not located.plain("model")


def test_what_is_absent_is_shown_where_it_belongs() -> None:
    located, _ = parse(RECIPE, "x.yaml")
    assert located.place("stages.1.with.metric") == at(7, 5, 4), "the option's `with`"
    assert located.place("stages.1.use.stats") == at(6, 10, 10), "the stage's name"
    assert located.place("stages.1") == at(6, 10, 10)
    assert Located("").place("stages.0.with.keep") is None


def test_an_empty_value_is_shown_at_its_key() -> None:
    located, _ = parse("seed:\nmodel: x\n", "x.yaml")
    assert located.values == {"seed": None, "model": "x"}
    assert located.place("seed") == at(1, 1, 4)


def test_an_alias_is_shown_where_it_is_used() -> None:
    located, found = parse("a: &x {k: 1}\nb: *x\n", "x.yaml")
    assert (located.values, found) == ({"a": {"k": 1}, "b": {"k": 1}}, [])
    assert located.place("b") == at(2, 4, 2)
    assert located.place("b.k") == at(1, 11, 1)


def test_merge_keys_as_pyyaml_reads_them() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}\nd: {<<: *a, y: 9}\n"
    located, found = parse(text, "x.yaml")
    assert found == []
    assert located.values == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("+3", 3), ("0", 0), ("0x10", 16), ("0b11", 3), ("1.5", 1.5), ("1.0e-2", 0.01),
        (".5", 0.5), ("yes", True), ("Off", False), ("true", True), ("~", None), ("null", None), ("1e-2", "1e-2"),
        ("0128", "0128"), ("0o17", "0o17"), ('"128"', "128"), ("arc_easy", "arc_easy"), ("!!str 5", "5"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    located, found = parse(f"a: {text}\n", "x.yaml")
    assert found == []
    assert located.values["a"] == value and type(located.values["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("010", "YAML reads `010` as octal and means 8", "write `10`"),
        ("1_000", "`1_000` is a number for some YAML readers and text for others", "write `1000`"),
        ("1_0.5", "`1_0.5` is a number for some YAML readers and text for others", "write `10.5`"),
        ("1:30", "YAML reads `1:30` as a number in base 60", 'write `"1:30"` for text'),
        ("2025-11-22", "YAML reads `2025-11-22` as a date", 'write `"2025-11-22"` for text'),
        (".nan", "`.nan` is not a finite number", None),
        ("-.inf", "`-.inf` is not a finite number", None),
        ("1.0e+999", "`1.0e+999` is not a finite number", None),
        ("9" * 5000, f"`{'9' * 37}...` is not a number that can be used", None),
        ("!!binary aGk=", "the tag `!!binary` has no meaning in a recipe", "remove `!!binary`"),
        ("!secret x", "the tag `!secret` has no meaning in a recipe", "remove `!secret`"),
        ("!!int x", "`x` is not a number that can be used", None),
        ('"\\ud800"', "half of a surrogate pair is not text", "write the character itself"),
    ],
)
def test_traps(text: str, message: str, hint: str | None) -> None:
    assert said(f"a: {text}\n") == [(message, hint)]


def test_duplicate_keys_show_both() -> None:
    (found,) = problems("a: 1\nb: 2\na: 3\n")
    assert (found.message, found.place) == ("`a` is given twice", at(3, 1, 1))
    assert found.related == ((at(1, 1, 1), "first given here"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("a: 1\n---\nb: 2\n", "a recipe is one YAML document, a second one starts here"),
        ("a: &x [*x]\n", "the alias stands inside its own anchor"),
        ("a: &x\n  <<: *x\n", "the alias stands inside its own anchor"),
        ("a: " + "[" * 100 + "]" * 100, "nested more than 60 levels deep"),
        ("a: \x00\n", "the character U+0000 is not allowed in YAML"),
        ("? [a, b]\n: c\n", "a key must be text"),
        ("<<: 3\n", "`<<` takes a mapping or a list of mappings"),
        ("no: 1\n", "YAML reads the key `no` as true or false"),
    ],
)
def test_what_no_recipe_is(text: str, message: str) -> None:
    assert [m for m, _ in said(text)] == [message]


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="1 problem"):
        parse("\n".join(lines), "x.yaml")
    assert said("\n".join(lines))[0][0] == "aliases make this recipe more than 50000 values large"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text("a: 1\n")
    with pytest.raises(UsageError, match=r"no recipe at `.*hlaf\.yaml`") as missing:
        read(tmp_path / "hlaf.yaml")
    assert missing.value.hint == f"did you mean `{tmp_path / 'half.yaml'}`?"
    with pytest.raises(UsageError, match="is a folder, not a recipe") as folder:
        read(tmp_path)
    assert folder.value.hint == f"did you mean `{tmp_path / 'half.yaml'}`?"
    with pytest.raises(UsageError, match="no recipe at") as nowhere:
        read(tmp_path / "no" / "such.yaml")
    assert nowhere.value.hint == f"there is no folder `{tmp_path / 'no'}`"
    with pytest.raises(UsageError, match="File name too long"):
        read(tmp_path / ("x" * 300))
    with pytest.raises(UsageError, match="not a file name"):
        read(Path("a\0b"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"a: 1\n" * 300_000)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        read(big)
    big.write_bytes(b"a: 1\n\xff\xfe" * 10)
    with pytest.raises(RecipeError) as error:
        read(big)
    (found,) = error.value.diagnostics
    assert found.message == "the file is not UTF-8: byte 0xFF at offset 5"
    assert found.place == Place(str(big), 2, 1)


def test_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    located, _ = read(path)
    assert located.values == {"a": 1, "b": 2}
    assert located.place("b") == Place(str(path), 2, 4, 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0xFFFF)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcde", min_size=1), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from("abcdefgh"), JSON, min_size=1), st.sampled_from([True, False, None]))
def test_what_is_dumped_is_read_back(values: dict[str, Any], flow: bool | None) -> None:
    text = yaml.safe_dump(values, default_flow_style=flow, allow_unicode=True, sort_keys=False)
    located, found = parse(text, "x.yaml")
    assert found == []
    assert located.values == yaml.safe_load(text) == values


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.integers()), min_size=1))
def test_every_place_holds_its_value(values: dict[str, list[int]]) -> None:
    text = yaml.safe_dump(values, default_flow_style=None)
    located, _ = parse(text, "x.yaml")
    lines = lines_of(text)
    for key, numbers in values.items():
        for index, number in enumerate(numbers):
            place = located.place(f"{key}.{index}")
            assert place is not None
            start = place.column - 1
            assert lines[place.line - 1][start : start + place.width] == json.dumps(number)


@given(st.text(st.sampled_from("ab1:- \n\t[]{},&*!\"'#?<>|%@`~.x\r\u2028\ufeff\U0001f642"), max_size=60))
def test_no_text_ends_in_another_failure(text: str) -> None:
    for found in problems(text):
        assert found.place is not None and found.place.line >= 1 and found.place.column >= 1
        assert "\n" not in found.message
