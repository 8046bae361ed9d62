"""Grouping and combining against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from moecli.ops import gram, grouped


def test_group_sorts_visits_and_keeps_the_order_of_tokens() -> None:
    found = grouped.group(torch.tensor([[2, 0], [0, 3], [2, 3]]), experts=5)
    assert found.expert_S.tolist() == [0, 0, 2, 2, 3, 3]
    assert found.slot_S.tolist() == [1, 2, 0, 4, 3, 5]
    assert found.end_E.tolist() == [2, 2, 4, 6, 6]
    assert found.place_Tk.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_each_visit_is_multiplied_by_its_own_expert() -> None:
    x, weight = torch.randn(6, 8), torch.randn(5, 16, 8)
    found = grouped.linear(x, weight, torch.tensor([2, 2, 4, 6, 6], dtype=torch.int32))
    wanted = torch.stack([x[i] @ weight[e].T for i, e in enumerate([0, 0, 2, 2, 3, 3])])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_combine_adds_each_tokens_visits() -> None:
    y, gates = torch.randn(6, 4), torch.rand(3, 2)
    place = torch.tensor([[2, 0], [1, 4], [3, 5]])
    found = grouped.combine(y, place, gates, read=True)
    wanted = torch.stack([sum(gates[t, j] * y[place[t, j]] for j in range(2)) for t in range(3)])
    torch.testing.assert_close(found.routed_TD, wanted)
    torch.testing.assert_close(found.square_S, y.norm(dim=-1) ** 2)
    assert torch.equal(found.largest_S, y.abs().amax(-1))
    assert grouped.combine(y, place, gates).square_S is None


def test_silu_gate_and_its_sum_over_tokens() -> None:
    both = torch.randn(3, 2, 8)
    wanted = both[..., :4] * torch.sigmoid(both[..., :4]) * both[..., 4:]
    torch.testing.assert_close(grouped.silu_gate(both), wanted)
    weight = torch.rand(3, 2)
    torch.testing.assert_close(grouped.silu_gate_sum(both), (wanted.sum(0), None))
    torch.testing.assert_close(grouped.silu_gate_sum(both, weight)[1], (wanted * weight[..., None]).sum(0))


def test_turn_is_one_minus_the_cosine() -> None:
    before, added = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    torch.testing.assert_close(grouped.turn(before, added), torch.tensor([1 - 2**-0.5, 0.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 256, 600])
def test_whole_mirrors_the_upper_triangle_whatever_lay_below_it(width: int) -> None:
    upper = torch.randn(3, width, width)
    found = gram.whole(upper.clone())
    wanted = torch.where(torch.ones(width, width, dtype=torch.bool).triu(), upper, upper.mT)
    assert torch.equal(found, wanted)
