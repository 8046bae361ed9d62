"""Which channels stay, against lists and brute force; the refit against a least-squares solver."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.budget import Item, Level, Problem, dynamic, integer_program
from moecli.ops.channels import (
    Bounds,
    budgeted,
    coverage_scores,
    keep_channels,
    layer_widths,
    refit_down,
    total_left,
    width_left,
)


def scores(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_each_expert_keeps_its_own_best() -> None:
    kept = keep_channels({3: scores([1, 4, 2, 3], [9, 9, 9, 8])}, 0.5, "expert")
    assert kept[3].tolist() == [[False, True, False, True], [True, True, False, False]]


def test_a_layer_keeps_the_best_of_all_its_experts() -> None:
    kept = keep_channels({0: scores([1, 4, 2, 3], [9, 9, 9, 8]), 1: scores([0, 0, 0, 0], [1, 1, 1, 1])}, 0.5, "layer")
    assert kept[0].tolist() == [[False] * 4, [True] * 4]
    assert kept[1].tolist() == [[False] * 4, [True] * 4]


def test_all_layers_together() -> None:
    kept = keep_channels({0: scores([1, 4, 2, 3]), 1: scores([0, 5, 0, 9])}, 0.5, "global")
    assert kept[0].tolist() == [[False, True, False, True]]
    assert kept[1].tolist() == [[False, True, False, True]]


def test_blocks_floor_and_whole_experts() -> None:
    score = {0: scores([5, 6, 7, 8], [1, 2, 3, 4], [0, 0, 0, 1])}
    plain = keep_channels(score, 0.5, "global", Bounds(block=2))[0]
    assert plain.sum(1).tolist() == [4, 2, 0]
    assert plain[1].tolist() == [False, False, True, True]
    assert keep_channels(score, 0.5, "global", Bounds(block=2, floor=1))[0].sum(1).tolist() == [2, 2, 2]
    assert keep_channels(score, 0.5, "global", Bounds(block=2, safe={0: [2]}))[0].sum(1).tolist() == [2, 0, 4]
    assert keep_channels(score, 0.5, "expert", Bounds(block=2, safe={0: [2]}))[0].sum(1).tolist() == [2, 2, 4]


def test_what_cannot_be_kept_is_said() -> None:
    score = {0: scores([1, 2, 3, 4], [1, 2, 3, 4])}
    with pytest.raises(ValueError, match="8 channels must stay, the ratio leaves 4"):
        keep_channels(score, 0.5, "layer", Bounds(safe={0: [0, 1]}))
    with pytest.raises(ValueError, match="blocks of 3 do not divide 4 channels"):
        keep_channels(score, 0.5, "layer", Bounds(block=3))
    score[0][1, 2] = torch.nan
    with pytest.raises(ValueError, match="score of channel 2 of expert 1 in layer 0 is NaN"):
        keep_channels(score, 0.5, "expert")


def as_problem(score: dict[int, torch.Tensor], ratio: float, bounds: Bounds) -> Problem:
    """The same choice as a knapsack of experts, whose levels are numbers of blocks; layer floors are not in it."""
    items = []
    for layer, score_EF in score.items():
        for expert, values in enumerate(score_EF):
            blocks = [float(b.sum()) for b in values.sort(descending=True).values.split(bounds.block)]
            levels = tuple(Level(n, n, sum(blocks[n:])) for n in range(len(blocks) + 1))
            whole = len(blocks) if expert in bounds.safe.get(layer, ()) else None
            floor = whole or math.ceil(bounds.floor / bounds.block)
            ceiling = None if bounds.ceiling is None else bounds.ceiling // bounds.block
            items.append(Item(f"{layer}.{expert}", levels, lowest=floor, highest=whole or ceiling))
    channels = sum(values.numel() for values in score.values())
    return Problem(tuple(items), total_left(channels, ratio, bounds.block))


def brute(problem: Problem, layer_floor: int) -> float | None:
    """Least error over all choices that use the whole budget; None when there is none."""
    best = None
    for keys in itertools.product(*([level.key for level in item.levels] for item in problem.items)):
        choice = {item.id: key for item, key in zip(problem.items, keys, strict=True)}
        layers: dict[str, int] = {}
        for name, key in choice.items():
            layers[name.split(".")[0]] = layers.get(name.split(".")[0], 0) + key
        if problem.allows(choice) and sum(keys) == problem.budget and min(layers.values()) >= layer_floor:
            best = problem.error(choice) if best is None else min(best, problem.error(choice))
    return best


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_bounds_are_kept_and_the_choice_is_still_the_best(data: st.DataObject) -> None:
    """Oracle (f): brute force over every number of blocks of four experts in two layers; the knapsack's dynamic
    programme and integer programme agree where they know all the bounds.
    """
    block = data.draw(st.integers(1, 2))
    draw = st.lists(st.integers(0, 9), min_size=6 * block, max_size=6 * block)
    score = {i: torch.tensor(data.draw(draw), dtype=torch.float64).view(2, -1) for i in (0, 1)}
    bounds = Bounds(
        block=block,
        floor=data.draw(st.integers(0, block)),
        ceiling=data.draw(st.sampled_from([None, 2 * block, 3 * block])),
        layer_floor=data.draw(st.sampled_from([0.0, 0.3, 0.5])),
        safe=data.draw(st.sampled_from([{}, {1: [0]}])),
    )
    ratio = data.draw(st.sampled_from([0.25, 0.4, 0.5, 0.75]))
    layer_blocks = math.ceil(bounds.layer_floor * 6 - 1e-9)
    problem = as_problem(score, ratio, bounds)
    best = brute(problem, layer_blocks)
    try:
        kept = keep_channels(score, ratio, "global", bounds)
    except ValueError as refused:
        assert best is None, refused
        return
    assert best is not None
    choice = {f"{i}.{e}": int(n) // block for i, kept_EF in kept.items() for e, n in enumerate(kept_EF.sum(1))}
    assert problem.allows(choice)
    assert min(int(kept_EF.sum()) for kept_EF in kept.values()) >= layer_blocks * block
    assert math.isclose(problem.error(choice), best)
    if not bounds.layer_floor:
        assert math.isclose(dynamic(problem).error, best)
        assert math.isclose(integer_program(problem).error, best, abs_tol=1e-4)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_one_width_a_layer_is_the_best_of_all_widths(data: st.DataObject) -> None:
    """Brute force; layers need not have equally many experts, scores may be negative."""
    block, experts = data.draw(st.integers(1, 2)), (2, data.draw(st.integers(1, 3)))
    score = {}
    for layer, number in enumerate(experts):
        values = data.draw(st.lists(st.integers(-9, 9), min_size=3 * block * number, max_size=3 * block * number))
        score[layer] = torch.tensor(values, dtype=torch.float64).view(number, -1)
    bounds = Bounds(block, floor=data.draw(st.integers(0, 2)), layer_floor=data.draw(st.sampled_from([0.0, 0.5])))
    ratio = data.draw(st.sampled_from([0.25, 0.4, 0.5]))
    budget = total_left(sum(s.numel() for s in score.values()), ratio, block)
    lowest = max(1, math.ceil(bounds.floor / block), math.ceil(bounds.layer_floor * 3 - 1e-9))
    moved = min(float(s.sort(descending=True).values.unflatten(1, (-1, block)).sum(-1).min()) for s in score.values())

    def worth(widths: tuple[int, ...]) -> float:
        return sum(
            float(s.sort(descending=True).values[:, : w * block].sum()) - moved * w * len(s)
            for s, w in zip(score.values(), widths, strict=True)
        )

    legal = [
        w for w in itertools.product(range(lowest, 4), repeat=2)
        if sum(n * e for n, e in zip(w, experts, strict=True)) <= budget
    ]  # fmt: skip
    if not legal:
        with pytest.raises(ValueError, match="no widths of layers leave"):
            keep_channels(score, ratio, "global", bounds, one_width=True)
        return
    kept = keep_channels(score, ratio, "global", bounds, one_width=True)
    chosen = tuple(int(kept_EF.sum(1)[0]) // block for kept_EF in kept.values())
    assert all(len(set(kept_EF.sum(1).tolist())) == 1 for kept_EF in kept.values())
    assert math.isclose(worth(chosen), max(map(worth, legal)), abs_tol=1e-9)
    for layer, kept_EF in kept.items():  # each expert's best ones
        for expert, row in enumerate(kept_EF):
            inside, outside = score[layer][expert][row], score[layer][expert][~row]
            assert not len(outside) or inside.min() >= outside.max()


def test_more_blocks_than_the_table_counts() -> None:
    """Beyond 255 levels hulls decide; with equally many experts a layer that is exact as well."""
    torch.manual_seed(0)
    score = {layer: torch.rand(2, 300, dtype=torch.float64) * (layer + 1) for layer in range(3)}
    ordered = {layer: s.sort(descending=True).values for layer, s in score.items()}
    found = layer_widths(ordered, 0.5, Bounds())
    assert found.gap <= 1e-9 * found.error
    kept = keep_channels(score, 0.5, "global", Bounds(), one_width=True)
    assert sum(int(kept_EF.sum()) for kept_EF in kept.values()) == 900
    gains = torch.cat([s.sum(0) for s in ordered.values()])
    best = gains.sort(descending=True).values[:450].sum()
    assert math.isclose(sum(float(score[i][k].sum()) for i, k in kept.items()), float(best))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_best_and_never_above_the_budget(data: st.DataObject) -> None:
    """Brute force over all numbers of blocks in at most five experts."""
    experts, blocks, block = (data.draw(st.integers(1, n)) for n in (4, 3, 2))
    width = blocks * block
    values = data.draw(st.lists(st.integers(0, 9), min_size=experts * width, max_size=experts * width))
    ratio = data.draw(st.sampled_from([0.2, 0.25, 0.4, 0.5, 0.6, 0.75]))
    score_EF = torch.tensor(values, dtype=torch.float64).view(experts, width)
    kept_EF = keep_channels({0: score_EF}, ratio, "global", Bounds(block=block))[0]
    budget = math.floor(experts * width * (1 - ratio) + 1e-9)
    assert budget - block < int(kept_EF.sum()) <= budget
    assert all(count % block == 0 for count in kept_EF.sum(1).tolist())
    best = max(
        sum(float(score_EF[e].sort(descending=True).values[: n * block].sum()) for e, n in enumerate(counts))
        for counts in itertools.product(range(blocks + 1), repeat=experts)
        if sum(counts) * block <= budget
    )
    assert float(score_EF[kept_EF].sum()) == best


def test_widths_are_rounded_up() -> None:
    assert [width_left(768, ratio, 128) for ratio in (0.2, 0.25, 0.5, 0.6)] == [640, 640, 384, 384]
    assert width_left(10, 0.3, 1) == 7


def test_the_refit_is_least_squares_pulled_to_the_old_columns() -> None:
    rng = torch.Generator().manual_seed(0)
    h_ETF = torch.randn(2, 40, 6, generator=rng, dtype=torch.float64)
    h_ETF[..., 3] = h_ETF[..., 0] + 0.1 * h_ETF[..., 3]
    down_EDF = torch.randn(2, 3, 6, generator=rng, dtype=torch.float64)
    kept_EF = torch.tensor([[True, True, False, False, True, True], [True, False, True, False, False, False]])
    ridge = 0.03
    found = refit_down(down_EDF, h_ETF.mT @ h_ETF, kept_EF, ridge)
    for expert in range(2):
        h_TF, down_DF, kept = h_ETF[expert], down_EDF[expert], kept_EF[expert]
        pull = math.sqrt(ridge * float((h_TF**2).sum(0).mean())) * torch.eye(int(kept.sum()), dtype=torch.float64)
        left = torch.cat([h_TF[:, kept], pull])
        right = torch.cat([h_TF @ down_DF.T, pull @ down_DF[:, kept].T])
        wanted = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(found[expert][:, kept], wanted)
        assert float(found[expert][:, ~kept].abs().max()) == 0
        plain = (h_TF[:, ~kept] @ down_DF[:, ~kept].T).norm()
        assert (h_TF @ (found[expert] - down_DF).T).norm() < 0.9 * plain


def test_nothing_to_refit_changes_nothing() -> None:
    down, gram = torch.randn(2, 3, 4).double(), torch.eye(4).expand(2, 4, 4).clone()
    every = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(refit_down(down, gram, every, 1e-2), down)
    some = torch.tensor([[True, False, True, True]] * 2)
    assert torch.equal(refit_down(down, torch.zeros(2, 4, 4), some, 1e-2), down * some[:, None])


def prefix(values: list[float], part: float) -> set[int]:
    """The smallest set of largest values that holds this part of the sum."""
    order, total, held = sorted(range(len(values)), key=lambda k: (-values[k], k)), sum(values), 0.0
    taken: set[int] = set()
    for k in order:
        if held >= part * total - 1e-12:
            break
        taken.add(k)
        held += values[k]
    return taken


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_coverage_is_the_smallest_set_for_every_m(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=3))
    weight = data.draw(st.lists(st.integers(1, 5), min_size=len(rows), max_size=len(rows)))
    score = coverage_scores(scores(*rows), torch.tensor(weight, dtype=torch.float64))
    for m in (0.05, 0.21, 0.33, 0.57, 0.83, 1.7):
        for row, c, found in zip(rows, weight, score.tolist(), strict=True):
            assert {k for k, s in enumerate(found) if s > -m + 1e-12} == prefix(row, min(1.0, c * m))


def test_experts_that_give_nothing_come_last() -> None:
    score = coverage_scores(scores([1, 2, 3], [3, 2, 1], [0, 0, 0]), torch.tensor([0.0, 1.0, 1.0]))
    assert score[0].tolist()[2] == 0, "the first channel of every expert comes in with m"
    assert float(score[0, :2].max()) < float(score[1].min()) < 0
    assert not torch.isnan(score).any()


def test_a_layer_gets_what_its_weight_asks_for() -> None:
    """Counts by the layer's values and weight, channels by their own order."""
    rng = torch.Generator().manual_seed(0)
    value = {layer: torch.rand(3, 4, generator=rng).double() + 0.1 for layer in (0, 1)}
    score = {layer: torch.randn(3, 4, generator=rng).double() for layer in (0, 1)}
    weight = {0: 1.0, 1: 0.5}
    kept = keep_channels(budgeted(score, value, weight), 0.5, "global")
    counts = {layer: int(kept_EF.sum()) for layer, kept_EF in kept.items()}
    assert sum(counts.values()) == 12
    assert counts[0] > counts[1]
    for layer, kept_EF in kept.items():
        best = score[layer].flatten().argsort(descending=True)[: counts[layer]]
        assert set(kept_EF.flatten().nonzero().flatten().tolist()) == set(best.tolist())

    def wanted(s: float) -> dict[int, int]:
        return {i: len(prefix(value[i].flatten().tolist(), min(1.0, weight[i] * s))) for i in (0, 1)}

    assert any(wanted(step / 2000) == counts for step in range(1, 4000)), "one s for both layers gives these counts"
