"""Sub-MoE's union decomposition, written out as the paper has it, against the short form."""

import pytest
import torch

from moecli.ops.lowrank import output_gram, projected, rank_at


def group(members=3, outputs=6, inputs=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(members, outputs, inputs, generator=rng, dtype=torch.float64)
    root = torch.randn(members, inputs, 20, generator=rng, dtype=torch.float64)
    share = torch.rand(members, generator=rng, dtype=torch.float64)
    return weight, root @ root.mT, share / share.sum()


def test_the_untruncated_union_is_the_weighted_average():
    """Eqs. 7-8: one U for all, V_i averaged."""
    weight, _, share = group()
    u, s, vt = torch.linalg.svd(torch.cat(list(weight), 1), full_matrices=False)
    mean_v = sum(share[i] * vt[:, 5 * i : 5 * (i + 1)] for i in range(3))
    average = torch.einsum("i,ioj->oj", share, weight)
    assert (u @ torch.diag(s) @ mean_v - average).abs().max() < 1e-10
    u, s, vt = torch.linalg.svd(torch.cat(list(weight), 0), full_matrices=False)  # the other axis: one V for all
    mean_u = sum(share[i] * u[6 * i : 6 * (i + 1)] for i in range(3))
    assert (mean_u @ torch.diag(s) @ vt - average).abs().max() < 1e-10


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_truncated_union_is_the_average_in_the_leading_output_directions(rank):
    """Eqs. 9-12: whitened members, V'_i^T S_i^{-1} averaged, r singular values kept."""
    weight, moment, share = group()
    roots = [torch.linalg.cholesky(c) for c in moment]
    u, s, vt = torch.linalg.svd(torch.cat([w @ r for w, r in zip(weight, roots, strict=True)], 1), full_matrices=False)
    right = sum(share[i] * vt[:, 5 * i : 5 * (i + 1)] @ torch.linalg.inv(roots[i]) for i in range(3))
    expected = u[:, :rank] @ torch.diag(s[:rank]) @ right[:rank]
    average = torch.einsum("i,ioj->oj", share, weight)
    found = projected(average[None], output_gram(weight, moment).sum(0)[None], rank)[0]
    assert (found - expected).abs().max() < 1e-10


def test_ranks_count_the_numbers_of_both_factors():
    assert rank_at(0.5, 768, 2048) == 279
    assert 279 * (768 + 2048) <= 0.5 * 768 * 2048 < 280 * (768 + 2048)
    assert rank_at(0.001, 4, 4) == 1
