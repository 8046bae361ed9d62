"""Budgets: one level for each item, least total error, total cost within the budget. The multiple-choice knapsack.

    min  sum_i error_i(level_i)   with   sum_i cost_i(level_i) <= budget

An item is an expert, a layer or a block of channels; its level is a number of bits or a width. Errors are taken as
additive. What a format or a method demands (ties, counts, alignment, bounds) is a constraint of the problem, so
solvers need not know it. Costs are integers (bits or bytes, whatever the budget counts, scales and padding included).

Three solvers: `dynamic` is exact for costs with few steps, `integer_program` is exact for everything (HiGHS), `greedy`
walks the convex hulls and proves how far from the optimum it may be. None falls back on another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moecli.core.errors import MoecliError

if TYPE_CHECKING:
    import numpy as np

TABLE_CELLS = 1 << 28
"""Most cells of the table `dynamic` goes back through, three bytes each: 768 MiB."""


@dataclass(frozen=True, slots=True)
class Level:
    """One choice of an item: `key` names it (bits, width), `cost` is what the budget counts."""

    key: int
    cost: int
    error: float


@dataclass(frozen=True, slots=True)
class Item:
    """What gets one level. Items with the same `tie` share it; `group` is the layer that counts are asked of."""

    id: str
    levels: tuple[Level, ...]
    group: str = ""
    tie: str | None = None
    lowest: int | None = None
    """Smallest key allowed, for a protected expert."""
    highest: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Items and the most they may cost together. MoecliError when an item or a tie has no level that is allowed."""

    items: tuple[Item, ...]
    budget: int
    at_least: Mapping[int, int] = field(default_factory=dict)
    """Level key -> how many items of every group have it at least."""
    align: int = 1
    """Keys are multiples of this."""

    def __post_init__(self) -> None:
        if len({item.id for item in self.items}) != len(self.items):
            raise ValueError("two items have the same id")
        for item in self.items:
            if any(not math.isfinite(level.error) for level in item.levels):
                raise MoecliError(f"an error of `{item.id}` is not a finite number")
            if any(level.cost < 0 for level in item.levels):
                raise ValueError(f"a cost of `{item.id}` is negative")
        units(self)

    def cost(self, choice: Mapping[str, int]) -> int:
        return sum(_level(item, choice[item.id]).cost for item in self.items)

    def error(self, choice: Mapping[str, int]) -> float:
        return math.fsum(_level(item, choice[item.id]).error for item in self.items)

    def allows(self, choice: Mapping[str, int]) -> bool:
        """Whether a choice of one key for each item keeps the budget and every constraint."""
        ties: dict[str, set[int]] = {}
        count: dict[str, dict[int, int]] = {item.group: dict.fromkeys(self.at_least, 0) for item in self.items}
        for item in self.items:
            key = choice[item.id]
            if key not in self._keys(item):
                return False
            ties.setdefault(item.tie or f"item {item.id}", set()).add(key)
            count[item.group][key] = count[item.group].get(key, 0) + 1
        if any(len(keys) > 1 for keys in ties.values()) or self.cost(choice) > self.budget:
            return False
        return all(have[key] >= need for have in count.values() for key, need in self.at_least.items())

    def _keys(self, item: Item) -> set[int]:
        low = -math.inf if item.lowest is None else item.lowest
        high = math.inf if item.highest is None else item.highest
        return {level.key for level in item.levels if low <= level.key <= high and level.key % self.align == 0}


@dataclass(frozen=True, slots=True)
class Solution:
    """One key for each item id. `bound` is proven: no choice has less error (equal to `error` when exact)."""

    choice: Mapping[str, int]
    cost: int
    error: float
    bound: float

    @property
    def gap(self) -> float:
        return self.error - self.bound


@dataclass(frozen=True, slots=True)
class Unit:
    """Items that share a level, as one: costs and errors are sums, levels those that all members have."""

    members: tuple[Item, ...]
    levels: tuple[Level, ...]
    """By cost, then by key."""


def units(problem: Problem) -> list[Unit]:
    """The problem's items with ties joined, in the order of their first members."""
    tied: dict[str, list[Item]] = {}
    for item in problem.items:
        tied.setdefault(f"item {item.id}" if item.tie is None else f"tie {item.tie}", []).append(item)
    found = []
    for members in tied.values():
        keys = set.intersection(*(problem._keys(item) for item in members))
        if not keys:
            who = f"`{members[0].id}`" + (f" and the {len(members) - 1} items tied to it" if len(members) > 1 else "")
            raise MoecliError(f"no level is allowed for {who}: none lies within its bounds, aligned to {problem.align}")
        levels = [
            Level(
                key,
                sum(_level(item, key).cost for item in members),
                math.fsum(_level(item, key).error for item in members),
            )
            for key in keys
        ]
        found.append(Unit(tuple(members), tuple(sorted(levels, key=lambda level: (level.cost, level.key)))))
    return found


