"""Evolutionary search for a budget's levels, judged by the whole model: EvoPress (arXiv 2410.14649, sec. 3, alg. 1).

The same problems as `ops.budget`, but nothing is taken as additive: `fitness` looks at complete choices. Each
generation makes `offspring` copies of the parent, each with a few level switches that keep the budget: one unit a level
up, others down until it fits again. They are judged on a little of the text, the best on more, and in the last step
the parent is judged beside the survivors, so that it is never lost to a worse child.

As in the authors' code the number of switches is the smaller of two uniform draws from 1..3, a child that is there
already is drawn again, and a unit goes down for another of the same cost where there is one. Ours: costs may differ
(units go down until the budget holds, at most `MAX_DOWN`), ties and counts of the problem are kept, and one generation
is one call, so that a search can be taken up where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from numpy.random import Generator

from moecli.ops.budget import Problem, Unit, units

Choice = Mapping[str, int]
"""Item id -> key."""

MAX_SWITCHES = 3
MAX_DOWN = 10
"""Units that go down for one that goes up; past them the switch is given up."""
DRAWS = 100
"""Tries at a child that is new and allowed before a generation has fewer than it was asked for."""


class Step(NamedTuple):
    """One step of a generation's selection."""

    survivors: int
    tokens: int
    """Of text, for each candidate."""


QUANTIZATION = (Step(16, 2048), Step(4, 16_384), Step(1, 131_072))
"""Selection of the published search over bits, with 128 offspring for 150 generations."""
SPARSITY = (Step(8, 2048), Step(2, 16_384), Step(1, 65_536))
"""Selection of the published search over sparsity, with 64 offspring for 400 generations."""


class Generation(NamedTuple):
    """What one generation left: the new parent, and its fitness in the last step."""

    parent: Choice
    fitness: float
    before: float
    """Fitness of the old parent on the same text."""
    children: int
    """How many were judged."""


def generation(
    problem: Problem,
    parent: Choice,
    fitness: Callable[[Sequence[Choice], int], Sequence[float]],
    steps: Sequence[Step],
    offspring: int,
    rng: Generator,
) -> Generation:
    """One generation. `fitness(choices, tokens)` gives each choice a number, less is better, on the same `tokens` of
    text for all; it is called once a step. Ties go to the parent, then to who was drawn first.

    ValueError when `parent` is not allowed by the problem, or `steps` do not end with one survivor.
    """
    if not problem.allows(parent):
        raise ValueError("the parent is not allowed by the problem")
    if not steps or steps[-1].survivors != 1:
        raise ValueError("the last step leaves one survivor")
    some = units(problem)
    alive = _children(problem, some, parent, offspring, rng)
    judged = len(alive)
    for step in steps[:-1]:
        if len(alive) <= step.survivors:
            continue
        value = fitness(alive, step.tokens)
        order = sorted(range(len(alive)), key=lambda index: (value[index], index))
        alive = [alive[index] for index in order[: step.survivors]]
    last = [dict(parent), *alive]
    value = fitness(last, steps[-1].tokens)
    best = min(range(len(last)), key=lambda index: (value[index], index))
    return Generation(last[best], value[best], value[0], judged)


def _children(problem: Problem, some: Sequence[Unit], parent: Choice, count: int, rng: Generator) -> list[Choice]:
    """Different children, none like the parent; fewer where the problem has no more."""
    start = [_place(unit, parent) for unit in some]
    found: dict[tuple[int, ...], Choice] = {}
    for _ in range(DRAWS * count):
        if len(found) == count:
            break
        places = list(start)
        for _ in range(min(rng.integers(1, MAX_SWITCHES + 1, size=2))):
            _switch(some, places, problem.budget, rng)
        key = tuple(places)
        if key == tuple(start) or key in found:
            continue
        child = _choice(some, places)
        if problem.allows(child):
            found[key] = child
    return list(found.values())


def _switch(some: Sequence[Unit], places: list[int], budget: int, rng: Generator) -> None:
    """One unit a level up, others down until the budget holds; nothing where that takes too many."""
    up = [index for index, unit in enumerate(some) if places[index] + 1 < len(unit.levels)]
    if not up:
        return
    raised = int(rng.choice(up))
    tried = list(places)
    tried[raised] += 1
    step = _cost(some, tried, raised) - _cost(some, places, raised)
    total = sum(_cost(some, tried, index) for index in range(len(some)))
    for _ in range(MAX_DOWN):
        if total <= budget:
            break
        saved = {i: _cost(some, tried, i) - some[i].levels[tried[i] - 1].cost for i in range(len(some)) if tried[i]}
        saved.pop(raised, None)
        alike = [index for index, cost in saved.items() if cost == step]
        if not saved:
            return
        lowered = int(rng.choice(alike or list(saved)))
        tried[lowered] -= 1
        total -= saved[lowered]
    if total <= budget:
        places[:] = tried


def _cost(some: Sequence[Unit], places: Sequence[int], index: int) -> int:
    return some[index].levels[places[index]].cost


def _place(unit: Unit, choice: Choice) -> int:
    key = choice[unit.members[0].id]
    return next(place for place, level in enumerate(unit.levels) if level.key == key)


def _choice(some: Sequence[Unit], places: Sequence[int]) -> Choice:
    return {item.id: unit.levels[place].key for unit, place in zip(some, places, strict=True) for item in unit.members}
