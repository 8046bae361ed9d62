"""Triton kernels. Each has a pure PyTorch twin of the same signature in `moecli.ops`, which says what it computes,
is the oracle of its test and the path everywhere but on CUDA. `kernels` is the one place that chooses.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor


def kernels(name: str, on: Tensor) -> ModuleType | None:
    """The kernels of `moecli.ops.<name>` when `on` lies on a CUDA device with Triton, else None: take the twin."""
    return _load(name) if on.is_cuda else None


@cache
def _load(name: str) -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except ImportError:  # torch built without it; the twins give the same numbers
        return None
    return import_module(f"moecli.ops.kernels.{name}")
