"""Tiny Python programs and what they print, written as a comment after each `print`."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from scripts.demo.scenes import Question, Scene, three_wrong
from scripts.demo.world import words

NAMES = words("a b c d n m k total step size")
LISTS = ["xs", "ys", "items", "row"]
WORDS = words("ant bee cow dog elk fox hen owl pig rat")


def scene(rng: Random, hard: bool = False) -> Scene:
    """One program: a few statements (hard: more names, longer lists), then its prints."""
    make = rng.choice((_assignments, _branch, _loop, _numbers, _numbers, _words))
    return make(rng, hard)


def _assignments(rng: Random, hard: bool) -> Scene:
    names = rng.sample(NAMES, 5 if hard else 4)
    values = {names[0]: rng.randint(1, 20), names[1]: rng.randint(1, 20)}
    lines = [f"{name} = {value}" for name, value in values.items()]
    for name in names[2:]:
        left, right = rng.sample(sorted(values), 2)
        sign = rng.choice("+-")
        lines.append(f"{name} = {left} {sign} {right}")
        values[name] = values[left] + (values[right] if sign == "+" else -values[right])
    if rng.random() < 0.5:
        changed, step = rng.choice(names), rng.randint(1, 9)
        lines.append(f"{changed} += {step}")
        values[changed] += step
    asks = [_integer(rng, f"print({n})", values[n], "assign", values.values()) for n in names]
    rng.shuffle(asks)
    return _program(lines, asks)


def _branch(rng: Random, hard: bool) -> Scene:
    a, b, c = rng.sample(NAMES, 3)
    x, y = rng.sample(range(1, 40), 2)
    sign = rng.choice("<>")
    yes, no = rng.sample(range(1, 10), 2)
    taken = x < y if sign == "<" else x > y
    lines = [
        f"{a} = {x}",
        f"{b} = {y}",
        f"if {a} {sign} {b}:",
        f"    {c} = {a} + {yes}",
        "else:",
        f"    {c} = {b} - {no}",
    ]
    result = x + yes if taken else y - no
    other = y - no if taken else x + yes
    asks = [
        _integer(rng, f"print({c})", result, "branch", [other, x - no, y + yes]),
        _integer(rng, f"print(max({a}, {b}))", max(x, y), "max2", [min(x, y), x + 1, y + 1]),
    ]
    return _program(lines, asks, ordered=True)


def _loop(rng: Random, hard: bool) -> Scene:
    a, b = rng.sample(NAMES, 2)
    start, step, turns = rng.randint(0, 20), rng.randint(2, 9), rng.randint(2, 7 if hard else 6)
    lines = [
        f"{a} = {start}",
        f"{b} = {step}",
        f"for i in range({turns}):",
        f"    {a} += {b}",
    ]
    end = start + step * turns
    near = [end - step, end + step, end - start]
    asks = [
        _integer(rng, f"print({a})", end, "loop", near),
        _integer(rng, f"print({a} - {b})", end - step, "loop-minus", [end, end - 2 * step]),
    ]
    return _program(lines, asks, ordered=True)


def _numbers(rng: Random, hard: bool) -> Scene:
    name = rng.choice(LISTS)
    xs = rng.sample(range(1, 50), rng.randint(6, 8) if hard else rng.randint(4, 6))
    index, bound = rng.randrange(len(xs)), rng.choice(sorted(xs))
    small = [x for x in xs if x < bound]
    asks = [
        _integer(rng, f"print({name}[{index}])", xs[index], "index", xs),
        _integer(rng, f"print({name}[-2])", xs[-2], "index", xs),
        _integer(rng, f"print(max({name}))", max(xs), "max", xs),
        _integer(rng, f"print(min({name}))", min(xs), "min", xs),
        _integer(rng, f"print(len({name}))", len(xs), "len", range(3, 9)),
        _integer(rng, f"print(sorted({name})[1])", sorted(xs)[1], "second", xs),
        _integer(rng, f"print({name}[0] + {name}[-1])", xs[0] + xs[-1], "ends", xs),
        _list(rng, f"print(sorted({name}))", sorted(xs), "sorted"),
        _list(rng, f"print({name}[::-1])", xs[::-1], "reversed"),
    ]
    if 1 <= len(small) < len(xs):
        ask = f"print(len([x for x in {name} if x < {bound}]))"
        asks.append(_integer(rng, ask, len(small), "count", range(6)))
    return _program([f"{name} = {xs}"], rng.sample(asks, 6))


def _words(rng: Random, hard: bool) -> Scene:
    name = rng.choice(LISTS)
    words = rng.sample(WORDS, 7 if hard else 5)
    lines = [f"{name} = {_quoted(words)}"]
    gone = rng.randrange(len(words))
    if rng.random() < 0.5:
        lines.append(f"{name}.pop({gone})")
        words.pop(gone)
    else:
        extra = rng.choice([word for word in WORDS if word not in words])
        lines.append(f"{name}.append('{extra}')")
        words.append(extra)
    index = rng.randrange(len(words) - 1) if hard else rng.randrange(4)
    asks = [
        _word(rng, f"print({name}[{index}])", words[index], "word", words),
        _word(rng, f"print({name}[-1])", words[-1], "word", words),
        _word(rng, f"print(sorted({name})[0])", min(words), "first-word", words),
        _integer(rng, f"print({name}.index('{words[index]}'))", index, "find", range(6)),
        _integer(rng, f"print(len({name}))", len(words), "len", range(3, 8)),
    ]
    return _program(lines, asks, ordered=True)


def _quoted(words: Sequence[str]) -> str:
    return "[" + ", ".join(f"'{word}'" for word in words) + "]"


def _program(lines: Sequence[str], asks: Sequence[Question], ordered: bool = False) -> Scene:
    return Scene("\n".join(lines) + "\n", tuple(asks), ordered)


def _integer(rng: Random, call: str, answer: int, kind: str, near) -> Question:
    around = [answer + step for step in (-10, -2, -1, 1, 2, 10)]
    pools = ([str(n) for n in near], [str(n) for n in around])
    return Question(f"{call}  # ->", str(answer), three_wrong(rng, str(answer), *pools), kind)


def _word(rng: Random, call: str, answer: str, kind: str, near: Sequence[str]) -> Question:
    return Question(f"{call}  # ->", answer, three_wrong(rng, answer, near), kind)


def _list(rng: Random, call: str, answer: list[int], kind: str) -> Question:
    wrong: set[str] = set()
    while len(wrong) < 3:
        i, j = rng.sample(range(len(answer)), 2)
        mixed = list(answer)
        mixed[i], mixed[j] = mixed[j], mixed[i]
        wrong.add(str(mixed))
    a, b, c = sorted(wrong)
    return Question(f"{call}  # ->", str(answer), (a, b, c), kind)
