"""Kernels of `ops.gradients` against their twins: on a device, or anywhere under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

from moecli.ops import gradients
from tests.ops.grouped_cases import _on_cpu, draw


def compare(fast: ModuleType, dtype: torch.dtype, device: str, visits: int = 61, width: int = 72) -> None:
    """Every kernel of `fast` on odd sizes, with experts that nothing visits; bf16 may differ by the last bit."""
    near = {"rtol": 1.6e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    gate_up, slope = (draw(visits, n * width, dtype=dtype, device=device, seed=n) for n in (2, 1))
    for gates in (dtype, torch.float32):
        weight = draw(visits, dtype=gates, device=device, seed=3).abs()
        found = fast.silu_gate_back(gate_up, slope, weight)
        wanted = _on_cpu(gradients.silu_gate_back, gate_up, slope, weight)
        for one, other in zip(found[:3], wanted[:3], strict=True):
            torch.testing.assert_close(one, other, **near)
        torch.testing.assert_close(found[3], wanted[3], rtol=1e-2, atol=0.1 if dtype == torch.bfloat16 else 1e-3)
    end = torch.tensor([0, 3, 40, 40, 61, 61], dtype=torch.int32, device=device)
    inner = gate_up[:, :width].contiguous()
    sums = torch.stack(_on_cpu(gradients.channel_sums, inner, slope, end))
    torch.testing.assert_close(fast.channel_sums(inner, slope, end), sums, rtol=1e-5, atol=1e-4)
    by = draw(width, dtype=dtype, device=device, seed=6)
    x, grad = gate_up.view(visits, 2, width), slope[:, None].expand(visits, 2, width)
    torch.testing.assert_close(
        fast.rms_norm_back(x, by, grad, 1e-6), _on_cpu(gradients.rms_norm_back, x, by, grad, 1e-6), **near
    )
