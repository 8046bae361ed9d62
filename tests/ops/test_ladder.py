"""Moments of experts with few inputs."""

import torch

from moecli.ops.gptq import factor
from moecli.ops.ladder import ladder


def test_a_broken_expert_spoils_no_other():
    """The ladder by its formula, one expert at a time; an expert whose inputs were not finite keeps that to itself."""
    counts = [300, 300, 64, 8]
    own = torch.stack([torch.eye(16) * (e + 1) for e in range(4)])
    pool = torch.full((16, 16), 0.5)
    total = own * torch.tensor(counts)[:, None, None]
    found = ladder(total.clone(), torch.tensor(counts).float(), torch.tensor(counts), pool)
    assert found.classes == ["own", "own", "mixed", "pooled"]
    wanted = [own[0], own[1], 64 / 68 * own[2] + 4 / 68 * pool, pool]
    torch.testing.assert_close(found.value_E, torch.stack(wanted))
    total[0, 3, 3] = torch.nan
    spoilt = ladder(total, torch.tensor(counts).float(), torch.tensor(counts), total.sum(0))
    assert torch.equal(spoilt.value_E[1], own[1])
    assert factor(spoilt.value_E).tries_E.tolist() == [3, 0, 3, 3]
