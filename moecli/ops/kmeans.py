"""K-means on a Gram matrix: exact Lloyd iterations in a space that only inner products are known of.

dist^2(i, m) = S_ii - 2/|C_m| sum_{j in C_m} S_ij + 1/|C_m|^2 sum_{j,l in C_m} S_jl, which is Euclidean K-means on
vectors with Gram matrix S. Sub-MoE (arXiv 2506.23266, Eq. 3) clusters experts so, S the mean cosine of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Clustering(NamedTuple):
    """Groups of N points and their cost."""

    group_N: Tensor
    """int64, numbered by each group's smallest member; every number below K is used"""
    cost: float
    """J: sum over points of the squared distance to the mean of their group"""


def kernel_kmeans(
    gram_NN: Tensor, groups: int, rng: torch.Generator, *, restarts: int = 10, rounds: int = 100
) -> Clustering:
    """The best of `restarts` runs from k-means++ seeds, each until nothing moves or for `rounds` iterations.

    A group that loses its last member is given the point farthest from its own mean. All restarts run side by side.
    """
    gram = gram_NN.double()
    gram = (gram + gram.T) / 2
    if groups >= len(gram):
        return Clustering(torch.arange(len(gram)), 0.0)
    seed_RK = _seeds(gram, groups, rng, restarts)
    diagonal_N = gram.diagonal()
    group_RN = (diagonal_N[None, :, None] - 2 * gram[:, seed_RK].movedim(1, 0) + diagonal_N[seed_RK][:, None]).argmin(
        -1
    )
    group_RN.scatter_(1, seed_RK, torch.arange(groups).expand_as(seed_RK))
    for _ in range(rounds):
        moved_RN = _filled(_distances(gram, group_RN, groups))
        if torch.equal(moved_RN, group_RN):
            break
        group_RN = moved_RN
    cost_R = torch.stack([cost(gram, group_N) for group_N in group_RN])
    best = int(cost_R.argmin())
    return Clustering(renumbered(group_RN[best]), float(cost_R[best]))


def cost(gram_NN: Tensor, group_N: Tensor) -> Tensor:
    """sum_m sum_{i in C_m} |v_i - mean_m|^2 of vectors with this Gram matrix, float64 []."""
    one_NK = torch.nn.functional.one_hot(group_N).double()
    inside_K = ((gram_NN.double() @ one_NK) * one_NK).sum(0)
    return gram_NN.double().diagonal().sum() - (inside_K / one_NK.sum(0).clamp(min=1)).sum()


def renumbered(group_N: Tensor) -> Tensor:
    """The same groups, numbered by their smallest member."""
    number: dict[int, int] = {}
    return torch.tensor([number.setdefault(g, len(number)) for g in group_N.tolist()])


def _seeds(gram: Tensor, groups: int, rng: torch.Generator, restarts: int) -> Tensor:
    """k-means++: the chance of each next seed goes with its squared distance from those chosen. int64 [R, K]"""
    diagonal_N = gram.diagonal()
    seed_RK = torch.empty(restarts, groups, dtype=torch.int64)
    seed_RK[:, 0] = torch.randint(len(gram), (restarts,), generator=rng)
    nearest_RN = torch.full((restarts, len(gram)), torch.inf, dtype=torch.float64)
    free_RN = torch.ones_like(nearest_RN)
    for at in range(1, groups):
        last_R = seed_RK[:, at - 1]
        nearest_RN = nearest_RN.minimum((diagonal_N + diagonal_N[last_R][:, None] - 2 * gram[last_R]).clamp_(min=0))
        free_RN.scatter_(1, last_R[:, None], 0.0)
        chance_RN = nearest_RN * free_RN
        chance_RN = torch.where(chance_RN.sum(1, keepdim=True) > 0, chance_RN, free_RN)
        seed_RK[:, at] = torch.multinomial(chance_RN, 1, generator=rng)[:, 0]
    return seed_RK


def _distances(gram: Tensor, group_RN: Tensor, groups: int) -> Tensor:
    """Squared distance of every point to every mean, [R, N, K]; inf to the mean of an empty group."""
    one_RNK = torch.nn.functional.one_hot(group_RN, groups).double()
    size_RK = one_RNK.sum(1)
    product_RNK = gram @ one_RNK
    inside_RK = (product_RNK * one_RNK).sum(1)
    share_RK = 1 / size_RK.clamp(min=1)
    distance = gram.diagonal()[:, None] - 2 * product_RNK * share_RK[:, None] + (inside_RK * share_RK**2)[:, None]
    return distance.masked_fill(size_RK[:, None] == 0, torch.inf)


def _filled(distance_RNK: Tensor) -> Tensor:
    """The nearest mean of each point; then every empty group takes the farthest point of a group with others."""
    group_RN = distance_RNK.argmin(-1)
    groups = distance_RNK.shape[-1]
    for group_N, distance_NK in zip(group_RN, distance_RNK, strict=True):
        size_K = torch.bincount(group_N, minlength=groups)
        for empty in (size_K == 0).nonzero().flatten():
            own_N = distance_NK.gather(1, group_N[:, None])[:, 0].masked_fill(size_K[group_N] == 1, -torch.inf)
            far = own_N.argmax()
            size_K[group_N[far]] -= 1
            size_K[empty] += 1
            group_N[far] = empty
    return group_RN


class CostCurve:
    """J(k) of one set of points, non-increasing in k, made from the largest k down as far as it is asked for."""

    def __init__(self, gram_NN: Tensor, cluster: Callable[[Tensor, int], Clustering]) -> None:
        self._gram, self._cluster = gram_NN, cluster
        self._made: dict[int, Clustering] = {}

    def clustering(self, groups: int) -> Clustering:
        if groups not in self._made:
            self._made[groups] = self._cluster(self._gram, groups)
        return self._made[groups]

    def cost(self, groups: int) -> float:
        """The cost of `groups` groups, at least that of any larger number asked for: K-means may miss the best."""
        own = self.clustering(groups).cost
        return max([own, *(found.cost for more, found in self._made.items() if more > groups)])
