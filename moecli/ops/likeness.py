"""How alike experts are, from inner products alone, and the groups that REAM (arXiv 2604.04356, section 3) makes."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(gram_EE: Tensor) -> Tensor:
    """Euclidean distances between vectors with this Gram matrix, float64, zero diagonal."""
    square_E = gram_EE.diagonal()
    distance = (square_E[:, None] + square_E - gram_EE - gram_EE.T).clamp(min=0).sqrt()
    return distance.fill_diagonal_(0)


def unit_gram(gram_EE: Tensor) -> Tensor:
    """Cosines from inner products; a vector of length 0 has cosine 0 with all others."""
    length_E = gram_EE.double().diagonal().sqrt()
    cosine = gram_EE.double() / (length_E[:, None] * length_E).clamp(min=torch.finfo(torch.float64).tiny)
    return cosine.fill_diagonal_(1)


def saliency(gean_sum_E: Tensor, count_E: Tensor) -> Tensor:
    """REAP's score, and for experts without any the smallest that is not 0, at most 0.5. float64 [E], positive unless
    no expert has any.
    """
    mean_E = gean_sum_E / count_E.clamp(min=1)
    seen = mean_E[mean_E > 0]
    least = min(0.5, float(seen.min())) if len(seen) else 0.0
    return torch.where(mean_E > 0, mean_E, least)


def similarity(gy_mean_ED: Tensor, logit_gram_EE: Tensor) -> Tensor:
    """1/2 (cos(o_i, o_j) + 1)/2 + 1/2 (1 - D_ij/max D), o the weighted mean outputs, D the distance between columns of
    router logits of length 1. float64 [E, E] in [0, 1].
    """
    output_EE = unit_gram(gy_mean_ED @ gy_mean_ED.T)
    distance_EE = distances(unit_gram(logit_gram_EE))
    return 0.5 * (output_EE + 1) / 2 + 0.5 * (1 - distance_EE / distance_EE.max().clamp(min=1e-30))


def pseudo_pruned(similarity_NN: Tensor, saliency_N: Tensor, keep: int, limit: int) -> tuple[Tensor, Tensor]:
    """Groups of at most `limit` around the `keep` most salient: (group_N int64, lead_K int64). In falling order of
    saliency each takes the most similar experts that are left; ties go to the lower index.
    """
    lead_K = torch.argsort(saliency_N, descending=True, stable=True)[:keep]
    group_N = torch.full((len(saliency_N),), -1, dtype=torch.int64)
    group_N[lead_K] = torch.arange(keep)
    for group, lead in enumerate(lead_K.tolist()):
        left = (group_N < 0).nonzero().flatten()
        taken = torch.argsort(similarity_NN[lead, left], descending=True, stable=True)[: limit - 1]
        group_N[left[taken]] = group
    return group_N, lead_K
