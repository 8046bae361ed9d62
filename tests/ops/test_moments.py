"""Second moments of experts with many, few and no tokens."""

from __future__ import annotations

import pytest
import torch

from moecli.ops.moments import moments

C = 4


def sums(counts, seed=0):
    """x x^T summed over so many tokens of each expert."""
    rng = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(n, C, generator=rng, dtype=torch.float64) for n in counts]
    return torch.stack([x.T @ x for x in tokens]), torch.tensor(counts)


def test_each_rung_by_hand():
    counts = [8, 7, 1, 0]
    gram, count = sums(counts)
    pool = torch.diag(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    found = moments(gram.clone(), count, pool)
    assert (found.own, found.mixed, found.unseen) == (1, 2, 1)
    torch.testing.assert_close(found.value_ECC[0], gram[0] / 8)
    torch.testing.assert_close(found.value_ECC[1], 7 / 11 * gram[1] / 7 + 4 / 11 * pool)
    torch.testing.assert_close(found.value_ECC[2], 1 / 5 * gram[2] + 4 / 5 * pool)
    assert torch.equal(found.value_ECC[3], pool)


def test_without_a_pool_few_tokens_lean_on_equal_inputs():
    gram, count = sums([8, 2, 0])
    found = moments(gram.clone(), count)
    eye = torch.eye(C, dtype=torch.float64)
    level = gram[1].diagonal().mean() / 2
    torch.testing.assert_close(found.value_ECC[0], gram[0] / 8)
    torch.testing.assert_close(found.value_ECC[1], 2 / 6 * gram[1] / 2 + 4 / 6 * level * eye)
    assert torch.equal(found.value_ECC[2], eye)


def test_fewer_tokens_than_inputs_give_full_rank_all_the_same():
    gram, count = sums([1, 3])
    assert torch.linalg.matrix_rank(gram[0]) == 1
    for pool in (None, torch.eye(C, dtype=torch.float64)):
        assert torch.linalg.cholesky_ex(moments(gram.clone(), count, pool).value_ECC).info.eq(0).all()


def test_an_expert_whose_inputs_were_all_zero_has_the_identity_of_equal_inputs():
    found = moments(torch.zeros(1, C, C), torch.tensor([1]))
    torch.testing.assert_close(found.value_ECC[0], 4 / 5 * torch.eye(C))


def test_what_is_not_a_number_is_named():
    gram, count = sums([9, 9])
    gram[1, 0, 2] = torch.nan
    with pytest.raises(ValueError, match="inputs of expert 1 hold values that are not numbers"):
        moments(gram, count)
