"""Kernels against their twins: run where there is a device, or anywhere under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

from moecli.ops import gram, grouped


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def compare(fast: ModuleType, dtype: torch.dtype, device: str, tokens: int = 37, width: int = 72) -> None:
    """Every kernel of `fast` on odd sizes; bf16 may differ by the last bit."""
    near = {"rtol": 1.6e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 1e-6}
    gate_up = draw(tokens, 5, 2 * width, dtype=dtype, device=device)
    twin = _on_cpu
    torch.testing.assert_close(fast.silu_gate(gate_up), twin(grouped.silu_gate, gate_up), **near)
    rough = {"rtol": 1e-2, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    part = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(7)).to(device)
    for args in ((gate_up,), (gate_up, part)):
        torch.testing.assert_close(fast.silu_gate_sum(*args), twin(grouped.silu_gate_sum, *args), **rough)
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
    compare_moments(fast, dtype, device, tokens, width)
    before, added = (draw(tokens, width, dtype=dtype, device=device, seed=s) for s in (4, 5))
    torch.testing.assert_close(fast.turn(before, added), twin(grouped.turn, before, added), rtol=1e-4, atol=1e-6)
    weight = draw(width, dtype=dtype, device=device, seed=6)
    for early in (True, False):
        args = (gate_up[..., :width], weight, 1e-6, early)
        torch.testing.assert_close(fast.rms_norm(*args), twin(grouped.rms_norm, *args), **near)


def compare_moments(fast: ModuleType, dtype: torch.dtype, device: str, tokens: int = 37, width: int = 72) -> None:
    """Channel statistics of experts, one of them without tokens, with rows of their own and gathered ones."""
    x, row_S, end_E, gate_S = visits(dtype, device, tokens, width)
    for rows, values in ((row_S, x), (None, x[row_S])):
        found = grouped.Moments(*fast.moments(values, rows, end_E, gate_S))
        wanted = _on_cpu(grouped.moments, values, rows, end_E, gate_S)
        for name, mine, other in zip(grouped.Moments._fields, found, wanted, strict=True):
            torch.testing.assert_close(
                mine.double(), other.double(), rtol=1e-5, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


def compare_gram(fast: ModuleType, dtype: torch.dtype, device: str, tokens: int = 37, width: int = 72) -> None:
    """Upper triangles, with and without weights, added to what is there; bf16 weights are of two parts."""
    x, row_S, end_E, gate_S = visits(dtype, device, tokens, width)
    for rows, values in ((row_S, x), (None, x[row_S])):
        for weight_S in (None, gate_S):
            found = draw(5, width, width, dtype=torch.float32, device=device, seed=9)
            wanted = found.clone().double().cpu()
            fast.add(found, values, rows, end_E, weight_S)
            gram.add(wanted, *(v if v is None else v.cpu() for v in (values, rows, end_E, weight_S)))
            size = float(wanted.abs().max())
            torch.testing.assert_close(found.triu().cpu().double(), wanted.triu(), rtol=1e-4, atol=2e-5 * size)


def visits(dtype: torch.dtype, device: str, tokens: int, width: int) -> tuple[torch.Tensor, ...]:
    """x, row of each visit, ends of five experts and gates: expert 2 has no token, the last visits are nobody's."""
    source = torch.Generator().manual_seed(8)
    count = 2 * tokens
    end = torch.tensor([tokens // 2, tokens, tokens, count - 9, count - 4], dtype=torch.int32)
    rows = torch.randint(0, tokens, (count,), generator=source)
    gates = torch.rand(count, generator=source)
    return draw(tokens, width, dtype=dtype, device=device), rows.to(device), end.to(device), gates.to(device)


def _on_cpu(function: object, *args: object) -> object:
    """The twin's answer, back on the device of the arguments."""
    device = args[0].device
    found = function(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
    if isinstance(found, torch.Tensor):
        return found.to(device)
    return tuple(None if value is None else value.to(device) for value in found)
