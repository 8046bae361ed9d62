"""GPTQ's kernel against its twin: run where there is a device, or anywhere under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

from moecli.ops import gptq


def compare(fast: ModuleType, device: str, experts: int = 2, rows: int = 19, width: int = 24) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, rows, width, generator=rng).to(device)
    x = torch.randn(experts, 4 * width, width, generator=rng).to(device)
    upper = gptq.factor(x.mT @ x).upper_ECC
    for bits in (2, 3, 4, 8):
        scale = (weight.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).expand_as(weight)
        found, wrong = fast.solve_block(weight, upper, scale, bits)
        codes, errors = gptq.solve_block(weight, upper, scale, bits)
        same = (found == codes).all(-1)
        assert same.float().mean() >= 0.97, "a fused multiply-add may turn a tie, and what follows in its row"
        torch.testing.assert_close(wrong[same], errors[same], rtol=1e-4, atol=1e-4)
