"""The twins against autograd and loops."""

from __future__ import annotations

import torch
from torch.nn import functional

from moecli.ops import gradients, grouped


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_back_through_the_gate_is_autograd() -> None:
    gate_up, down, slope, weight = draw(5, 6), draw(4, 3, seed=1), draw(5, 4, seed=2), draw(5, seed=3)
    gate_up.requires_grad_()
    weight.requires_grad_()
    inner = grouped.silu_gate(gate_up)
    inner.retain_grad()
    (weight[:, None] * (inner @ down.T) * slope).sum().backward()
    found = gradients.silu_gate_back(gate_up.detach(), slope @ down, weight.detach())
    torch.testing.assert_close(found.gate_up_SF, gate_up.grad)
    torch.testing.assert_close(found.inner_SF, inner.detach())
    torch.testing.assert_close(found.inner_grad_SF, inner.grad)
    torch.testing.assert_close(found.weight_S, weight.grad)


def test_sums_of_channels_are_loops_over_visits() -> None:
    h, g, end = draw(6, 3), draw(6, 3, seed=1), [2, 2, 6]
    found = gradients.channel_sums(h, g, torch.tensor(end, dtype=torch.int32))
    for expert, (a, b) in enumerate(zip([0, *end], end, strict=False)):
        wanted = [sum((f(h[s], g[s]) for s in range(a, b)), torch.zeros(3).double()) for f in (
            lambda x, y: x * x, lambda x, y: y * y, lambda x, y: x * y, lambda x, y: (x * y) ** 2,
        )]  # fmt: skip
        torch.testing.assert_close([one[expert] for one in found], wanted)


def test_back_through_a_linear_is_its_transpose() -> None:
    grad, weight = torch.randn(6, 16), torch.randn(3, 16, 8)
    found = gradients.linear_back(grad, weight, torch.tensor([2, 2, 6], dtype=torch.int32))
    wanted = torch.stack([grad[s] @ weight[e] for s, e in enumerate([0, 0, 2, 2, 2, 2])])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_back_through_a_norm_is_autograd() -> None:
    x, weight, grad = draw(3, 4, 7).requires_grad_(), draw(7, seed=1), draw(3, 4, 7, seed=2)
    functional.rms_norm(x, (7,), weight, 1e-6).backward(grad)
    torch.testing.assert_close(gradients.rms_norm_back(x.detach(), weight, grad, 1e-6), x.grad)
