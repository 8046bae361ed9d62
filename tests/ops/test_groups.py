"""Choosing, clustering and averaging experts, with toy numbers and plain oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.core.artifacts import DROPPED, LayerPlan
from moecli.ops.averaging import mixed, share_matrix, shares
from moecli.ops.linkage import agglomerate, pairwise
from moecli.ops.select import keep_best, keep_only


def test_ties_keep_the_lower_index():
    assert keep_best(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2) == [0, 1]


def test_each_routing_group_keeps_its_own_best():
    assert keep_best(torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 2, groups=2) == [0, 5]


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="score of expert 1 is NaN"):
        keep_best(torch.tensor([1.0, float("nan")]), 1)


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12), st.data())
def test_no_dropped_expert_beats_a_kept_one(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    kept = keep_best(torch.tensor(scores, dtype=torch.float64), keep)
    assert len(kept) == keep == len(set(kept))
    worst = min((scores[i], -i) for i in kept)
    assert all((scores[i], -i) < worst for i in range(len(scores)) if i not in kept)


def test_keep_only_is_a_plan_of_single_members():
    plan = keep_only([1, 3], of=4)
    assert plan.group_E.tolist() == [DROPPED, 0, DROPPED, 1]
    assert plan.share_E.tolist() == [0, 1, 0, 1]
    assert plan.lead_K.tolist() == [1, 3]


FAR = {"average": np.mean, "single": np.min, "complete": np.max}
"""How far two clusters are, from all original pairwise distances between their members."""


def merge_by_hand(points, clusters, linkage):
    """Agglomeration, the slow way: the two nearest clusters are joined, whatever makes them far."""
    groups = [[i] for i in range(len(points))]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    while len(groups) > clusters:
        pairs = [(FAR[linkage](distance[np.ix_(a, b)]), i, j)
                 for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j]  # fmt: skip
        _, i, j = min(pairs)
        groups[i] += groups.pop(j)
    return {frozenset(g) for g in groups}


@pytest.mark.parametrize("linkage", FAR)
@pytest.mark.parametrize("clusters", [1, 3, 7, 10])
def test_linkage_equals_merging_by_hand(clusters, linkage):
    points = torch.randn(10, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    group, _ = agglomerate(pairwise(points, "euclidean"), clusters, linkage)
    found = {frozenset((group == g).nonzero().flatten().tolist()) for g in range(clusters)}
    assert found == merge_by_hand(points.numpy(), clusters, linkage)


def test_ties_still_give_exactly_the_asked_number_of_clusters():
    group, _ = agglomerate(pairwise(torch.zeros(6, 3), "euclidean"), 4)
    assert sorted(set(group.tolist())) == [0, 1, 2, 3]


def test_cosine_distance_ignores_length_and_survives_a_zero_row():
    distance = pairwise(torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), "cosine")
    assert distance[0].tolist() == pytest.approx([0, 0, 1, 1])


def test_a_group_nobody_used_is_averaged_evenly():
    share = shares(torch.tensor([0, 0, 3, 1]), torch.tensor([0, 0, 1, 1]), 2)
    assert share.tolist() == [0.5, 0.5, 0.75, 0.25]


def test_dropped_experts_have_no_share():
    assert shares(torch.tensor([2, 5]), torch.tensor([0, -1]), 1).tolist() == [1, 0]


def test_mixed_is_the_sum_of_shares_times_weights(monkeypatch):
    weight = torch.tensor([[[2.0, 4.0]], [[6.0, 0.0]], [[1.0, 1.0]]])
    share = share_matrix(torch.tensor([0.25, 0.75, 1.0]), torch.tensor([1, 1, 0]), 2)
    assert share.tolist() == [[0, 0, 1], [0.25, 0.75, 0]]
    assert mixed(weight, share).tolist() == [[[1.0, 1.0]], [[5.0, 1.0]]]
    monkeypatch.setattr("moecli.ops.averaging.CHUNK_BYTES", 1)
    assert mixed(weight, share).tolist() == [[[1.0, 1.0]], [[5.0, 1.0]]]


def test_dropped_experts_are_mixed_into_nothing():
    assert share_matrix(torch.tensor([1.0, 0.0]), torch.tensor([0, -1]), 1).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("group", "share", "lead", "message"),
    [
        ([0, 2], [1, 1], [0, 1], "group_E must use every group"),
        ([0, 0], [0.5, 0.2], [0], "shares of a group must sum to 1"),
        ([0, DROPPED], [1, 0.5], [0], "a dropped expert must have share 0"),
        ([0, 1], [1, 1], [1, 0], "each lead must be a member of its own group"),
    ],
)
def test_plans_check_themselves(group, share, lead, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan(torch.tensor(group), torch.tensor(share, dtype=torch.float32), torch.tensor(lead))
