"""All domains together, and the seeds that keep training, calibration and tasks apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from scripts.demo import almanac, arithmetic, dialogues, programs, stories, tables
from scripts.demo.scenes import Exercise, Scene, document, exercise

DOMAINS: dict[str, Callable[..., Scene]] = {
    "almanac": almanac.scene,
    "arithmetic": arithmetic.scene,
    "dialogues": dialogues.scene,
    "programs": programs.scene,
    "stories": stories.scene,
    "tables": tables.scene,
}
SHARES = {
    "almanac": 2,
    "arithmetic": 2,
    "dialogues": 3,
    "programs": 2,
    "stories": 4,
    "tables": 5,
}
"""How often each domain is trained on: looking things up in the text is learned last."""
END = "<|endoftext|>"


def stream(purpose: str, name: str) -> Random:
    """A seeded source; streams of different purposes never meet."""
    return Random(f"{purpose}/{name}")


def documents(rng: Random, domain: str) -> Iterator[str]:
    """Documents of one domain, without end."""
    while True:
        yield document(DOMAINS[domain](rng))


def mixed_scenes(rng: Random) -> Iterator[Scene]:
    """Scenes of all domains by their shares, without end."""
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        yield DOMAINS[rng.choices(names, shares)[0]](rng)


def exercises(rng: Random, domain: str, hard: bool = False) -> Iterator[Exercise]:
    """One exercise from each scene of a domain, without end."""
    while True:
        scene = DOMAINS[domain](rng, hard)
        yield exercise(scene, rng.randrange(len(scene.questions)), rng)
