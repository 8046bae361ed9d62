"""Results come from the device to CPU memory."""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFER_BYTES = 16 << 20
_LARGE_BYTES = 1 << 20
"""From here on two pinned buffers are worth their trouble: a copy to pageable memory ran at 1.8 GB/s."""


def fetched(tensor: Tensor) -> Tensor:
    """The tensor in CPU memory. A large one goes through two pinned buffers, one filled while the other is emptied."""
    if not tensor.is_cuda or tensor.nbytes < _LARGE_BYTES:
        return tensor.cpu()
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    step = _BUFFER_BYTES // tensor.element_size()
    pieces = list(zip(tensor.reshape(-1).split(step), found.view(-1).split(step), strict=True))
    buffers = [torch.empty(step, dtype=tensor.dtype, pin_memory=True) for _ in range(2)]
    stream, done = torch.cuda.current_stream(tensor.device), [torch.cuda.Event() for _ in range(2)]
    for index in range(len(pieces) + 1):
        if index < len(pieces):
            source = pieces[index][0]
            buffers[index % 2][: len(source)].copy_(source, non_blocking=True)
            done[index % 2].record(stream)
        if index > 0:
            target, last = pieces[index - 1][1], (index - 1) % 2
            done[last].synchronize()
            target.copy_(buffers[last][: len(target)])
    return found
