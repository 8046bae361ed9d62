"""AWQ's scales: the formula in plain numbers, and that powers of two lose nothing."""

import pytest
import torch

from moecli.ops.awq import candidates, power_of_two, rounded, weight_sizes
from moecli.ops.pack import dequantize, quantize_rtn


def test_weight_sizes_are_relative_to_the_group():
    weight = torch.tensor([[[1.0, -2.0, 0.0, 0.0], [4.0, 1.0, 3.0, -6.0]]])
    assert weight_sizes(weight, 2).tolist() == [[(0.5 + 1) / 2, (1 + 0.25) / 2, 0.25, 0.5]]


def test_candidates_are_the_published_formula_rounded_to_powers_of_two():
    x, w = torch.tensor([[0.01, 0.5, 8.0, 0.0]]), torch.tensor([[0.3, 0.2, 0.4, 0.9]])
    found = list(candidates(x, w))
    assert len(found) == 21 and found[0].tolist() == [[1, 1, 1, 1]]
    for step, scale in enumerate(found[1:]):
        r = step / 20
        plain = [max(a, 1e-4) ** r / (b ** (1 - r) + 1e-4) for a, b in zip(x[0].tolist(), w[0].tolist(), strict=True)]
        middle = (min(plain) * max(plain)) ** 0.5
        for got, value in zip(scale[0].tolist(), plain, strict=True):
            assert 2**-0.5001 <= got / (value / middle) <= 2**0.5001
            assert torch.frexp(torch.tensor(got))[0] == 0.5, "a power of two"


def test_the_nearest_power_of_two_by_ratio():
    assert power_of_two(torch.tensor([0.7, 0.71, 1.0, 1.4, 1.42, 3.0, 5e-5])).tolist() == [0.5, 1, 1, 1, 2, 4, 2**-14]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaled_weights_are_the_same_numbers(dtype):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, 16, generator=rng).to(dtype)
    scale = 2.0 ** torch.randint(-4, 5, (2, 16), generator=rng)
    assert torch.equal((weight * scale[:, None]).to(dtype) / scale[:, None], weight.float())
    ones = rounded(weight, torch.ones(2, 16), 3, 8)
    assert torch.equal(ones.float(), dequantize(*quantize_rtn(weight, 3, 8)).float())
    uniform = rounded(weight, torch.full((2, 16), 4.0), 3, 8)
    assert torch.equal(uniform.float(), ones.float()), "one scale for all inputs changes nothing"


def test_a_large_scale_saves_an_input():
    weight = torch.tensor([[[0.1, 1.0, -0.7, 0.4]]])
    plain, scaled = (rounded(weight, torch.tensor([[s, 1.0, 1, 1]]), 2, 4) for s in (1.0, 8.0))
    assert (scaled - weight)[0, 0, 0].abs() < (plain - weight)[0, 0, 0].abs()