def dynamic(problem: Problem) -> Solution:
    """Exact, by dynamic programming over the cost above the cheapest levels, in steps of the costs' common divisor.

    O(units x levels x steps x product of (`at_least` + 1)). ValueError when the table exceeds TABLE_CELLS or a tie
    joins groups while `at_least` asks for counts: `integer_program` solves those.
    """
    import numpy as np

    some = sorted(units(problem), key=lambda unit: unit.members[0].group)
    counted = tuple(problem.at_least)
    if counted and any(len({item.group for item in unit.members}) > 1 for unit in some):
        raise ValueError("a tie joins several groups and `at_least` asks for counts: use `integer_program`")
    step, room = _steps(some, problem.budget)
    if room < 0:
        raise _infeasible(problem)
    shape = tuple(problem.at_least[key] + 1 for key in counted)
    cells = len(some) * math.prod(shape) * (room + 1)
    if cells > TABLE_CELLS:
        raise ValueError(f"the table would have {cells} cells, more than {TABLE_CELLS}: use `integer_program`")

    full, zero = tuple(size - 1 for size in shape), (0,) * len(shape)
    best = np.full((*shape, room + 1), np.inf)
    best[zero] = 0.0
    taken, origin = [], []
    for index, unit in enumerate(some):
        if index and some[index - 1].members[0].group != unit.members[0].group:
            best = _next_group(best, full, zero)
        best, level_of, state_of = _add(best, unit, counted, step)
        taken.append(level_of)
        origin.append(state_of)
    end = best[full]
    if not np.isfinite(end).any():
        raise _infeasible(problem)

    state, at = full, int(np.argmin(end))
    choice: dict[str, int] = {}
    for index in reversed(range(len(some))):
        unit = some[index]
        level = unit.levels[int(taken[index][(*state, at)])]
        choice |= {item.id: level.key for item in unit.members}
        state = tuple(int(x) for x in np.unravel_index(int(origin[index][(*state, at)]), shape)) if shape else ()
        at -= (level.cost - unit.levels[0].cost) // step
        if index and some[index - 1].members[0].group != unit.members[0].group:
            state = full
    return _exact(problem, choice)


def _next_group(best: np.ndarray, full: tuple[int, ...], zero: tuple[int, ...]) -> np.ndarray:
    """Only states that have met every count go on, and the next group counts from none."""
    import numpy as np

    fresh = np.full_like(best, np.inf)
    fresh[zero] = best[full]
    return fresh


def _add(
    best: np.ndarray, unit: Unit, counted: tuple[int, ...], step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The table with one unit more, [*counts, room + 1]; with the level and the former state of each best cell."""
    import numpy as np

    shape, width = best.shape[:-1], best.shape[-1]
    out = np.full_like(best, np.inf)
    level_of = np.zeros(best.shape, dtype=np.uint8)
    state_of = np.zeros(best.shape, dtype=np.uint16)
    for number, level in enumerate(unit.levels):
        more = (level.cost - unit.levels[0].cost) // step
        if more >= width:
            continue
        for flat, state in enumerate(np.ndindex(shape)):
            gained = [len(unit.members) if key == level.key else 0 for key in counted]
            to = tuple(min(have + plus, size - 1) for have, plus, size in zip(state, gained, shape, strict=True))
            tried = best[state][: width - more] + level.error
            target = out[to][more:]
            better = tried < target
            target[better] = tried[better]
            level_of[to][more:][better] = number
            state_of[to][more:][better] = flat
    return out, level_of, state_of


def integer_program(problem: Problem) -> Solution:
    """Exact to HiGHS's tolerances (relative gap 0, absolute 1e-6 of the largest error), for every constraint."""
    found = _highs(problem, by_cost=False)
    if found is None:
        raise _infeasible(problem)
    return _exact(problem, found)


def greedy(problem: Problem) -> Solution:
    """Steps along each unit's convex hull, largest fall in error per cost first, as long as they fit.

    `bound` is the linear relaxation's optimum, which the same order gives: the first step that does not fit is taken in
    part. A step that does not fit ends its unit; later ones of others are still tried. ValueError when `at_least` asks
    for counts, which hulls cannot see.
    """
    if problem.at_least:
        raise ValueError("`greedy` knows no `at_least`: use `dynamic` or `integer_program`")
    some = units(problem)
    left = problem.budget - sum(unit.levels[0].cost for unit in some)
    if left < 0:
        raise _infeasible(problem)
    hulls = [_hull(unit.levels) for unit in some]
    steps = sorted(
        (-(before.error - after.error) / (after.cost - before.cost), index, number)
        for index, hull in enumerate(hulls)
        for number, (before, after) in enumerate(itertools.pairwise(hull))
    )
    level, closed = [0] * len(some), [False] * len(some)
    falls, bound_falls = [], None
    for slope, index, number in steps:
        more = hulls[index][number + 1].cost - hulls[index][number].cost
        if more > left and bound_falls is None:
            bound_falls = [*falls, -slope * left]
        if closed[index] or more > left:
            closed[index] = True
            continue
        falls.append(hulls[index][number].error - hulls[index][number + 1].error)
        level[index] += 1
        left -= more
    choice = {item.id: hull[at].key for unit, hull, at in zip(some, hulls, level, strict=True) for item in unit.members}
    start = [hull[0].error for hull in hulls]
    bound = math.fsum([*start, *(-fall for fall in (falls if bound_falls is None else bound_falls))])
    error = problem.error(choice)
    # Both are sums of the same numbers in another order: rounding must not put the bound above the error.
    return Solution(choice, problem.cost(choice), error, min(bound, error))


def _hull(levels: Sequence[Level]) -> list[Level]:
    """The lower convex hull of (cost, error) from the cheapest level to the least error; costs rise, errors fall."""
    hull: list[Level] = []
    for level in sorted(levels, key=lambda x: (x.cost, x.error, x.key)):
        if hull and level.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], level):
            hull.pop()
        hull.append(level)
    return hull


