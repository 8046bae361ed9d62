"""Router fits are minima of what they say they minimise."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from moecli.ops.rowfit import fit_rows, grouped_lse, grouped_max, grouped_sum, grouped_total

GROUP = torch.tensor([0, 1, 0, 2, 1])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_groups_of_logits_scores_and_slots():
    z = torch.randn(6, 5, generator=rng())
    for t in range(6):
        for m in range(3):
            members = [e for e in range(5) if GROUP[e] == m]
            assert grouped_lse(z, GROUP, 3)[t, m] == pytest.approx(float(z[t, members].exp().sum().log()), rel=1e-5)
            assert grouped_max(z, GROUP, 3)[t, m] == z[t, members].max()
            assert grouped_total(z, GROUP, 3)[t, m] == pytest.approx(float(z[t, members].sum()), rel=1e-4, abs=1e-6)


def test_two_slots_on_one_group_add_up():
    weight, expert = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0, 2, 4]])
    assert grouped_sum(weight, expert, GROUP, 3)[0].tolist() == pytest.approx([0.8, 0.2, 0.0])


def loss(rows, x, target, start, scale, softmax):
    """The objective, token by token, in float64"""
    logits = x @ rows.T
    if softmax:
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        data = -(target * log_p).sum(1).mean()
    else:
        data = (np.log1p(np.exp(logits)) - target * logits).sum(1).mean()
    return data + scale / 2 * ((rows - start) ** 2).sum()


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_the_fit_is_the_minimum_that_scipy_finds(softmax, ridge):
    x = torch.randn(80, 4, generator=rng(1))
    target = torch.rand(80, 3, generator=rng(2))
    target = target / target.sum(1, keepdim=True) if softmax else target
    start = torch.randn(3, 4, generator=rng(3))
    scale = ridge * float(x.square().mean())
    found = fit_rows(x, target, start, softmax=softmax, ridge=ridge, rounds=400).double().numpy()
    arrays = [v.double().numpy() for v in (x, target, start)]
    best = minimize(lambda w: loss(w.reshape(3, 4), *arrays, scale, softmax), arrays[2].ravel(), method="BFGS")
    assert loss(found, *arrays, scale, softmax) == pytest.approx(best.fun, abs=1e-6)
    assert np.abs(found - best.x.reshape(3, 4)).max() < 2e-2


def test_fixed_rows_stay_and_the_others_are_fitted_around_them():
    x = torch.randn(80, 4, generator=rng(1))
    target = torch.rand(80, 3, generator=rng(2)).softmax(-1)
    start = torch.randn(3, 4, generator=rng(3))
    free = torch.tensor([False, True, False])
    found = fit_rows(x, target, start, softmax=True, ridge=1e-3, free_K=free, rounds=400)
    assert torch.equal(found[~free], start[~free])
    scale, arrays = 1e-3 * float(x.square().mean()), [v.double().numpy() for v in (x, target, start)]

    def with_row(row):
        rows = arrays[2].copy()
        rows[1] = row
        return loss(rows, *arrays, scale, True)

    best = minimize(with_row, arrays[2][1], method="BFGS")
    assert with_row(found[1].double().numpy()) == pytest.approx(best.fun, abs=1e-6)


def test_a_router_that_gives_the_target_already_stays():
    x, start = torch.randn(50, 4, generator=rng(1)), torch.randn(3, 4, generator=rng(3))
    found = fit_rows(x, (x @ start.T).softmax(-1), start, softmax=True, ridge=1e-3)
    assert torch.allclose(found, start, atol=1e-5)


def test_a_strong_ridge_keeps_the_start():
    x, start = torch.randn(50, 4, generator=rng(1)), torch.randn(3, 4, generator=rng(3))
    target = torch.rand(50, 3, generator=rng(2)).softmax(-1)
    assert torch.allclose(fit_rows(x, target, start, softmax=True, ridge=1e6), start, atol=1e-4)
