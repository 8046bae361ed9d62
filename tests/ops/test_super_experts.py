"""Which experts count as Super Experts, against the rule in plain numpy."""

import numpy as np
import pytest
import torch

from moecli.ops.super_experts import super_experts


def plain(absmax, layers):
    kept = {layer: values for layer, values in absmax.items() if layer < round(0.75 * layers)}
    every = np.concatenate([v.numpy().astype(np.float64) for v in kept.values()])
    high, tenth = np.percentile(every, 99.5), every.max() / 10
    return {
        layer: [e for e, a in enumerate(values.tolist()) if a > high and a > tenth]
        for layer, values in kept.items()
        if any(a > high and a > tenth for a in values.tolist())
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_of_the_paper(seed):
    rng = torch.Generator().manual_seed(seed)
    absmax = {layer: torch.rand(64, generator=rng) for layer in range(1, 16)}
    absmax[2][7], absmax[3][9], absmax[14][5] = 300.0, 40.0, 900.0
    found = super_experts(absmax, 16)
    assert found == plain(absmax, 16)
    assert found == {2: [7], 3: [9]}, "the last quarter of the layers does not count, not even for the maximum"


def test_a_tenth_of_the_largest_is_needed():
    absmax = {0: torch.cat([torch.full((996,), 1.0), torch.tensor([100.0, 9.0, 11.0, 200.0])])}
    assert super_experts(absmax, 4) == plain(absmax, 4) == {0: [996, 999]}


def test_only_late_layers_have_none():
    assert super_experts({7: torch.tensor([1.0, 9.0])}, 8) == {}
