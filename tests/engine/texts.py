"""Token batches for tests: random ids, some padding on either side."""

from __future__ import annotations

import torch

from moecli.engine.data import Batch


def random_batches(sizes: tuple[int, ...] = (3, 2), length: int = 20, seed: int = 0) -> list[Batch]:
    """One batch per size; every second sequence is padded, on the right or on the left in turn."""
    rng = torch.Generator().manual_seed(seed)
    return [_padded(torch.randint(3, 100, (size, length), generator=rng)) for size in sizes]


def _padded(ids: torch.Tensor) -> Batch:
    mask = torch.ones_like(ids)
    mask[1::4, 13:] = 0
    mask[3::4, :5] = 0
    return Batch(ids, mask)
