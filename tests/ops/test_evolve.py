"""EvoPress's search: what it judges is always allowed, it never gets worse, and it finds what additive budgets miss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecli.ops.budget import Item, Level, Problem, dynamic
from moecli.ops.evolve import Choice, Step, generation

STEPS = (Step(4, 10), Step(1, 100))


def problem(count: int, average: float, *, tie: bool = False, at_least: dict[int, int] | None = None) -> Problem:
    rng = np.random.default_rng(count)
    items = tuple(
        Item(
            f"{i}",
            tuple(Level(bits, bits, float(rng.random() * 4.0**-bits)) for bits in (2, 3, 4)),
            group=str(i // 4),
            tie=str(i // 2) if tie else None,
        )
        for i in range(count)
    )
    return Problem(items, int(count * average), at_least or {})


def uniform(some: Problem, bits: int) -> Choice:
    return {item.id: bits for item in some.items}


class Judge:
    """Additive errors of the problem; remembers what it was asked."""

    def __init__(self, some: Problem) -> None:
        self.problem, self.asked = some, list[tuple[list[Choice], int]]()

    def __call__(self, choices: Sequence[Choice], tokens: int) -> list[float]:
        self.asked.append((list(choices), tokens))
        return [self.problem.error(choice) for choice in choices]


def search(some: Problem, start: Choice, judge: Judge, generations: int, offspring: int = 12, seed: int = 0) -> Choice:
    for number in range(generations):
        found = generation(some, start, judge, STEPS, offspring, np.random.default_rng([seed, number]))
        assert found.fitness <= found.before
        start = found.parent
    return start


def test_additive_errors_end_at_the_exact_optimum() -> None:
    some = problem(8, 3)
    judge = Judge(some)
    found = search(some, uniform(some, 3), judge, 60)
    assert some.error(found) == pytest.approx(dynamic(some).error, rel=1e-12)


def test_interactions_are_seen() -> None:
    """Two units that lose only together: the additive optimum lowers both, the search keeps one."""
    items = tuple(Item(f"{i}", (Level(2, 2, 0.0 if i < 2 else 1.0), Level(4, 4, 0.0))) for i in range(4))
    some = Problem(items, 12)

    def loss(choices: Sequence[Choice], tokens: int) -> list[float]:
        return [10.0 * (c["0"] == 2 and c["1"] == 2) + (c["2"] == 2) + (c["3"] == 2) for c in choices]

    additive = dynamic(some).choice
    assert loss([additive], 1) == [10.0]
    found = additive
    for number in range(20):
        found = generation(some, found, loss, STEPS, 6, np.random.default_rng(number)).parent
    everything = [dict(zip("0123", keys, strict=True)) for keys in itertools.product((2, 4), repeat=4)]
    assert loss([found], 1)[0] == min(loss([c], 1)[0] for c in everything if some.allows(c)) == 1.0


@given(
    st.integers(4, 12).map(lambda n: n // 4 * 4),
    st.sampled_from((2.0, 2.5, 3.0, 3.75)),
    st.booleans(),
    st.integers(0, 9),
)
def test_all_that_is_judged_keeps_the_budget(count: int, average: float, tie: bool, seed: int) -> None:
    some = problem(count, average, tie=tie)
    judge = Judge(some)
    start = uniform(some, 2)
    generation(some, start, judge, STEPS, 6, np.random.default_rng(seed))
    for choices, _ in judge.asked:
        assert all(some.allows(choice) for choice in choices)
        assert len({tuple(sorted(choice.items())) for choice in choices}) == len(choices)
        assert all(choice != start for choice in choices[1:])


def test_counts_of_a_level_are_kept() -> None:
    some = problem(8, 3, at_least={4: 1})
    start = {item.id: 4 if int(item.id) % 4 == 0 else 2 for item in some.items}
    judge = Judge(some)
    search(some, start, judge, 10)
    assert sum(len(choices) for choices, _ in judge.asked) > 50
    assert all(some.allows(choice) for choices, _ in judge.asked for choice in choices)


def test_selection_goes_in_steps_and_the_parent_comes_last() -> None:
    some = problem(8, 3)
    judge = Judge(some)
    start = uniform(some, 3)
    found = generation(some, start, judge, STEPS, 12, np.random.default_rng(0))
    (first, few), (last, many) = judge.asked
    assert (len(first), few, len(last), many) == (12, 10, 5, 100)
    assert last[0] == start and start not in first
    best = sorted(map(some.error, first))[:4]
    assert sorted(map(some.error, last[1:])) == pytest.approx(best)
    assert (found.children, found.before) == (12, some.error(start))


def test_switches_are_few_and_cost_nothing_more() -> None:
    """At most three units up and three down, of equal cost here; one switch is the most common number: 5 of 9 draws."""
    some = problem(40, 3)
    judge = Judge(some)
    start = uniform(some, 3)
    generation(some, start, judge, (Step(1, 1),), 300, np.random.default_rng(0))
    ups = [sum(choice[i] > 3 for i in choice) for choice in judge.asked[0][0][1:]]
    assert all(some.cost(choice) == some.budget for choice in judge.asked[0][0])
    assert set(ups) == {1, 2, 3}
    assert 0.45 < sum(up == 1 for up in ups) / len(ups) < 0.66
    assert sum(up == 3 for up in ups) / len(ups) < 0.2


def test_the_same_numbers_give_the_same_children() -> None:
    some = problem(8, 3)
    runs = [Judge(some) for _ in range(2)]
    for judge in runs:
        search(some, uniform(some, 3), judge, 3, seed=5)
    assert runs[0].asked == runs[1].asked


def test_a_parent_over_the_budget_is_refused() -> None:
    some = problem(4, 3)
    with pytest.raises(ValueError, match="parent"):
        generation(some, uniform(some, 4), Judge(some), STEPS, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="one survivor"):
        generation(some, uniform(some, 3), Judge(some), (Step(2, 1),), 2, np.random.default_rng(0))


def test_a_problem_with_one_choice_only_keeps_its_parent() -> None:
    some = problem(4, 2)
    found = generation(some, uniform(some, 2), Judge(some), STEPS, 3, np.random.default_rng(0))
    assert found.parent == uniform(some, 2) and found.children == 0
