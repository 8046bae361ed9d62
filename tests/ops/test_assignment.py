"""Matching neurons: the best of all orders, and outputs that do not notice."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.core.artifacts import ExpertWeights
from moecli.ops.assignment import activation_distance, aligned, matched, reordered, weight_distance, weight_products


def experts(count, width=4, hidden=3, seed=0, biases=False):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(count, width, hidden)] * 2 + [(count, hidden, width)]
    shapes += [(count, width), (count, width), (count, hidden)] if biases else []
    return ExpertWeights(*(torch.randn(shape, generator=rng) for shape in shapes))


def output(w, e, x):
    gate, up = x @ w.gate_FD[e].T, x @ w.up_FD[e].T
    if w.gate_bias_F is not None:
        gate, up = gate + w.gate_bias_F[e], up + w.up_bias_F[e]
    y = (torch.nn.functional.silu(gate) * up) @ w.down_DF[e].T
    return y if w.down_bias_D is None else y + w.down_bias_D[e]


def objective(lead, member, order):
    """sum over neurons of the products of matched rows, one pair at a time"""
    return sum(
        float(lead.gate_FD[r] @ member.gate_FD[s] + lead.up_FD[r] @ member.up_FD[s]
              + lead.down_DF[:, r] @ member.down_DF[:, s])
        for r, s in enumerate(order)
    )  # fmt: skip


def one(w, e):
    return ExpertWeights(*(None if part is None else part[e] for part in w))


def test_the_order_is_the_best_of_all():
    w = experts(2)
    (order,) = matched(weight_products(one_row(w, 0), one_row(w, 1)))
    lead, member = one(w, 0), one(w, 1)
    best = max(permutations(range(4)), key=lambda p: objective(lead, member, p))
    assert tuple(order.tolist()) == best


def one_row(w, e):
    return ExpertWeights(*(None if part is None else part[e : e + 1] for part in w))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_alignment_changes_no_output_and_never_matches_worse(seed, biases, by_activations):
    w = experts(4, seed=seed, biases=biases)
    lead_E = torch.tensor([0, 0, 2, 0])
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed + 1))
    inner = (
        (lambda some: torch.nn.functional.silu(x @ some.gate_FD.mT) * (x @ some.up_FD.mT)) if by_activations else None
    )
    found = aligned(w, lead_E, inner)
    for e in range(4):
        assert torch.allclose(output(found, e, x), output(w, e, x), atol=1e-5)
    same = list(range(4))
    for e in (1, 3):
        if inner is None:
            assert objective(one(w, 0), one(found, e), same) >= objective(one(w, 0), one(w, e), same) - 1e-5
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, w, strict=True) if a is not None)


@pytest.mark.parametrize("by_activations", [False, True])
def test_a_shuffled_copy_is_put_back(by_activations):
    w = experts(1, width=6, hidden=5)
    order = torch.tensor([[3, 1, 5, 0, 2, 4]])
    both = ExpertWeights(
        *(None if a is None else torch.cat((a, b)) for a, b in zip(w, reordered(w, order), strict=True))
    )
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    inner = (lambda some: torch.relu(x @ some.gate_FD.mT) * (x @ some.up_FD.mT)) if by_activations else None
    found = aligned(both, torch.tensor([0, 0]), inner)
    assert all(torch.equal(part[1], part[0]) for part in found if part is not None)


def test_distances_are_those_of_unit_rows():
    w = experts(2, width=3)
    rows = [torch.cat((w.gate_FD[e], w.up_FD[e], w.down_DF[e].T), 1) for e in (0, 1)]
    unit = [r / r.norm(dim=1, keepdim=True) for r in rows]
    expected = torch.tensor([[float((a - b).norm()) for b in unit[1]] for a in unit[0]])
    assert torch.allclose(weight_distance(one_row(w, 0), one_row(w, 1))[0], expected, atol=1e-5)
    acts = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    unit = [a.T / a.T.norm(dim=1, keepdim=True) for a in acts]
    expected = torch.tensor([[float((a - b).norm()) for b in unit[1]] for a in unit[0]])
    assert torch.allclose(activation_distance(acts[:1], acts[1:])[0], expected, atol=1e-5)


def test_a_neuron_that_never_fires_is_as_far_from_all():
    acts = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    assert activation_distance(acts, acts)[0, 1].tolist() == pytest.approx([2**0.5, 2**0.5])
