"""Factors nearest on given inputs: against the whitened SVD with a Cholesky factor, and losses as dropped sigmas."""

from __future__ import annotations

import pytest
import torch

from moecli.ops.lowrank import Factored, truncated

SHAPES = [(5, 8), (8, 5), (6, 6)]


def case(outputs, inputs, experts=3, seed=0, rank=None):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, outputs, inputs, generator=rng, dtype=torch.float64)
    x = torch.randn(experts, rank or 4 * inputs, inputs, generator=rng, dtype=torch.float64)
    return weight, x.mT @ x / x.shape[1]


def svd_llm(weight, moment, rank):
    """Section 3.1 as it is written, for one matrix."""
    root = torch.linalg.cholesky(moment)
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank] @ torch.linalg.inv(root), s


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_is_the_whitened_svd(outputs, inputs, rank):
    weight, moment = case(outputs, inputs)
    found = truncated(weight, rank, moment)
    for e in range(3):
        wanted, sigma = svd_llm(weight[e], moment[e], rank)
        product = found.left_EOr[e] @ found.right_ErI[e]
        torch.testing.assert_close(product, wanted)
        missing = weight[e] - product
        loss = torch.trace(missing @ moment[e] @ missing.T)
        torch.testing.assert_close(loss, sigma[rank:].square().sum(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.lost_E[e], loss, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.total_E[e], sigma.square().sum())
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(found.left_EOr[e].T @ found.left_EOr[e], eye)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_full_rank_is_the_matrix_itself(outputs, inputs):
    weight, moment = case(outputs, inputs)
    for moments in (moment, None):
        found = truncated(weight, min(outputs, inputs), moments)
        torch.testing.assert_close(found.left_EOr @ found.right_ErI, weight)
        assert found.lost_E.abs().max() < 1e-9


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_without_inputs_it_is_the_plain_svd(outputs, inputs):
    weight, _ = case(outputs, inputs)
    found = truncated(weight, 2)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(found.left_EOr @ found.right_ErI, (u * s[:, None])[..., :2] @ vt[:, :2])


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_inputs_of_low_rank_are_no_special_case(outputs, inputs):
    """Two tokens for each expert: rank 2 loses nothing on them, and there is no Cholesky factor."""
    weight, moment = case(outputs, inputs, rank=2)
    assert torch.linalg.cholesky_ex(moment).info.ne(0).any()
    found = truncated(weight, 2, moment)
    missing = weight - found.left_EOr @ found.right_ErI
    assert ((missing @ moment) * missing).sum().abs() < 1e-9
    assert found.lost_E.abs().max() < 1e-9


def test_no_other_matrix_of_the_rank_is_nearer():
    weight, moment = case(6, 8, experts=1)
    found = truncated(weight, 2, moment)
    rng = torch.Generator().manual_seed(3)

    def loss(left, right):
        missing = weight[0] - left @ right
        return float(torch.trace(missing @ moment[0] @ missing.T))

    best = loss(found.left_EOr[0], found.right_ErI[0])
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            left, right = (
                value[0] + scale * torch.randn(value[0].shape, generator=rng, dtype=torch.float64)
                for value in (found.left_EOr, found.right_ErI)
            )
            assert loss(left, right) >= best


def test_one_moment_for_all_experts():
    weight, moment = case(5, 8)
    alike = truncated(weight, 2, moment[:1])
    torch.testing.assert_close(alike.left_EOr, truncated(weight, 2, moment[:1].expand(3, 8, 8)).left_EOr)


def test_everything_there_is_adds_up():
    rng = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, 3, 1, generator=rng), torch.randn(2, 1, 4, generator=rng)
    base, rows = torch.randn(3, 4, generator=rng), torch.randn(2, 2, 4, generator=rng)
    at = torch.tensor([[0, 2], [1, 1]])
    found = Factored(left, right, base, rows, at).expanded()
    for e in range(2):
        wanted = left[e] @ right[e] + base
        for n in range(2):
            wanted[at[e, n]] += rows[e, n]
        torch.testing.assert_close(found[e], wanted)
    half = Factored(left, right, base, rows, at).to(base.bfloat16())
    assert [v.dtype for v in half] == [torch.bfloat16] * 4 + [torch.int64]
    assert half.expanded().dtype == torch.bfloat16
