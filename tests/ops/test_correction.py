"""Low-rank corrections against the singular value decomposition in the whitened space, matrix by matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.correction import correction, output_energy, output_moment, pooled


def data(experts=3, rows=10, columns=7, tokens=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lost = torch.randn(experts, rows, columns, generator=rng, dtype=torch.float64)
    x = torch.randn(experts, tokens, columns, generator=rng, dtype=torch.float64)
    return lost, x * torch.linspace(0.1, 3, columns, dtype=torch.float64)


def error(lost, found, x):
    """Sum over inputs of the squared output error, the slow way."""
    total = []
    for dw, b, a, inputs in zip(lost, found.b_ERr, found.a_ErC, x, strict=True):
        total.append(sum(float(((dw - b @ a) @ token).square().sum()) for token in inputs))
    return torch.tensor(total, dtype=torch.float64)


def best(dw, x, rank):
    """EoRA as published: svd of dW Q Lambda^1/2, cut, and multiplied by Lambda^-1/2 Q^T. numpy, one matrix."""
    values, vectors = np.linalg.eigh(x.T @ x)
    u, s, vt = np.linalg.svd(dw @ vectors * np.sqrt(values), full_matrices=False)
    product = (u[:, :rank] * s[:rank]) @ (vt[:rank] / np.sqrt(values)) @ vectors.T
    return product, (s[rank:] ** 2).sum()


@pytest.mark.parametrize(("rows", "columns"), [(10, 7), (7, 10), (8, 8)])
def test_the_product_and_its_loss_are_those_of_the_published_form(rows, columns):
    lost, x = data(rows=rows, columns=columns)
    found = correction(lost, x.mT @ x, 3)
    for e in range(len(lost)):
        product, least = best(lost[e].numpy(), x[e].numpy(), 3)
        np.testing.assert_allclose((found.b_ERr[e] @ found.a_ErC[e]).numpy(), product, atol=1e-9)
        np.testing.assert_allclose(float(found.after_E[e]), least, rtol=1e-9)
    torch.testing.assert_close(error(lost, found, x), found.after_E, rtol=1e-9, atol=0)
    nothing = found._replace(b_ERr=0 * found.b_ERr)
    torch.testing.assert_close(error(lost, nothing, x), found.before_E, rtol=1e-9, atol=0)


def test_a_diagonal_moment_is_the_scaled_decomposition():
    """LQER and SLiM: svd of dW diag(s), cut, and divided by s."""
    lost, x = data()
    scale_EC = x.abs().mean(1)
    found = correction(lost, scale_EC.square(), 2)
    full = correction(lost, torch.diag_embed(scale_EC.square()), 2)
    for e in range(len(lost)):
        u, s, vt = np.linalg.svd(lost[e].numpy() * scale_EC[e].numpy(), full_matrices=False)
        wanted = (u[:, :2] * s[:2]) @ vt[:2] / scale_EC[e].numpy()
        np.testing.assert_allclose((found.b_ERr[e] @ found.a_ErC[e]).numpy(), wanted, atol=1e-9)
    torch.testing.assert_close(found.b_ERr @ found.a_ErC, full.b_ERr @ full.a_ErC)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_never_worse_than_the_plain_decomposition_nor_than_nothing(rows, columns, rank, tokens, seed):
    """Also where fewer tokens came than there are inputs, and the moment has no inverse."""
    lost, x = data(2, rows, columns, tokens, seed)
    moment = x.mT @ x
    found = correction(lost, moment, rank)
    u, s, vt = torch.linalg.svd(lost, full_matrices=False)
    plain = found._replace(b_ERr=u[..., :rank] * s[:, None, :rank], a_ErC=vt[:, :rank])
    mine, floor = error(lost, found, x), 1e-9 * (1 + found.before_E)
    assert (mine <= error(lost, plain, x) + floor).all()
    assert (mine <= found.before_E + floor).all()
    assert torch.isfinite(found.a_ErC).all()


@pytest.mark.parametrize(("rows", "columns"), [(10, 7), (7, 10)])
def test_full_rank_gives_the_weight_back(rows, columns):
    lost, x = data(rows=rows, columns=columns, tokens=3)
    found = correction(lost, x.mT @ x, min(rows, columns) + 5)
    assert found.b_ERr.shape == (3, rows, 7) and found.a_ErC.shape == (3, 7, columns)
    torch.testing.assert_close(found.b_ERr @ found.a_ErC, lost)
    assert (found.after_E <= 1e-9 * found.before_E).all()


def test_nothing_near_the_factors_is_better():
    lost, x = data(1)
    found = correction(lost, x.mT @ x, 2)
    rng, least = torch.Generator().manual_seed(1), error(lost, found, x)
    for _ in range(50):
        moved = [
            value + 1e-3 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
            for value in (found.b_ERr, found.a_ErC)
        ]
        assert error(lost, found._replace(b_ERr=moved[0], a_ErC=moved[1]), x) > least


def test_energy_is_the_squared_output():
    weight, x = data(2)
    wanted = (x @ weight.mT).square().sum((1, 2))
    torch.testing.assert_close(output_energy(weight, x.mT @ x), wanted)
    torch.testing.assert_close(output_moment(weight, x.mT @ x).diagonal(dim1=1, dim2=2).sum(-1), wanted)
    diagonal = x.square().sum(1)
    torch.testing.assert_close(output_energy(weight, diagonal), (weight.square() * diagonal[:, None]).sum((1, 2)))


def test_the_ladder_for_experts_with_few_tokens():
    rng = torch.Generator().manual_seed(0)
    count = torch.tensor([400, 300, 256, 255, 32, 31, 0])
    mean = torch.rand(len(count), 1200, generator=rng, dtype=torch.float64)
    for own in (mean, torch.diag_embed(mean[:, :8])):
        total = own * count.view(-1, *([1] * (own.dim() - 1)))
        found, names = pooled(total, count)
        quarter = own.shape[-1] / 4
        pool = total.sum(0) / 1274
        for e, n in enumerate(count.tolist()):
            wanted = "own" if n >= max(quarter, 256) else "mixed" if n >= 32 else "pooled"
            share = {"own": 1, "mixed": n / (n + quarter), "pooled": 0}[wanted]
            assert names[e] == wanted
            torch.testing.assert_close(found[e], share * own[e] + (1 - share) * pool)


def test_moments_that_are_not_finite_or_zero_count_every_input_the_same_and_spoil_no_other():
    total = torch.ones(3, 4, 4) * 500
    total[1, 0, 0] = float("nan")
    total[2] = 0
    found, names = pooled(total, torch.tensor([500, 500, 500]))
    assert names == ["own", "plain", "plain"]
    assert torch.equal(found[0], torch.ones(4, 4).double())
    assert torch.equal(found[1], torch.eye(4).double()) and torch.equal(found[2], torch.eye(4).double())