def _slope(before: Level, after: Level) -> float:
    return (after.error - before.error) / (after.cost - before.cost)


def _highs(problem: Problem, by_cost: bool) -> dict[str, int] | None:
    """The choice of least error, or of least cost with no budget; None when no choice keeps the constraints."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    some = units(problem)
    columns = [(index, level) for index, unit in enumerate(some) for level in unit.levels]
    step, room = _steps(some, problem.budget)
    rows: list[tuple[dict[int, float], float, float]] = []
    each: dict[int, dict[int, float]] = {}
    for column, (index, _level) in enumerate(columns):
        each.setdefault(index, {})[column] = 1.0
    rows += [(row, 1.0, 1.0) for row in each.values()]
    for group in dict.fromkeys(item.group for item in problem.items):
        members = [sum(item.group == group for item in unit.members) for unit in some]
        for key, need in problem.at_least.items():
            row = {c: float(members[i]) for c, (i, level) in enumerate(columns) if level.key == key and members[i]}
            rows.append((row, float(need), np.inf))
    # Costs count from the cheapest level, in steps: small integers keep HiGHS's tolerances away from the budget.
    above = np.array([(level.cost - some[index].levels[0].cost) // step for index, level in columns], dtype=float)
    if by_cost:
        goal = above
    else:
        rows.append((dict(enumerate(above.tolist())), -np.inf, float(room)))
        goal = np.array([level.error for _, level in columns])
        goal = goal / (np.abs(goal).max() or 1.0)
    entries = [(r, c, value) for r, (row, _, _) in enumerate(rows) for c, value in row.items()]
    row_at, column_at, values = zip(*entries, strict=True)
    matrix = coo_array((values, (row_at, column_at)), shape=(len(rows), len(columns))).tocsr()
    limits = LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
    result: Any = milp(
        goal, constraints=limits, integrality=np.ones(len(columns)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0}
    )
    if result.status == 2:
        return None
    if result.status != 0:
        raise MoecliError(f"HiGHS did not solve the budget: {result.message}")
    chosen = [column for column, x in enumerate(result.x) if x > 0.5]
    return {item.id: columns[c][1].key for c in chosen for item in some[columns[c][0]].members}


def _steps(some: Sequence[Unit], budget: int) -> tuple[int, int]:
    """The step that all costs above the cheapest levels are multiples of, and how many steps fit (negative: none)."""
    floor = sum(unit.levels[0].cost for unit in some)
    step = math.gcd(*(level.cost - unit.levels[0].cost for unit in some for level in unit.levels)) or 1
    top = sum(unit.levels[-1].cost for unit in some)
    return step, (min(budget, top) - floor) // step


def _exact(problem: Problem, choice: Mapping[str, int]) -> Solution:
    if not problem.allows(choice):
        raise MoecliError("the solver's choice breaks a constraint: costs are too far apart for its tolerances")
    error = problem.error(choice)
    return Solution(choice, problem.cost(choice), error, error)


def _infeasible(problem: Problem) -> MoecliError:
    cheapest = _highs(problem, by_cost=True)
    if cheapest is None:
        return MoecliError("no choice keeps the constraints, whatever the budget", hint="ask for fewer in `at_least`")
    cost = problem.cost(cheapest)
    return MoecliError(
        f"the budget {problem.budget} cannot be kept, the smallest possible is {cost}", hint=f"raise it to {cost}"
    )


def _level(item: Item, key: int) -> Level:
    return next(level for level in item.levels if level.key == key)


SOLVERS: Mapping[str, Callable[[Problem], Solution]] = {
    "dynamic": dynamic,
    "integer_program": integer_program,
    "greedy": greedy,
}
