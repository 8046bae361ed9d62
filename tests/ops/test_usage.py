"""Measures of use against loops over the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kurtosis as scipy_kurtosis

from moecli.ops.usage import domains, kurtosis, load, pairs, vocabulary

COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(any)


@given(COUNTS)
def test_balance_is_its_definition(counts):
    experts, total = len(counts), sum(counts)
    f = [c / total for c in counts]
    found = load(torch.tensor(counts))
    assert found.entropy == pytest.approx(-sum(x * math.log(x) for x in f if x) / math.log(experts), abs=1e-12)
    assert found.imbalance == pytest.approx(max(f) * experts)
    mean = 1 / experts
    assert found.cv == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in f) / experts) / mean)
    apart = sum(abs(x - y) for x in f for y in f)
    assert found.gini == pytest.approx(apart / (2 * experts**2 * mean), abs=1e-12)


def test_balance_at_its_ends():
    assert load(torch.tensor([3, 3, 3, 3])) == pytest.approx((1, 1, 0, 0), abs=1e-12)
    assert load(torch.tensor([0, 8, 0, 0])) == pytest.approx((0, 4, math.sqrt(3), 0.75), abs=1e-12)
    assert load(torch.tensor([0, 0])) == (None, None, None, None)


def test_lift_and_pmi_of_six_tokens():
    chosen = [(0, 1), (0, 1), (0, 2), (1, 2), (0, 1), (0, 2)]
    count = torch.tensor([sum(e in token for token in chosen) for e in range(4)])
    together = torch.tensor([[sum(a in t and b in t for t in chosen) for b in range(4)] for a in range(4)])
    found = pairs(together, count, count, len(chosen))
    assert found.lift[0, 1] == pytest.approx(3 * 6 / (5 * 4))
    assert found.pmi[0, 1] == pytest.approx(math.log(3.5 * 6 / (5 * 4)))
    assert found.lift[3].isnan().all() and found.pmi[:, 3].isnan().all()


def test_domains_of_three_experts_in_two_data_sets():
    found = domains(torch.tensor([[6, 2, 0, 0], [2, 6, 4, 0]]))
    prior = [8 / 20, 12 / 20]
    assert found.divergence[0] == pytest.approx(0.75 * math.log(0.75 / prior[0]) + 0.25 * math.log(0.25 / prior[1]))
    assert found.divergence[2] == pytest.approx(math.log(1 / prior[1]))
    assert found.largest[0] == pytest.approx((6 / 8) / (8 / 20))
    assert found.home.tolist() == [0, 1, 1, -1]
    assert found.divergence[3].isnan()


@given(st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), min_size=1, max_size=4))
def test_an_expert_that_is_used_everywhere_alike_belongs_nowhere(rows):
    found = domains(torch.tensor(rows))
    assert (found.divergence[~found.divergence.isnan()] >= -1e-12).all()
    even = domains(torch.tensor([[2, 4], [3, 6]]))
    assert even.divergence.abs().max() < 1e-12


def test_vocabulary_counts_common_types_only():
    ids = torch.tensor([7] * 4 + [9] * 3 + [5])
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 2], [0, -1], [1, -1], [1, -1], [2, 0]], dtype=torch.int16)
    found = vocabulary(index, ids, 4, common=3)
    assert found.share[:3].tolist() == pytest.approx([3 / 5, 3 / 5, 2 / 3])
    assert found.type.tolist() == [7, 7, 7, -1]
    assert found.share[3].isnan()
    assert vocabulary(index, ids, 4, common=5).type.tolist() == [-1] * 4


def test_kurtosis_is_scipys():
    values = torch.tensor([1.0, 2.0, 4.0, 90.0])
    assert kurtosis(values) == pytest.approx(float(scipy_kurtosis(values.double().numpy(), fisher=False)))
    assert kurtosis(torch.ones(4)) is None
