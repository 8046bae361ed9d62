"""Small stories: people find things, hand them on and walk about; then who has what, and where.

"went home" names no village: the reader has to know where that person lives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from scripts.demo.scenes import Question, Scene, three_wrong
from scripts.demo.world import PEOPLE, VILLAGES, Person, words

SPOTS = words(
    """
    mill ferry orchard chapel market well quarry bridge tower bakery stable harbour meadow
    smithy garden school
    """
)
LOOKS = words("brass blue silver wooden old painted tiny broken")
NOUNS = words("lantern key drum map ring book bell box cup flute coin rope")
OPENINGS = (
    "It was a cold morning.",
    "The rain had stopped at last.",
    "It was the day of the fair.",
    "Nobody was in a hurry.",
    "The wind came from the north.",
    "Snow lay on the roofs.",
)
TIMES = ("", "", "", "Later ", "At noon ", "Then ", "After a while ", "Before dark ")
GIVE = (
    "{a} gave the {thing} to {b}.",
    "{b} took the {thing} from {a}.",
    "{a} handed {b} the {thing}.",
    "{a} lent the {thing} to {b}.",
)
WALK = ("{a} walked to the {spot}.", "{a} hurried to the {spot}.", "{a} went to the {spot}.")


@dataclass(slots=True)
class _Stage:
    """What is true at this point of the story."""

    cast: list[Person]
    where: dict[str, str] = field(default_factory=dict)
    holder: dict[str, Person] = field(default_factory=dict)
    finder: dict[str, Person] = field(default_factory=dict)


def scene(rng: Random, hard: bool = False) -> Scene:
    """One story of two to six events (hard: seven to eleven), with seven questions."""
    stage = _Stage(cast=rng.sample(PEOPLE, 4))
    lines = [rng.choice(OPENINGS), *_introduce(rng, stage)]
    for _ in range(rng.randint(7, 11) if hard else rng.randint(2, 6)):
        lines.append(rng.choice(TIMES) + rng.choice((_give, _give, _swap, _walk, _go_home))(rng, stage))
    asks = [*_thing_questions(rng, stage), *_person_questions(rng, stage)]
    return Scene(" ".join(lines) + "\n", tuple(rng.sample(asks, 7)))


def _things(rng: Random, count: int) -> list[str]:
    return [f"{rng.choice(LOOKS)} {noun}" for noun in rng.sample(NOUNS, count)]


def _introduce(rng: Random, stage: _Stage) -> list[str]:
    lines = []
    things = _things(rng, 2)
    for person, spot in zip(stage.cast, rng.sample(SPOTS, 4), strict=True):
        stage.where[person.name] = f"the {spot}"
        who = person.name if rng.random() < 0.5 else f"{person.name} the {person.trade}"
        if things:
            thing = things.pop()
            stage.holder[thing] = stage.finder[thing] = person
            lines.append(f"{who} found a {thing} at the {spot}.")
        else:
            lines.append(f"{who} waited at the {spot}.")
    rng.shuffle(lines)
    return lines


def _give(rng: Random, stage: _Stage) -> str:
    thing = rng.choice(sorted(stage.holder))
    giver = stage.holder[thing]
    taker = rng.choice([person for person in stage.cast if person is not giver])
    stage.holder[thing] = taker
    return rng.choice(GIVE).format(a=giver.name, b=taker.name, thing=thing)


def _swap(rng: Random, stage: _Stage) -> str:
    mine, yours = rng.sample(sorted(stage.holder), 2)
    a, b = stage.holder[mine], stage.holder[yours]
    if a is b:
        return _give(rng, stage)
    stage.holder[mine], stage.holder[yours] = b, a
    return f"{a.name} swapped the {mine} for the {yours} of {b.name}."


def _walk(rng: Random, stage: _Stage) -> str:
    person, spot = rng.choice(stage.cast), rng.choice(SPOTS)
    stage.where[person.name] = f"the {spot}"
    return rng.choice(WALK).format(a=person.name, spot=spot)


def _go_home(rng: Random, stage: _Stage) -> str:
    person = rng.choice(stage.cast)
    stage.where[person.name] = person.home
    return f"{person.name} went home."


def _thing_questions(rng: Random, stage: _Stage) -> list[Question]:
    people = [person.name for person in stage.cast]
    asks = []
    for thing, holder in stage.holder.items():
        finder = stage.finder[thing]
        asks.append(_question(rng, f"Who has the {thing}?", holder.name, "holder", people))
        asks.append(_question(rng, f"Who found the {thing}?", finder.name, "finder", people))
        asks.append(_where(rng, f"Where is the {thing}?", holder, "carried", stage))
    return asks


def _person_questions(rng: Random, stage: _Stage) -> list[Question]:
    asks = []
    for person in stage.cast:
        asks.append(_where(rng, f"Where is {person.name}?", person, "place", stage))
    for person in rng.sample(stage.cast, 2):
        home = f"Where does {person.name} live?"
        homes = [other.home for other in stage.cast]
        asks.append(_question(rng, home, person.home, "home", homes, VILLAGES))
    return asks


def _where(rng: Random, ask: str, person: Person, kind: str, stage: _Stage) -> Question:
    answer = stage.where[person.name]
    if answer == person.home:
        return _question(rng, ask, answer, f"{kind}-home", [p.home for p in stage.cast], VILLAGES)
    spots = [f"the {spot}" for spot in SPOTS]
    return _question(rng, ask, answer, kind, stage.where.values(), spots)


def _question(rng: Random, ask: str, answer: str, kind: str, *pools) -> Question:
    return Question(ask, answer, three_wrong(rng, answer, *pools), kind)
