"""Two people talk and change their minds; a note at the end keeps what they settled on.

In the shop nobody says what one piece costs: the keeper's total rests on remembered prices.
"""

from __future__ import annotations

from random import Random

from scripts.demo.scenes import Question, Scene, three_wrong
from scripts.demo.world import GOODS, NAMES, PRICES, words

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SPOTS = words("pier library fountain station museum theatre park castle")
HOURS = words("one two three four five six seven eight")
NUMBERS = words("no one two three four five six seven eight nine")
REFUSALS = (
    "No, {day} is bad for me. What about {new}?",
    "I am away on {day}. Could we say {new}?",
    "Not {day}, sorry. Maybe {new}?",
)
MOVES = (
    "Fine, but let us take the {new} instead of the {old}.",
    "Good. Only, not the {old}: the {new} is nearer.",
    "Yes. The {old} is closed, so come to the {new}.",
)


def scene(rng: Random, hard: bool = False) -> Scene:
    """A talk about a meeting, or a purchase (hard: more turns, more pieces)."""
    return rng.choice((_meeting, _shop))(rng, hard)


def _meeting(rng: Random, hard: bool) -> Scene:
    one, two = (name.upper() for name in rng.sample(NAMES, 2))
    days, spots, hours = rng.sample(DAYS, 3), rng.sample(SPOTS, 3), rng.sample(HOURS, 2)
    lines = [f"{one}> Shall we meet on {days[0]} at the {spots[0]}, say at {hours[0]}?"]
    day, spot, hour = days[0], spots[0], hours[0]
    for turn in range(rng.randint(6, 9) if hard else rng.randint(1, 5)):
        speaker = two if turn % 2 == 0 else one
        change = rng.choice(("day", "next", "spot", "hour", "shift"))
        if change == "day":
            new = rng.choice([d for d in DAYS if d != day])
            lines.append(f"{speaker}> " + rng.choice(REFUSALS).format(day=day, new=new))
            day = new
        elif change == "next":
            lines.append(f"{speaker}> Could we make it one day later?")
            day = DAYS[(DAYS.index(day) + 1) % 7]
        elif change == "shift":
            step = rng.choice((-1, 1))
            word = "later" if step == 1 else "earlier"
            lines.append(f"{speaker}> I would rather come an hour {word}.")
            hour = HOURS[(HOURS.index(hour) + step) % 8]
        elif change == "spot":
            new = rng.choice([s for s in SPOTS if s != spot])
            lines.append(f"{speaker}> " + rng.choice(MOVES).format(old=spot, new=new))
            spot = new
        else:
            new = rng.choice([h for h in HOURS if h != hour])
            lines.append(f"{speaker}> Rather at {new} than at {hour}, if you can.")
            hour = new
    lines.append(f"{one}> Agreed. Until then!")
    talk = "\n".join(lines)
    asks = [
        _question(rng, "NOTE> day:", day, "day", [d for d in DAYS if d in talk], DAYS),
        _question(rng, "NOTE> place:", spot, "spot", [s for s in SPOTS if s in talk], SPOTS),
        _question(rng, "NOTE> hour:", hour, "hour", [h for h in HOURS if f" {h}" in talk], HOURS),
    ]
    rng.shuffle(asks)
    return Scene(talk + "\n", tuple(asks))


def _shop(rng: Random, hard: bool) -> Scene:
    buyer, (first, second, third) = rng.choice(NAMES).upper(), rng.sample(GOODS, 3)
    most = 6 if hard else 5
    basket = {first: rng.randint(1, most), second: rng.randint(1, most)}
    lines = [
        f"{buyer}> Good day. {_amount(basket[first], first).capitalize()} and "
        f"{_amount(basket[second], second)}, please.",
    ]
    event = rng.choice(("swap", "more", "plain", "less"))
    if event == "swap":
        basket[third] = basket.pop(second)
        lines += [f"KEEPER> The {second} is sold out.", f"{buyer}> Then {third} instead."]
    elif event == "more":
        extra = rng.randint(1, 3)
        basket[first] += extra
        lines += ["KEEPER> Anything else?", f"{buyer}> Yes, {_amount(extra, first)} more."]
    elif event == "less" and basket[first] > 1:
        basket[first] -= 1
        lines += ["KEEPER> Is that all?", f"{buyer}> One {first} less, now that I count."]
    total = sum(PRICES[good] * count for good, count in basket.items())
    asks = [_count(rng, good, count) for good, count in basket.items()]
    asks.append(_total(rng, total))
    good = rng.choice(GOODS)
    asks.append(_price(rng, good))
    return Scene("\n".join(lines) + "\n", tuple(asks), ordered=True)


def _amount(count: int, good: str) -> str:
    return f"{NUMBERS[count]} {good}"


def _count(rng: Random, good: str, count: int) -> Question:
    ask = f"KEEPER> So that makes, of {good},"
    return _question(rng, ask, NUMBERS[count], "count", NUMBERS[1:])


def _total(rng: Random, total: int) -> Question:
    near = [str(total + step) for step in (-4, -3, -2, -1, 1, 2, 3, 4) if total + step > 0]
    return _question(rng, "KEEPER> In coins, all together:", str(total), "total", near)


def _price(rng: Random, good: str) -> Question:
    ask = f"{rng.choice(NAMES).upper()}> And a single {good}? KEEPER>"
    numbers = [str(price) for price in range(2, 10)]
    return _question(rng, ask, str(PRICES[good]), "price", numbers)


def _question(rng: Random, ask: str, answer: str, kind: str, *pools) -> Question:
    return Question(ask, answer, three_wrong(rng, answer, *pools), kind)
