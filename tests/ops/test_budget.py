"""Solvers of budgets against trying everything."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.core.errors import MoecliError
from moecli.ops.budget import Item, Level, Problem, dynamic, greedy, integer_program


def item(name, *levels, **more):
    return Item(name, tuple(Level(*level) for level in levels), **more)


@st.composite
def problems(draw, counts=True):
    keys = [1, 2, 3, 4]
    items = []
    for number in range(draw(st.integers(1, 5))):
        some = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4, unique=True))
        levels = tuple(Level(k, draw(st.integers(0, 9)) * 3, draw(st.integers(0, 1000)) / 7) for k in some)
        group = draw(st.sampled_from("ab"))
        tie = draw(st.sampled_from([None, None, f"tie {group}"]))
        low, high = draw(st.sampled_from([(None, None), (None, 3), (2, None)]))
        items.append(Item(f"i{number}", levels, group, tie, low, high))
    need = draw(st.dictionaries(st.sampled_from(keys), st.integers(0, 2), max_size=2)) if counts else {}
    return items, draw(st.integers(0, 100)), need, draw(st.sampled_from([1, 1, 2]))


def plain(items, budget, need, align):
    """Least error and least cost of all choices that keep the constraints, spelled out; None where there is none."""
    errors, costs = [], []
    for levels in itertools.product(*(one.levels for one in items)):
        pairs = list(zip(items, levels, strict=True))
        if any(a.tie and a.tie == b.tie and x.key != y.key for a, x in pairs for b, y in pairs):
            continue
        if any(level.key % align for level in levels):
            continue
        if any(one.lowest is not None and level.key < one.lowest for one, level in pairs):
            continue
        if any(one.highest is not None and level.key > one.highest for one, level in pairs):
            continue
        groups = {one.group for one in items}
        if any(sum(o.group == g and x.key == k for o, x in pairs) < n for g in groups for k, n in need.items()):
            continue
        costs.append(sum(level.cost for level in levels))
        if costs[-1] <= budget:
            errors.append(math.fsum(level.error for level in levels))
    return min(errors, default=None), min(costs, default=None)


def built(items, budget, need, align):
    """The problem, or None when an item has no level left, which is the constructor's error."""
    try:
        return Problem(tuple(items), budget, need, align)
    except MoecliError as error:
        assert "no level is allowed" in error.message
        assert plain(items, 10**9, {}, align)[1] is None
        return None


@settings(max_examples=150, deadline=None)
@given(problems())
def test_exact_solvers_find_what_trying_everything_finds(case):
    best, cheapest = plain(*case)
    if (problem := built(*case)) is None:
        return
    for solve in (dynamic, integer_program):
        if best is None:
            match = "whatever the budget" if cheapest is None else f"the smallest possible is {cheapest}$"
            with pytest.raises(MoecliError, match=match):
                solve(problem)
        else:
            found = solve(problem)
            assert problem.allows(found.choice)
            assert found.error == pytest.approx(best, abs=1e-3)
            assert found.cost == problem.cost(found.choice) <= problem.budget
    if best is not None:
        assert dynamic(problem).error == pytest.approx(best, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(problems(counts=False))
def test_greedy_keeps_the_budget_and_its_bound_never_lies(case):
    best, _ = plain(*case)
    problem = built(*case)
    if problem is None or best is None:
        return
    found = greedy(problem)
    assert problem.allows(found.choice)
    assert found.bound <= best + 1e-9
    assert best <= found.error + 1e-9
    assert found.gap >= 0


def test_greedy_is_within_one_step_of_the_optimum():
    items = tuple(item(f"e{i}", (2, 2, 10.0 + i), (3, 3, 4.0), (4, 4, 1.0)) for i in range(40))
    found = greedy(Problem(items, 101))
    best = dynamic(Problem(items, 101))
    assert found.bound <= best.error <= found.error
    assert found.gap <= max(10.0 + i - 4.0 for i in range(40))
    assert found.error == pytest.approx(best.error)  # equal steps on convex curves: the hull walk is exact


def test_the_relaxation_is_tight_where_the_break_is_exact():
    problem = Problem((item("a", (1, 0, 8.0), (2, 2, 0.0)), item("b", (1, 0, 3.0), (2, 2, 0.0))), 2)
    assert (greedy(problem).choice, greedy(problem).gap) == ({"a": 2, "b": 1}, 0.0)
    half = Problem(problem.items, 1)
    assert (greedy(half).error, greedy(half).bound) == (11.0, 7.0)


def test_ties_across_layers_go_to_the_integer_program():
    items = tuple(item(f"e{i}", (2, 2, 5.0), (4, 4, 1.0), group=str(i % 2), tie="all") for i in range(4))
    assert dynamic(Problem(items, 12)).choice == dict.fromkeys(["e0", "e1", "e2", "e3"], 2)
    asked = Problem(items, 16, {4: 1})
    assert integer_program(asked).choice == dict.fromkeys(["e0", "e1", "e2", "e3"], 4)
    with pytest.raises(ValueError, match="use `integer_program`"):
        dynamic(asked)
    with pytest.raises(ValueError, match="knows no `at_least`"):
        greedy(asked)


def test_costs_of_bytes_are_counted_in_steps():
    size = 3 * 2048 * 768 // 8
    items = tuple(item(f"e{i}", *((b, b * size + 77, (i + 1) / b) for b in (2, 3, 4))) for i in range(200))
    problem = Problem(items, 200 * (3 * size + 77) + size - 1)
    found = dynamic(problem)
    assert found.cost == 200 * (3 * size + 77)
    assert integer_program(problem).error == pytest.approx(found.error, abs=1e-6 * 100)


def test_refusals():
    with pytest.raises(MoecliError, match="an error of `e` is not a finite number"):
        Problem((item("e", (2, 2, math.nan)),), 9)
    with pytest.raises(MoecliError, match="no level is allowed for `e` and the 1 items tied to it"):
        Problem((item("e", (2, 2, 1.0), tie="t"), item("f", (3, 3, 1.0), tie="t")), 9)
    with pytest.raises(MoecliError, match="aligned to 64"):
        Problem((item("e", (96, 2, 1.0)),), 9, align=64)
    with pytest.raises(ValueError, match="same id"):
        Problem((item("e", (2, 2, 1.0)), item("e", (2, 2, 1.0))), 9)
    for solve in (dynamic, integer_program, greedy):
        with pytest.raises(MoecliError, match=r"the budget 3 cannot be kept, the smallest possible is 4$") as caught:
            solve(Problem((item("e", (2, 2, 1.0)), item("f", (2, 2, 1.0))), 3))
        assert caught.value.hint == "raise it to 4"
