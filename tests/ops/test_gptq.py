"""Batched GPTQ against one matrix at a time, written from the paper."""

import pytest
import torch

from moecli.ops.gptq import DAMPS, factor, pull, solve
from moecli.ops.pack import dequantize, group_scale, quantize_rtn

E, R, C, G = 3, 20, 160, 32


def inputs(seed, tokens=400, scale=True):
    """Weights, correlated inputs and their Hessians."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(E, R, C, generator=rng)
    mix = torch.randn(E, C, C, generator=rng) * (torch.rand(E, 1, C, generator=rng) if scale else 1)
    x = torch.randn(E, tokens, C, generator=rng) @ mix
    return weight, x, x.mT @ x


def plain(weight_RC, hessian_CC, scale_RG, bits, damp=0.01, act_order=True, drift_CC=None, alpha=0.25):
    """Algorithm 1 of arXiv 2210.17323 for one matrix, one column at a time, in float64 and without blocks. With D what
    a column lacks of the unquantized output goes onto the columns behind it by least squares (arXiv 2504.02692).
    """
    w, h = weight_RC.double().clone(), hessian_CC.double().clone()
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(h))
    w, h = w[:, order], h[order][:, order]
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    d = None if drift_CC is None else drift_CC.double()[order][:, order]
    codes = torch.empty_like(w)
    for j in range(w.shape[1]):
        scale = scale_RG[:, order[j] // (w.shape[1] // scale_RG.shape[1])].double()
        if bits == 1:
            codes[:, j] = 2.0 * (w[:, j] >= 0) - 1
        else:
            codes[:, j] = (w[:, j] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error, held = (w[:, j] - codes[:, j] * scale) / upper[j, j], w[:, j].clone()
        w[:, j:] -= error[:, None] * upper[j, j:]
        if d is not None:
            w[:, j + 1 :] += held[:, None] * alpha * torch.linalg.solve(h[j + 1 :, j + 1 :], d[j, j + 1 :])
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found.to(torch.int8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_the_plain_algorithm(bits, act_order):
    weight, _, hessian = inputs(bits)
    scale = group_scale(weight, bits, G)
    found = solve(weight, scale, factor(hessian, act_order=act_order), bits)
    wanted = torch.stack(
        [plain(w, h, s, bits, act_order=act_order) for w, h, s in zip(weight, hessian, scale, strict=True)]
    )
    rows = (found.codes_ERC != wanted).any(-1)
    assert rows.sum() <= 0.15 * rows.numel(), "a tie in float32 moves all that follows in its row, no other row"
    exact = solve(weight.double(), scale, factor(hessian.double(), act_order=act_order), bits)
    assert torch.equal(exact.codes_ERC, wanted)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("act_order", [True, False])
def test_codes_with_drift_are_those_of_the_plain_algorithm(bits, act_order):
    """With five leaves of columns: the pull crosses leaves and halves."""
    weight, x, hessian = inputs(bits)
    other = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * x.std()
    drift = (other - x).mT @ x
    scale = group_scale(weight, bits, G)
    found = factor(hessian.double(), act_order=act_order)
    exact = solve(weight.double(), scale, found, bits, pull(drift.double(), found, 0.25))
    wanted = torch.stack(
        [
            plain(w, h, s, bits, act_order=act_order, drift_CC=d)
            for w, h, s, d in zip(weight, hessian, scale, drift, strict=True)
        ]
    )
    assert torch.equal(exact.codes_ERC, wanted)
    assert not torch.equal(wanted, solve(weight.double(), scale, found, bits).codes_ERC)
    single = factor(hessian, act_order=act_order)
    codes = solve(weight, scale, single, bits, pull(drift, single, 0.25)).codes_ERC
    assert (codes != wanted).any(-1).sum() <= 0.15 * E * R


def test_no_drift_and_no_factor_pull_nothing():
    _, x, hessian = inputs(7)
    hessian[1] = torch.nan
    found = factor(hessian)
    drift = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).mT @ x
    assert not pull(drift, found, 0.0).any() and not pull(torch.zeros_like(drift), found, 0.25).any()
    pulled = pull(drift, found, 0.25)
    assert pulled[0].any() and pulled[2].any() and not pulled[1].any()
    assert torch.equal(pulled, pulled.triu(1))


def test_drift_brings_the_output_closer_to_that_of_the_other_inputs():
    weight, x, hessian = inputs(8)
    other = x @ (torch.eye(C) + 0.1 * torch.randn(C, C, generator=torch.Generator().manual_seed(3)) / C**0.5)
    found, scale = factor(hessian), group_scale(weight, 4, G)
    wanted, errors = other @ weight.mT, []
    for alpha in (0.0, 0.25, 1.0):
        codes = solve(weight, scale, found, 4, pull((other - x).mT @ x, found, alpha)).codes_ERC
        errors.append(float((x @ dequantize(codes, scale).mT - wanted).square().sum()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("columns", [33, 72, 600])
def test_widths_that_no_block_divides(columns):
    rng = torch.Generator().manual_seed(columns)
    weight = torch.randn(2, 5, columns, generator=rng, dtype=torch.float64)
    x = torch.randn(2, 2 * columns, columns, generator=rng, dtype=torch.float64) * torch.rand(columns, generator=rng)
    scale = group_scale(weight, 4, columns // 3)
    found = solve(weight, scale, factor(x.mT @ x), 4)
    wanted = torch.stack([plain(w, v.T @ v, s, 4) for w, v, s in zip(weight, x, scale, strict=True)])
    assert torch.equal(found.codes_ERC, wanted)


def test_the_factor_is_that_of_the_damped_inverse():
    _, _, hessian = inputs(5)
    found = factor(hessian, damp=0.02)
    for upper, order, h in zip(*found[:2], hessian.double(), strict=True):
        damped = h[order][:, order] + 0.02 * h.diagonal().mean() * torch.eye(C)
        product = upper.double().mT @ upper.double() @ damped
        assert (product - torch.eye(C)).abs().max() < 1e-2
        assert torch.equal(upper, upper.triu())
    assert found.tries_E.tolist() == [0, 0, 0]


@pytest.mark.parametrize("columns", [24, 256, 600])
@pytest.mark.parametrize("tokens", [1, 4, 2000])
def test_factors_in_one_piece_and_in_several_are_those_of_float64(columns, tokens):
    """With one direction far above all others too: there errors grow most."""
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(columns)) + 3.0
    x[1] *= torch.logspace(-2, 2, columns)
    found = factor(x.mT @ x)
    for upper, order, h in zip(*found[:2], (x.mT @ x).double(), strict=True):
        damped = h[order][:, order] + 0.01 * h.diagonal().mean() * torch.eye(columns)
        wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert (upper.double() - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize(("bits", "share"), [(1, 0.8), (3, 0.6), (4, 0.6)])
def test_the_error_on_the_inputs_is_smaller_than_that_of_rounding(bits, share):
    weight, x, hessian = inputs(7)
    scale = group_scale(weight, bits, G)
    found = solve(weight, scale, factor(hessian), bits)
    rounded, _ = quantize_rtn(weight, bits, G)
    for e in range(E):
        error = {
            name: ((dequantize(codes[e], scale[e], G) - weight[e]) @ x[e].T).square().sum().item()
            for name, codes in (("gptq", found.codes_ERC), ("rtn", rounded))
        }
        assert error["gptq"] < share * error["rtn"]


@pytest.mark.parametrize("bits", [1, 4])
def test_a_hessian_without_a_factor_means_plain_rounding_and_is_told(bits):
    weight, _, hessian = inputs(3)
    weight[0, 2, :G] = 0
    hessian[0] = torch.nan
    hessian[1] = 0.0
    hessian[2, 4, 5] = torch.inf
    found = factor(hessian)
    assert found.tries_E.tolist() == [len(DAMPS)] * 3
    codes, scale = quantize_rtn(weight, bits, G)
    assert torch.equal(solve(weight, scale, found, bits).codes_ERC, codes)


def test_few_tokens_and_dead_columns_zero_no_weight():
    weight, x, _ = inputs(9)
    x[:, :, 5] = 0
    one = x[:, :1]
    found = factor(one.mT @ one)
    assert (found.tries_E < len(DAMPS)).all(), "rank one and damping is enough"
    scale = group_scale(weight, 4, G)
    back = dequantize(solve(weight, scale, found, 4).codes_ERC, scale, G)
    assert ((back[..., 5] - weight[..., 5]).abs() <= scale.amax(-1) / 2 + 1e-6).all()
    assert (back.norm(dim=(1, 2)) > 0.9 * weight.norm(dim=(1, 2))).all()


def test_an_indefinite_matrix_gets_more_damping():
    _, _, hessian = inputs(2, scale=False)
    values, vectors = torch.linalg.eigh(hessian[1])
    values[0] = -0.03 * values.mean()
    hessian[1] = vectors * values @ vectors.mT
    assert factor(hessian).tries_E.tolist() == [0, 1, 0]


def test_the_shrunken_scale_is_the_best_of_eighty():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    found = group_scale(weight, 3, 16, shrink=True)
    for row in range(4):
        for group in range(2):
            w = weight[row, 16 * group : 16 * group + 16]
            whole = w.abs().max() / 3.5

            def error(s, w=w):
                return ((w / s).round().clamp(-4, 3) * s - w).abs().pow(2.4).sum().item()

            assert error(found[row, group]) == pytest.approx(min(error(whole * (1 - i / 100)) for i in range(80)))


def test_the_best_scale_of_one_bit_may_be_larger_or_smaller_than_the_mean():
    """|error|^2.4 minds large weights more than the mean does, and zeros among equals less."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[0, 3], weight[1] = 9.0, torch.tensor([1.0] * 14 + [0.0, 0.0]).repeat(2)
    found, plain = (group_scale(weight, 1, 16, shrink) for shrink in (True, False))
    factors = found / plain
    for row in range(4):
        for group in range(2):
            size = weight[row, 16 * group : 16 * group + 16].abs()
            errors = {i: (size - size.mean() * (2 - i / 50)).abs().pow(2.4).sum().item() for i in range(80)}
            assert factors[row, group] == pytest.approx(2 - min(errors, key=errors.get) / 50)
    assert factors[0, 0] > 1.3 and (factors[1] < 1).all() and (factors[2:] > 1).any()
