"""Half-quadratic scales: against a plain loop over one group, and what holds for any weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.halfquad import half_quadratic_scale, quantize_hqq
from moecli.ops.pack import dequantize, quantize_rtn


def plain(group, bits):
    """One group in float64, element by element; the least 0.7-norm that any step reaches."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    first = max(abs(w) for w in group) / ((2**bits - 1) / 2) or 1.0
    if bits == 1:
        first = sum(map(abs, group)) / len(group) or 2.0**-126
    values = [w / first for w in group]

    def code(w, s):
        return (1 if w >= 0 else -1) if bits == 1 else min(max(round(w / s), low), high)

    def norm(s):
        return sum(abs(w - code(w, s) * s) ** 0.7 for w in values)

    s, beta = 1.0, 10.0
    best, least = 1.0, norm(1.0)
    for _ in range(20):
        codes = [code(w, s) for w in values]
        errors = [w - q * s for w, q in zip(values, codes, strict=True)]
        kept = [max(abs(e) - max(abs(e), 1e-8) ** -0.3 / beta, 0) * (1 if e > 0 else -1) for e in errors]
        if any(codes):
            fit = sum(q * (w - v) for q, w, v in zip(codes, values, kept, strict=True)) / sum(q * q for q in codes)
            s = fit if fit > 0 else s
        if norm(s) < least:
            best, least = s, norm(s)
        beta *= 1.01
    return best * first, least


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scales_are_those_of_the_plain_loop(bits):
    rng = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 32, generator=rng).double()
    weight[2, 3] = 9.0
    weight[4] = 0
    found = half_quadratic_scale(weight, bits, 16)
    wanted = torch.tensor([[plain(row[i : i + 16].tolist(), bits)[0] for i in (0, 16)] for row in weight])
    # fp32 against float64 may round a code the other way: then the scale is another, nearly as good
    assert ((found - wanted).abs() < 1e-4 * wanted).double().mean() > 0.8
    for i, j in ((0, 0), (2, 0), (4, 0), (5, 1)):
        group = weight[i, 16 * j : 16 * j + 16]
        assert norm_of(group, found[i, j], bits) <= 1.01 * norm_of(group, wanted[i, j], bits) + 1e-9


def norm_of(group, scale, bits):
    codes = (group / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if bits == 1:
        codes = 2.0 * (group >= 0) - 1
    return float((group - codes * scale).abs().pow(0.7).sum())


@given(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_never_further_away_by_its_norm_than_rounding(bits, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    weight = (torch.randn(2, 3, 32, generator=rng) * torch.rand(2, 3, 1, generator=rng) ** 4).to(dtype)
    (codes, scale), (plain_codes, plain_scale) = (f(weight, bits, 8) for f in (quantize_hqq, quantize_rtn))
    assert codes.dtype == torch.int8 and scale.dtype == dtype and scale.shape == plain_scale.shape
    assert (scale > 0).all() and torch.isfinite(scale).all()
    for c in (codes.long(), plain_codes.long()):
        assert c.min() >= -(2 ** (bits - 1)) and c.max() <= max(1, 2 ** (bits - 1) - 1)
    wide = weight.double().unflatten(-1, (4, 8))
    errors = [
        (wide - dequantize(c, s.float()).double().unflatten(-1, (4, 8))).abs().pow(0.7).sum(-1)
        for c, s in ((codes, scale), (plain_codes, plain_scale))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1e-9).all()


def test_an_outlier_is_given_up_for_the_others():
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 5] = 6.0
    others = torch.arange(64) != 5
    errors = []
    for quantize in (quantize_hqq, quantize_rtn):
        codes, scale = quantize(weight, 3, 64)
        error = (dequantize(codes, scale) - weight)[0].abs()
        errors.append((error[others].mean(), error[5]))
    assert errors[0][0] < 0.8 * errors[1][0] and errors[0][1] > errors[1][1]


def test_a_group_of_zeros_stays_zero():
    codes, scale = quantize_hqq(torch.zeros(2, 16), 4, 8)
    assert not codes.any() and torch.equal(scale, torch.ones(2, 2))
    codes, scale = quantize_hqq(torch.zeros(2, 16), 1, 8)
    assert (scale > 0).all() and dequantize(codes, scale).abs().max() <= torch.finfo(torch.float32).tiny
