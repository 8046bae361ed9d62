"""Kernels against their twins: run where there is a device, or anywhere under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

from moecli.ops import grouped


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def compare(fast: ModuleType, dtype: torch.dtype, device: str, tokens: int = 37, width: int = 72) -> None:
    """Every kernel of `fast` on odd sizes; bf16 may differ by the last bit."""
    near = {"rtol": 1.6e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 1e-6}
    gate_up = draw(tokens, 5, 2 * width, dtype=dtype, device=device)
    twin = _on_cpu
    torch.testing.assert_close(fast.silu_gate(gate_up), twin(grouped.silu_gate, gate_up), **near)
    rough = {"rtol": 1e-2, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(fast.silu_gate_sum(gate_up), twin(grouped.silu_gate_sum, gate_up), **rough)
    index = torch.randint(0, 5, (tokens, 3), generator=torch.Generator().manual_seed(3))
    place = grouped.group(index, 5).place_Tk.to(device)
    y = draw(tokens * 3, width, dtype=dtype, device=device, seed=1)
    for gates in (dtype, torch.float32):
        weight = draw(tokens, 3, dtype=gates, device=device, seed=2).abs()
        for read in (False, True):
            for found, wanted in zip(
                fast.combine(y, place, weight, read), twin(grouped.combine, y, place, weight, read), strict=True
            ):
                assert (found is None) == (wanted is None)
                if found is not None:
                    torch.testing.assert_close(found, wanted, **near)
    before, added = (draw(tokens, width, dtype=dtype, device=device, seed=s) for s in (4, 5))
    torch.testing.assert_close(fast.turn(before, added), twin(grouped.turn, before, added), rtol=1e-4, atol=1e-6)
    weight = draw(width, dtype=dtype, device=device, seed=6)
    for early in (True, False):
        args = (gate_up[..., :width], weight, 1e-6, early)
        torch.testing.assert_close(fast.rms_norm(*args), twin(grouped.rms_norm, *args), **near)


def _on_cpu(function: object, *args: object) -> object:
    """The twin's answer, back on the device of the arguments."""
    device = args[0].device
    found = function(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
    if isinstance(found, torch.Tensor):
        return found.to(device)
    return tuple(None if value is None else value.to(device) for value in found)
