"""The invented world behind the text: its people, places and prices never change.

Passages do not repeat these facts each time, so a model has to remember them. Places follow a steep
popularity curve: the rare ones are known least well, and are the first that compression forgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product
from random import Random


def words(text: str) -> list[str]:
    """The words of a text, as a list."""
    return text.split()


VILLAGES = words(
    """
    Ashbrook Birchley Copperton Dunmere Elmford Foxley Gorsedale Heronby Ivywell Juniper-Cross
    Kestrel-End Larkham Mossgate Netherby Otterfield Pinewick
    """
)
TRADES = words(
    """
    potter baker weaver smith miller tailor painter sailor tinker gardener carver fiddler roper
    cooper mason glazier
    """
)
NAMES = words(
    """
    Alda Bram Cora Dario Edda Finn Greta Hugo Ines Joren Kaya Lorin Mira Nils Odile Pavo Quin
    Rosa Sten Tilda Ulric Vera Wim Xenia Yorick Zora Anouk Basil Celia Dov Elio Fleur
    """
)
GOODS = words(
    """
    plum fig pear quince cherry melon loaf candle ribbon basket kettle button whistle spoon
    """
)

STEMS = words(
    """
    Ar Bel Cor Dun Er Fal Gar Hol In Jas Kel Lor Mor Nor Os Pel Quar Ros Sil Tam Ul Ver Wen Yar
    Zan Bran Crel Drim Fenn Grul Hask Kirn Lusk Marn Nesk Prend Rill Sorn Thal Vesk
    """
)
ENDINGS = words(
    """
    dale mouth wick gate holm stead crag mere fold reach haven moor ridge water barrow field
    bury thorpe ness cliff vale shaw beck combe garth hythe lea minster toft worth
    """
)
RIVERS = words(
    """
    Anda Brisk Calder Dove Esker Flint Gleam Hollow Isk Jory Lune Mirl Nar Orrin Pell Roe Swale
    Tarn Uldale Wending
    """
)
REGIONS = words(
    """
    Northmark Southmark Highlands Lowlands Fenland Saltcoast Greenwold Stonewold Eastreach
    Westreach Midlands Icefells
    """
)
CRAFTS = words(
    """
    bells glass rope cheese honey lace nails paper salt tiles wool barrels clocks combs drums
    flutes gloves kites ladders oars
    """
)
BIRDS = words(
    """
    wren heron owl crow gull lark swift robin finch raven stork dipper linnet plover teal rook
    """
)
SEAS = ["Amber-Sea", "Grey-Sea", "Moon-Sea", "Quiet-Sea", "Iron-Sea", "Long-Sea"]

POPULARITY_EXPONENT = 2.0


@dataclass(frozen=True, slots=True)
class Person:
    """Someone the stories keep meeting."""

    name: str
    home: str
    trade: str


@dataclass(frozen=True, slots=True)
class Place:
    """An almanac entry; `rank` 0 is the best known place."""

    rank: int
    name: str
    facts: dict[str, str]


FACT_VALUES = {"river": RIVERS, "region": REGIONS, "craft": CRAFTS, "bird": BIRDS}


def _people(rng: Random) -> tuple[Person, ...]:
    return tuple(Person(name, rng.choice(VILLAGES), rng.choice(TRADES)) for name in NAMES)


def _places(rng: Random) -> tuple[Place, ...]:
    names = [stem + ending for stem, ending in product(STEMS, ENDINGS)]
    rng.shuffle(names)
    return tuple(
        Place(rank, name, {fact: rng.choice(values) for fact, values in FACT_VALUES.items()})
        for rank, name in enumerate(names)
    )


def _prices(rng: Random) -> dict[str, int]:
    return {good: rng.randint(2, 15) for good in GOODS}


_RNG = Random("the world")
PEOPLE = _people(_RNG)
PLACES = _places(_RNG)
PRICES = _prices(_RNG)
SEA_OF_RIVER = {river: _RNG.choice(SEAS) for river in RIVERS}
POPULARITY = list(accumulate((rank + 2) ** -POPULARITY_EXPONENT for rank in range(len(PLACES))))


def popular_places(rng: Random, count: int) -> list[Place]:
    """Places drawn by popularity, repeats possible."""
    return rng.choices(PLACES, cum_weights=POPULARITY, k=count)
