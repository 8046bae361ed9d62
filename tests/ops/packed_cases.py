"""The packed products' kernels against their twins: on a device, or anywhere under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import torch

from moecli.ops import packed as twin
from moecli.ops.packed import Packed, arrange


def random_packed(bits: int, experts: int, rows: int, columns: int, group: int, dtype: torch.dtype) -> Packed:
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (experts, rows, columns), generator=rng)
    scale = (0.5 + torch.rand(experts, rows, columns // group, generator=rng)).to(dtype) / 2**bits
    return arrange(codes.to(torch.int8), scale, bits)


def to(packed: Packed, device: str) -> Packed:
    return Packed(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in packed))


def compare(
    fast: ModuleType, device: str, dtype: torch.dtype, bits: int, experts: int = 5, width: int = 48,
    columns: int = 96, group: int = 32, tokens: tuple[int, ...] = (1, 11), slots: int = 3,
) -> None:  # fmt: skip
    """Weights are equal to the bit; products up to the order of sums, a rounding of weights, and one of the result."""
    packed = to(random_packed(bits, experts, 2 * width, columns, group, dtype), device)
    assert torch.equal(fast.dequantized(packed), twin.dequantized(packed))
    for count in tokens:
        rng = torch.Generator().manual_seed(count)
        x = torch.randn(count, columns, generator=rng).to(device, dtype)
        many = torch.randn(count * slots, columns, generator=rng).to(device, dtype)
        weight = torch.rand(count, slots, generator=rng).to(device, dtype)
        expert = torch.randint(0, experts, (count * slots,), generator=rng).to(device)
        visits = fast.sort_visits(expert, experts)
        assert torch.equal(visits.order_S, expert.argsort(stable=True).int())
        assert visits.start_E.tolist() == [(expert < e).sum().item() for e in range(experts + 1)]
        for order in (visits, None):
            for name in ("gated_product", "product"):
                wanted = getattr(twin, name)(x.float(), packed, expert)
                close(getattr(fast, name)(x, packed, expert, order), wanted, (name, count, order is None))
            wanted = twin.combined_product(many.float(), packed, expert, weight)
            found = fast.combined_product(many, packed, expert, weight, order)
            close(found, wanted, ("combined", count, order is None))
            if count == tokens[-1]:
                without_last(fast, x, packed, expert, order)


def close(found: torch.Tensor, wanted: torch.Tensor, where: object) -> None:
    error = (found.float() - wanted).abs().max() / wanted.square().mean().sqrt()
    assert error < 16 * torch.finfo(found.dtype).eps + 1e-5, (where, float(error))


def without_last(fast: ModuleType, x: torch.Tensor, packed: Packed, expert: torch.Tensor, order: object) -> None:
    """Visits that belong to no expert keep what stood in the result; the others do not notice."""
    whole = fast.product(x, packed, expert, order)
    some = expert.clone()
    some[-1] = -1
    sorted_again = None if order is None else fast.sort_visits(some, packed.low.shape[0])
    found = fast.product(x, packed, some, sorted_again, torch.full_like(whole, 7.0))
    assert torch.equal(found[:-1], whole[:-1]) and bool((found[-1] == 7.0).all())
