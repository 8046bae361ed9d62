"""Published costs of bits: by hand, and the published factors against the published maps."""

import json
from pathlib import Path

import pytest
import torch

from moecli.ops.budget import dynamic, integer_program
from moecli.ops.precision import asymmetric, bits_problem, pmq_cost

GOLDEN = next(
    (
        file
        for folder in Path(__file__).resolve().parents
        if (file := folder / "shared/golden/mc-moe-pmq.json").is_file()
    ),
    None,
)


def test_the_cost_by_hand():
    cost = pmq_cost([1, 3], [4.0, 12.0], [{2: 5.0, 3: 2.0}, {2: 7.0, 3: 1.0}], (1, 1.5, 2))
    assert cost[0] == pytest.approx({2: 1000 * 0.25 * 0.125 * 25, 3: 1000 * 0.25 * 0.125 * 4})
    assert cost[1] == pytest.approx({2: 1000 * 0.75 * 0.75**1.5 * 49, 3: 1000 * 0.75 * 0.75**1.5})
    assert pmq_cost([0, 0], [0.0, 0.0], [{2: 1.0}, {2: 1.0}]) == [{2: 0.0}, {2: 0.0}]


def test_a_layer_has_both_upper_widths():
    cost = [{1: 1.0, 2: 0.9, 3: 0.8}, {1: 9.0, 2: 1.0, 3: 0.1}, {1: 5.0, 2: 4.0, 3: 0.5}]
    assert dynamic(bits_problem({4: cost}, 6, upper_two=True)).choice == {"4.0": 1, "4.1": 2, "4.2": 3}
    assert dynamic(bits_problem({4: cost}, 9, upper_two=True)).choice == {"4.0": 2, "4.1": 3, "4.2": 3}
    assert dynamic(bits_problem({4: cost}, 9)).choice == {"4.0": 3, "4.1": 3, "4.2": 3}


def test_layers_and_models_may_share_their_bits():
    cost = {0: [{2: 9.0, 4: 0.0}, {2: 1.0, 4: 0.0}], 1: [{2: 4.0, 4: 0.0}, {2: 5.0, 4: 0.0}]}
    assert dynamic(bits_problem(cost, 12)).choice == {"0.0": 4, "0.1": 2, "1.0": 2, "1.1": 4}
    assert dynamic(bits_problem(cost, 12, "layer")).choice == {"0.0": 4, "0.1": 4, "1.0": 2, "1.1": 2}
    assert set(dynamic(bits_problem(cost, 15, "model")).choice.values()) == {2}
    assert set(dynamic(bits_problem(cost, 16, "model")).choice.values()) == {4}


def agreeing(exponents, solve, every=1):
    """Layer maps of Mixtral-8x7B at nine budgets that come out as published, and how many there are."""
    golden = json.loads(GOLDEN.read_text())
    same = total = 0
    for layer in list(golden["frequency"])[::every]:
        eps = [
            {int(bits): value for bits, value in golden["loss"][layer][str(e)].items()}
            for e in range(len(golden["frequency"][layer]))
        ]
        cost = pmq_cost(golden["frequency"][layer], golden["weight"][layer], eps, exponents)
        for budget, maps in golden["bits"].items():
            choice = solve(bits_problem({0: cost}, int(budget), upper_two=True)).choice
            same += choice == {f"0.{expert}": bits for expert, bits in maps[layer].items()}
            total += 1
    return same, total


@pytest.mark.skipif(GOLDEN is None, reason="the published factors are not beside the repository")
def test_the_published_factors_give_the_published_maps():
    assert agreeing((1, 1.5, 1), dynamic) == (288, 288)
    assert agreeing((1, 1.5, 2), dynamic) == (206, 288)
    assert agreeing((1, 1.5, 1), integer_program, every=8) == (36, 36)


def test_one_bit_of_the_published_grid_is_the_sign_times_the_mean_size():
    weight = torch.tensor([[1.0, -2.0, 0.0, 5.0, 0.0, 0.0, 0.0, -1.0]]).bfloat16()
    assert asymmetric(weight, 1, 4).tolist() == [[2.0, -2.0, 2.0, 2.0, 0.25, 0.25, 0.25, -0.25]]
    third = asymmetric(torch.tensor([[1.0, 0.0, 0.0]]).double(), 1, 3)
    assert third.dtype == torch.float64 and third[0, 0] == pytest.approx(1 / 3, abs=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_published_grid_weight_by_weight(bits):
    weight = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(bits))
    weight[0, 0, :4], weight[1, 2, 4:] = 0.0, weight[1, 2, 4:].abs() + 1
    found = asymmetric(weight, bits, 4)
    for group, left in zip(weight.view(-1, 4).tolist(), found.view(-1, 4).tolist(), strict=True):
        low, high, top = min(0.0, *group), max(0.0, *group), 2**bits - 1
        scale = (high - low) / top or 1.0
        zero = round(-low / scale)
        assert left == pytest.approx(
            [scale * (min(max(round(w / scale) + zero, 0), top) - zero) for w in group], abs=1e-6
        )
