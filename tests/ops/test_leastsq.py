"""Streaming ridge regression against one least-squares call on the stacked system."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.leastsq import NormalEquations


def data(problems=2, tokens=30, features=4, outputs=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    p = torch.randn(problems, tokens, features, generator=rng, dtype=torch.float64)
    y = torch.randn(problems, tokens, outputs, generator=rng, dtype=torch.float64)
    prior = torch.randn(problems, outputs, features, generator=rng, dtype=torch.float64)
    return p, y, prior


def solved(p, y, prior, ridge, chunk):
    equations = NormalEquations(len(p), p.shape[-1], y.shape[-1])
    for some_p, some_y in zip(p.split(chunk, 1), y.split(chunk, 1), strict=True):
        equations.add(some_p, some_y)
    return equations.solve(prior, ridge)


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_it_is_the_least_squares_solution_of_the_stacked_system(ridge):
    p, y, prior = data()
    found = solved(p, y, prior, ridge, chunk=7)
    for k in range(2):
        weight = (ridge * p[k].square().sum(0).mean()).sqrt()
        stacked_p = torch.cat((p[k], weight * torch.eye(4, dtype=torch.float64)))
        stacked_y = torch.cat((y[k], weight * prior[k].T))
        expected = torch.linalg.lstsq(stacked_p, stacked_y).solution.T
        assert torch.allclose(found[k], expected, atol=1e-10)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.integers(1, 30))
def test_chunks_do_not_matter(seed, chunk):
    p, y, prior = data(seed=seed)
    assert torch.allclose(solved(p, y, prior, 0.01, chunk), solved(p, y, prior, 0.01, 30), atol=1e-9)


def test_without_tokens_the_prior_stays():
    p, y, prior = data()
    assert torch.allclose(solved(p * 0, y * 0, prior, 1e-4, 30), prior)


def test_an_exact_map_is_found():
    p, _, prior = data(tokens=50)
    assert torch.allclose(solved(p, p @ prior.mT, prior * 0, 1e-12, 50), prior, atol=1e-8)
