"""Agglomerative clustering of experts through SciPy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Linkage = Literal["average", "single", "complete"]
Metric = Literal["euclidean", "cosine"]


def pairwise(points_ED: Tensor, metric: Metric) -> Tensor:
    """Distances between rows, float64 [E, E], symmetric with a zero diagonal. Cosine distance of a zero row is 1."""
    points = points_ED.double()
    if metric == "cosine":
        unit = torch.nn.functional.normalize(points, dim=-1)
        distance = (1 - unit @ unit.T).clamp(min=0)
    else:
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distance = (distance + distance.T) / 2
    return distance.fill_diagonal_(0)


def agglomerate(distance_EE: Tensor, clusters: int, linkage: Linkage = "average") -> tuple[Tensor, Tensor]:
    """Cut a dendrogram at `clusters` groups: (group_E int64, linkage matrix float64 [E-1, 4] as SciPy defines it).

    Groups are numbered by their smallest member. Exactly `clusters` groups come out, also when distances tie:
    the first E - clusters merges of the linkage matrix are taken.
    """
    from scipy.cluster.hierarchy import linkage as scipy_linkage
    from scipy.spatial.distance import squareform

    experts = len(distance_EE)
    if experts == 1:
        return torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.float64)
    tree = scipy_linkage(squareform(distance_EE.numpy(), checks=False), method=linkage)
    members = {index: [index] for index in range(experts)}
    for step in range(experts - clusters):
        left, right = int(tree[step, 0]), int(tree[step, 1])
        members[experts + step] = members.pop(left) + members.pop(right)
    group_E = torch.empty(experts, dtype=torch.int64)
    for number, group in enumerate(sorted(members.values(), key=min)):
        group_E[group] = number
    return group_E, torch.from_numpy(tree)
