"""An almanac of invented places: cards of facts, and questions that have to be known by heart."""

from __future__ import annotations

from random import Random

from scripts.demo.scenes import Question, Scene, three_wrong
from scripts.demo.world import FACT_VALUES, PLACES, SEA_OF_RIVER, SEAS, Place, popular_places

COMMON_RANKS, KNOWN_RANKS, RARE_RANKS = 60, 300, 700


def scene(rng: Random, hard: bool = False) -> Scene:
    """One to three cards, then six questions (hard: about little known places)."""
    cards = [_card(rng, place) for place in popular_places(rng, rng.randint(1, 3))]
    asked = rng.sample(PLACES[COMMON_RANKS:], 6) if hard else popular_places(rng, 6)
    return Scene("\n".join(cards) + "\n", tuple(_ask(rng, place) for place in asked))


def _card(rng: Random, place: Place) -> str:
    facts = rng.sample(sorted(place.facts), 3)
    return f"[{place.name}] " + "; ".join(f"{fact}={place.facts[fact]}" for fact in facts)


def band(place: Place) -> str:
    """How well known a place is."""
    if place.rank < COMMON_RANKS:
        return "common"
    if place.rank < KNOWN_RANKS:
        return "known"
    return "rare" if place.rank < RARE_RANKS else "obscure"


def _ask(rng: Random, place: Place) -> Question:
    if rng.random() < 0.2:
        sea = SEA_OF_RIVER[place.facts["river"]]
        wrong = three_wrong(rng, sea, SEAS)
        return Question(f"<sea> {place.name} =>", sea, wrong, f"sea-{band(place)}")
    fact = rng.choice(sorted(place.facts))
    answer = place.facts[fact]
    wrong = three_wrong(rng, answer, FACT_VALUES[fact])
    return Question(f"<{fact}> {place.name} =>", answer, wrong, band(place))
