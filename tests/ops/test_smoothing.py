"""Scales between inputs and weights, by hand."""

import pytest
import torch

from moecli.ops.smoothing import LEAST, merged, smoothing


def test_scales_are_those_of_the_formula_one_by_one():
    x = torch.tensor([[4.0, 1.0, 0.0], [9.0, 2.0, 3.0]])
    w = torch.tensor([[1.0, 0.5, 2.0], [0.25, 0.0, 1.0]])
    found = smoothing(x, w, 0.6)
    for e in range(2):
        for c in range(3):
            wanted = float(x[e, c]) ** 0.6 / max(float(w[e, c]), LEAST) ** 0.4
            assert float(found[e, c]) == pytest.approx(max(wanted, LEAST))
    assert float(found[0, 2]) == pytest.approx(LEAST), "an input that was always zero"


def test_one_vector_is_the_largest_or_the_mean_by_share():
    scale = torch.tensor([[1.0, 8.0], [3.0, 4.0]])
    assert merged(scale, None).tolist() == [3.0, 8.0]
    assert merged(scale, torch.tensor([3, 1])).tolist() == [1.5, 7.0]
    assert merged(scale, torch.tensor([0, 0])).tolist() == [2.0, 6.0]
