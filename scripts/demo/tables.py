"""Small tables drawn with bars, and questions that need a row, a column or a comparison."""

from __future__ import annotations

from random import Random

from scripts.demo.scenes import Question, Scene, three_wrong
from scripts.demo.world import words

ROWS = words(
    """
    apple barley carrot dates endive fennel garlic hazel indigo kale lemon millet nutmeg olive
    parsley radish sage thyme walnut yam
    """
)
COLUMNS = ["stock", "price", "weight", "boxes", "sold", "crates"]
SHELVES = words("north south east west upper lower front back")


def scene(rng: Random, hard: bool = False) -> Scene:
    """A table of four or five rows (hard: six to eight), two number columns and a shelf."""
    rows, columns = (
        rng.sample(ROWS, rng.randint(6, 8) if hard else rng.randint(4, 5)),
        rng.sample(COLUMNS, 2),
    )
    cells = {c: dict(zip(rows, rng.sample(range(1, 60), len(rows)), strict=True)) for c in columns}
    shelf = {row: rng.choice(SHELVES) for row in rows}
    lines = []
    for row in rows:
        numbers = [f"{column} {values[row]}" for column, values in cells.items()]
        lines.append(f"| {row} | {numbers[0]} | {numbers[1]} | shelf {shelf[row]} |")
    asks = _look_ups(rng, rows, cells, shelf)
    for column, values in cells.items():
        asks += rng.sample(_column_questions(rng, column, values), 2)
    rng.shuffle(asks)
    return Scene("\n".join(lines) + "\n", tuple(asks))


def _look_ups(rng: Random, rows, cells, shelf) -> list[Question]:
    asks = [_shelf(rng, shelf, row) for row in rng.sample(rows, 2)]
    for column, values in cells.items():
        numbers = [str(value) for value in values.values()]
        for row in rng.sample(rows, 2):
            ask = f"?? {column} of {row} :"
            asks.append(_question(rng, ask, str(values[row]), "cell", numbers))
    return asks


def _column_questions(rng: Random, column: str, values: dict[str, int]) -> list[Question]:
    rows = sorted(values)
    row, first, second = rng.choice(rows), *rng.sample(rows, 2)
    total = values[first] + values[second]
    near = [str(total + step) for step in (-10, -1, 1, 10) if total + step > 0]
    bound = rng.choice(sorted(values.values()))
    above = sum(value > bound for value in values.values())
    return [
        _question(rng, f"?? item with {column} {values[row]} :", row, "row", rows),
        _question(rng, f"?? most {column} :", max(rows, key=values.__getitem__), "most", rows),
        _question(rng, f"?? least {column} :", min(rows, key=values.__getitem__), "least", rows),
        _question(rng, f"?? {column} of {first} plus {second} :", str(total), "plus", near),
        _question(rng, f"?? rows with {column} over {bound} :", str(above), "over", "012345"),
        _more(rng, column, values),
    ]


def _more(rng: Random, column: str, values: dict[str, int]) -> Question:
    ranked = sorted(values, key=values.__getitem__, reverse=True)
    place = rng.randrange(2, len(ranked) + 1)
    ask = f"?? number {place} by {column} :"
    return _question(rng, ask, ranked[place - 1], "ranked", ranked)


def _shelf(rng: Random, shelf: dict[str, str], row: str) -> Question:
    return _question(rng, f"?? shelf of {row} :", shelf[row], "shelf", shelf.values(), SHELVES)


def _question(rng: Random, ask: str, answer: str, kind: str, *pools) -> Question:
    return Question(ask, answer, three_wrong(rng, answer, *pools), kind)
