"""The shape every domain shares: a passage, then questions whose answers follow from it.

A document (for training and calibration) shows a passage with all its answers. An exercise (for the
tasks) stops before one answer and offers it beside three wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Question:
    """One line that ends just before its answer, the answer, and three tempting mistakes."""

    ask: str
    answer: str
    wrong: tuple[str, str, str]
    kind: str

    def __post_init__(self) -> None:
        """Refuse a question whose four choices are not four different texts."""
        if len({self.answer, *self.wrong}) != 4:
            raise ValueError(f"choices repeat in {self!r}")


@dataclass(frozen=True, slots=True)
class Scene:
    """A passage that ends in a newline, and the questions that belong to it.

    In an `ordered` scene a question is only ever met after the ones before it.
    """

    passage: str
    questions: tuple[Question, ...]
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Exercise:
    """A prompt with four choices, one of them right."""

    prompt: str
    choices: tuple[str, ...]
    label: int
    kind: str


def document(scene: Scene) -> str:
    """The scene with every question answered."""
    return scene.passage + "".join(f"{q.ask} {q.answer}\n" for q in scene.questions)


def segments(scene: Scene) -> list[tuple[str, bool]]:
    """The document in pieces, each marked whether it is an answer."""
    pieces = [(scene.passage, False)]
    for q in scene.questions:
        pieces += [(q.ask, False), (f" {q.answer}", True), ("\n", False)]
    return pieces


def exercise(scene: Scene, index: int, rng: Random) -> Exercise:
    """The passage and one of its questions, the choices shuffled.

    Where the order is fixed the earlier questions stand before it, answered.
    """
    asked = scene.questions[index]
    choices = [asked.answer, *asked.wrong]
    rng.shuffle(choices)
    label = choices.index(asked.answer)
    earlier = scene.questions[:index] if scene.ordered else ()
    before = document(Scene(scene.passage, earlier))
    return Exercise(before + asked.ask, tuple(choices), label, asked.kind)


def three_wrong(rng: Random, answer: str, *pools: Iterable[str]) -> tuple[str, str, str]:
    """Three different wrong answers, from the first pool as far as it reaches, then the next."""
    wrong: list[str] = []
    for pool in pools:
        left = sorted(set(pool) - {answer, *wrong})
        wrong += rng.sample(left, min(3 - len(wrong), len(left)))
    return wrong[0], wrong[1], wrong[2]
