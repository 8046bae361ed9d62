"""K-means that sees inner products only, against K-means on the vectors themselves."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops import kmeans
from moecli.ops.kmeans import CostCurve, cost, kernel_kmeans, renumbered


def points(count=9, dims=4, seed=0):
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit_cost(vectors, group):
    """sum over points of the squared distance to their group's mean"""
    return sum(
        float((vectors[group == g] - vectors[group == g].mean(0)).square().sum()) for g in set(group.tolist())
    )  # fmt: skip


def lloyd(vectors, group, rounds=100):
    """Plain Lloyd from a given grouping; None when a group runs empty."""
    groups = int(group.max()) + 1
    for _ in range(rounds):
        if len(set(group.tolist())) < groups:
            return None
        means = torch.stack([vectors[group == g].mean(0) for g in range(groups)])
        moved = ((vectors[:, None] - means[None]) ** 2).sum(-1).argmin(1)
        if torch.equal(moved, group):
            return group
        group = moved
    return group


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_iterations_are_lloyds_on_the_vectors(seed, groups):
    """Same seeds, same path: one run from the same first assignment ends in the same groups."""
    vectors = torch.nn.functional.normalize(points(12, 5, seed), dim=-1)
    gram = vectors @ vectors.T
    rng = torch.Generator().manual_seed(seed)
    (seeds,) = kmeans._seeds(gram, groups, torch.Generator().manual_seed(seed), 1)
    first = ((vectors[:, None] - vectors[seeds][None]) ** 2).sum(-1).argmin(1)
    first[seeds] = torch.arange(groups)
    expected = lloyd(vectors, first)
    found = kernel_kmeans(gram, groups, rng, restarts=1)
    if expected is not None:
        assert found.group_N.tolist() == renumbered(expected).tolist()
    assert found.cost == pytest.approx(explicit_cost(vectors, found.group_N), abs=1e-9)
    assert sorted(set(found.group_N.tolist())) == list(range(groups))


def test_distances_to_means_are_the_explicit_ones():
    vectors, group = points(), torch.tensor([0, 1, 0, 2, 2, 1, 0, 2, 1])
    means = torch.stack([vectors[group == g].mean(0) for g in range(3)])
    expected = ((vectors[:, None] - means[None]) ** 2).sum(-1)
    found = kmeans._distances(vectors @ vectors.T, group[None], 3)[0]
    assert (found - expected).abs().max() < 1e-10
    assert float(cost(vectors @ vectors.T, group)) == pytest.approx(explicit_cost(vectors, group), abs=1e-10)


def test_restarts_find_the_best_partition_of_few_points():
    vectors = points(7, 3, 4)
    best = min(explicit_cost(vectors, torch.tensor(g)) for g in product(range(3), repeat=7) if len(set(g)) == 3)
    found = kernel_kmeans(vectors @ vectors.T, 3, torch.Generator().manual_seed(0), restarts=30)
    assert found.cost == pytest.approx(best)


def test_equal_points_still_make_as_many_groups_as_asked():
    found = kernel_kmeans(torch.ones(6, 6), 4, torch.Generator().manual_seed(0))
    assert sorted(set(found.group_N.tolist())) == [0, 1, 2, 3]
    assert found.cost == pytest.approx(0)


def test_an_empty_group_takes_the_farthest_point():
    distance = torch.tensor([[[0.0, 9.0, torch.inf], [5.0, 9.0, torch.inf], [9.0, 0.0, torch.inf]]])
    assert kmeans._filled(distance).tolist() == [[0, 2, 1]]


def test_as_many_groups_as_points_cost_nothing():
    assert kernel_kmeans(points() @ points().T, 9, torch.Generator()).group_N.tolist() == list(range(9))


def test_a_cost_curve_never_rises_with_more_groups():
    vectors = points(10)

    def cluster(gram, groups):
        """The worst of clusterings for 5: everything in one group but four."""
        if groups == 5:
            group = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3, 4])
            return kmeans.Clustering(group, float(cost(gram, group)))
        return kernel_kmeans(gram, groups, torch.Generator().manual_seed(0))

    curve = CostCurve(vectors @ vectors.T, cluster)
    costs = [curve.cost(k) for k in range(10, 0, -1)]
    assert costs == sorted(costs) and costs[0] == 0


def test_groups_are_numbered_by_their_smallest_member():
    assert renumbered(torch.tensor([4, 2, 4, 0])).tolist() == [0, 1, 0, 2]
