"""Sheets of sums: some worked digit by digit with the carries, some answered at once."""

from __future__ import annotations

from random import Random

from scripts.demo.scenes import Question, Scene


def scene(rng: Random, hard: bool = False) -> Scene:
    """A sheet of six to nine sums (hard: ten), now and then worked in steps first."""
    makers = rng.choices(MAKERS, weights=WEIGHTS, k=10 if hard else rng.randint(6, 9))
    return Scene(f"sheet {rng.randint(1, 99)}\n", tuple(make(rng) for make in makers))


def worked_addition(a: int, b: int) -> str:
    """The steps of a column addition, lowest digit first, without the total."""
    steps, carry, low_a, low_b = [], 0, a, b
    while low_a or low_b or carry:
        digit_a, digit_b = low_a % 10, low_b % 10
        column = digit_a + digit_b + carry
        steps.append(f"{digit_a} + {digit_b} + {carry} = {column}")
        carry, low_a, low_b = column // 10, low_a // 10, low_b // 10
    return " , ".join(steps)


def _worked(rng: Random) -> Question:
    a, b = rng.randint(100, 9999), rng.randint(100, 9999)
    ask = f"work {a} + {b} : {worked_addition(a, b)} ; total"
    return _question(rng, ask, a + b, "worked")


def _add2(rng: Random) -> Question:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return _question(rng, f"{a} + {b} =", a + b, "add2")


def _add3(rng: Random) -> Question:
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return _question(rng, f"{a} + {b} =", a + b, "add3")


def _sub3(rng: Random) -> Question:
    a, b = sorted((rng.randint(100, 999), rng.randint(20, 999)), reverse=True)
    return _question(rng, f"{a} - {b} =", a - b, "sub3")


def _times(rng: Random) -> Question:
    a, b = rng.randint(11, 99), rng.randint(2, 9)
    return _question(rng, f"{a} * {b} =", a * b, "times")


def _chain(rng: Random) -> Question:
    a, b, c = rng.randint(2, 40), rng.randint(2, 9), rng.randint(2, 9)
    return _question(rng, f"{a} + {b} * {c} =", a + b * c, "chain")


def _missing(rng: Random) -> Question:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return _question(rng, f"{a} + ? = {a + b} ; ? =", b, "missing")


def _add4(rng: Random) -> Question:
    a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
    return _question(rng, f"{a} + {b} =", a + b, "add4")


def _three(rng: Random) -> Question:
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    return _question(rng, f"{a} + {b} + {c} =", a + b + c, "three")


def _square(rng: Random) -> Question:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    return _question(rng, f"{a} * {b} =", a * b, "times2")


def _left(rng: Random) -> Question:
    a, b = rng.randint(100, 999), rng.randint(11, 49)
    return _question(rng, f"{a} mod {b} =", a % b, "mod")


def _products(rng: Random) -> Question:
    a, b, c, d = rng.randint(11, 49), rng.randint(2, 9), rng.randint(11, 49), rng.randint(2, 9)
    return _question(rng, f"{a} * {b} + {c} * {d} =", a * b + c * d, "products")


MAKERS = (
    _worked,
    _add2,
    _add3,
    _sub3,
    _times,
    _chain,
    _missing,
    _add4,
    _three,
    _square,
    _left,
    _products,
)
WEIGHTS = (1, 1, 1, 2, 1, 1, 1, 2, 2, 2, 2, 2)


def _question(rng: Random, ask: str, answer: int, kind: str) -> Question:
    near = [answer + step for step in (-10, 10, -1, 1, -2, 2, -20, 20, -11, 11, -9, 9)]
    near += [answer + step for step in (-100, 100) if answer > 200]
    near += [answer + step for step in range(3, 9)]
    same_length = [n for n in near if n >= 0 and len(str(n)) == len(str(answer))]
    wrong = rng.sample(sorted(same_length), 3)
    return Question(ask, str(answer), (str(wrong[0]), str(wrong[1]), str(wrong[2])), kind)
