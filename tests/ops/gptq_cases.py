"""GPTQ's kernel against its twin: run where there is a device, or anywhere under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

from moecli.ops import gptq


def compare(fast: ModuleType, device: str, experts: int = 2, rows: int = 19, width: int = 24) -> None:
    """A block inside larger tensors: nothing beside it may change."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, 2 * width, rows, generator=rng).to(device)
    x = torch.randn(experts, 8 * width, 2 * width, generator=rng).to(device)
    upper = gptq.factor(x.mT @ x).upper_ECC
    group = torch.randint(0, 3, (experts, 2 * width), generator=rng).to(device)
    here = slice(width // 2, width // 2 + width)
    for bits in (1, 2, 3, 4, 8):
        scale = (0.5 + torch.rand(experts, 3, rows, generator=rng)).to(device) * 4 / 2**bits
        (codes, errors), (twin_codes, twin_errors) = (
            (torch.full(weight.shape, 99, dtype=torch.int8, device=device), weight.clone()) for _ in range(2)
        )
        for block, c, e in ((fast.solve_block, codes, errors), (gptq.solve_block, twin_codes, twin_errors)):
            block(e[:, here], upper[:, here, here], scale, group[:, here], c[:, here], bits)
        same = (codes == twin_codes).all(1)
        assert same.float().mean() >= 0.97, "a fused multiply-add may turn a tie, and what follows in its row"
        torch.testing.assert_close(errors.mT[same], twin_errors.mT[same], rtol=1e-4, atol=1e-4)
        if bits < 8:
            assert len(codes[:, here].unique()) == 2**bits, "every column was written, and all codes occur"
