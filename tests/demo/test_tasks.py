"""The demo's task files come from the generator, stay apart from calibration, and are right."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from scripts.demo.make_tasks import CALIBRATION_DOCUMENTS, QUOTAS, write_all
from scripts.demo.world import PLACES, PRICES, SEA_OF_RIVER

TASKS = Path(__file__).parents[2] / "moecli" / "demo" / "tasks"
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def rows(name: str) -> list[dict]:
    """The rows of one data file."""
    with (TASKS / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def answers(name: str) -> list[tuple[str, str, str]]:
    """Prompt, kind and labelled answer of every question."""
    return [(row["prompt"], row["kind"], row["choices"][row["label"]]) for row in rows(name)]


def test_regenerating_gives_the_same_bytes(tmp_path: Path) -> None:
    write_all(tmp_path)
    committed = {p.name: p.read_bytes() for p in TASKS.iterdir() if p.suffix in {".jsonl", ".yaml"}}
    assert committed == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize("name", sorted(QUOTAS))
def test_questions_meet_their_quotas_and_differ(name: str) -> None:
    questions = rows(name)
    assert Counter(row["kind"] for row in questions) == QUOTAS[name]
    assert len({row["prompt"] for row in questions}) == len(questions)
    assert all(len(set(row["choices"])) == 4 for row in questions)


def test_no_label_is_a_good_guess() -> None:
    labels = Counter(row["label"] for name in QUOTAS for row in rows(name))
    assert set(labels) == {0, 1, 2, 3}
    assert max(labels.values()) < 0.3 * labels.total()


def test_calibration_holds_no_task_text() -> None:
    calibration = rows("calibration")
    texts = {row["text"] for row in calibration}
    assert len(calibration) == len(texts) == CALIBRATION_DOCUMENTS
    assert set(Counter(row["domain"] for row in calibration)) == set(QUOTAS)
    assert texts.isdisjoint(row["text"] for row in rows("perplexity"))
    joined = "\n".join(sorted(texts))
    for name in QUOTAS:
        assert not [row["prompt"] for row in rows(name) if row["prompt"] in joined]


def test_sums_are_right() -> None:
    for prompt, _, answer in answers("arithmetic"):
        sum_text = prompt.splitlines()[-1].removesuffix(" =").replace("mod", "%")
        assert eval(sum_text) == int(answer), prompt


def test_programs_print_what_is_claimed() -> None:
    for prompt, _, answer in answers("programs"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(prompt, {})
        assert printed.getvalue().splitlines()[-1] == answer, prompt


def test_tables_say_so() -> None:
    for prompt, kind, answer in answers("tables"):
        *lines, ask = prompt.splitlines()
        table = {row: cells for row, *cells in map(table_row, lines)}
        assert answer_from(table, ask, kind) == answer, prompt


def table_row(line: str) -> list:
    """`| fig | stock 3 | ... |` as the item and its cells by name."""
    item, *cells = (cell.strip() for cell in line.strip("|").split("|"))
    return [item, dict(cell.split() for cell in cells)]


def answer_from(table: dict, ask: str, kind: str) -> str:
    """The answer, read off the table by its question's words."""
    words = ask.removesuffix(" :").split()[1:]
    cells = {row: found[0] for row, found in table.items()}
    column = {"most": 1, "least": 1, "ranked": 3, "row": 2, "over": 2}.get(kind, 0)
    numbers = {row: cells[row][words[column]] for row in cells}
    if kind in {"cell", "shelf"}:
        return numbers[words[2]]
    ranked = sorted(numbers, key=lambda row: -int(numbers[row]))
    return {
        "most": lambda: ranked[0],
        "least": lambda: ranked[-1],
        "ranked": lambda: ranked[int(words[1]) - 1],
        "row": lambda: next(row for row in cells if numbers[row] == words[3]),
        "over": lambda: str(sum(int(n) > int(words[4]) for n in numbers.values())),
        "plus": lambda: str(int(numbers[words[2]]) + int(numbers[words[4]])),
    }[kind]()


def test_the_almanac_knows_its_places() -> None:
    facts = {place.name: place.facts for place in PLACES}
    for prompt, _, answer in answers("almanac"):
        fact, name = re.fullmatch(r"<(\w+)> (\w+) =>", prompt.splitlines()[-1]).groups()
        known = facts[name]
        assert answer == (SEA_OF_RIVER[known["river"]] if fact == "sea" else known[fact])


def test_stories_end_as_told() -> None:
    for prompt, kind, answer in answers("stories"):
        story, ask = prompt.splitlines()
        thing = re.search(r"the (.+)\?", ask)
        if kind == "finder":
            assert re.search(rf"(\w+)(?: the [\w-]+)? found a {thing[1]} at", story)[1] == answer
        if kind == "holder":
            assert last_holder(story, thing[1]) == answer, prompt


def last_holder(story: str, thing: str) -> str:
    """Follow one thing through the sentences of a story."""
    holder = re.search(rf"(\w+)(?: the [\w-]+)? found a {thing} at", story)[1]
    for sentence in story.split("."):
        moves = (
            rf"gave the {thing} to (\w+)",
            rf"(\w+) took the {thing} from",
            rf"handed (\w+) the {thing}",
            rf"lent the {thing} to (\w+)",
            rf"swapped the {thing} for the .+ of (\w+)",
            rf"(\w+) swapped the .+ for the {thing} of",
        )
        taker = next((found[1] for move in moves if (found := re.search(move, sentence))), holder)
        holder = taker
    return holder


def test_dialogue_totals_and_days_add_up() -> None:
    numbers = dict(zip(["one", "two", "three", "four", "five", "six"], range(1, 7), strict=True))
    numbers |= {"seven": 7, "eight": 8, "nine": 9}
    for prompt, kind, answer in answers("dialogues"):
        if kind == "total":
            bought = re.findall(r"makes, of (\w+), (\w+)", prompt)
            assert sum(PRICES[good] * numbers[count] for good, count in bought) == int(answer)
        if kind == "day":
            assert last_day(prompt) == answer, prompt


def last_day(talk: str) -> str:
    """Follow the day through a talk: the last one named in a line, or one later."""
    day = ""
    for line in talk.splitlines():
        named = re.findall("|".join(DAYS), line)
        if named:
            day = named[-1]
        elif "one day later" in line:
            day = DAYS[(DAYS.index(day) + 1) % 7]
    return day
