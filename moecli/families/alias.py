"""Experts shared by several router rows: a stock `experts` module made smaller, plus a map from router row
to expert.

The stock instance stays: its activation, gating, biases and layout flags are untouched, only sizes change,
so every stock implementation (eager, grouped, batched) keeps working. Two slots of one token may name one
expert; stock implementations add both, which is the right sum. Needs torch only: `runtime` may quote this
file as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIAS_MAP = "alias_map"
"""Name of the int64 [E] buffer inside `experts`: the stored expert behind each router row."""


def alias_class(stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `stock` whose forward sends router row e to stored expert `alias_map[e]`."""

    def forward(self: nn.Module, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        return stock.forward(self, hidden_TD, self.alias_map[index_Tk], weight_Tk)

    return type("Alias" + stock.__name__, (stock,), {"forward": forward, "stock": stock})


def make_alias(experts_module: nn.Module, experts_M: int, rows_E: int) -> None:
    """Turn a stock `experts` module into one that stores `experts_M` experts behind `rows_E` router rows.

    Parameters become empty ones with first dimension M (on the device they were on, usually meta) and
    `alias_map` an empty int64 [E] buffer: both are then ordinary checkpoint tensors. ValueError unless
    every parameter has E as its first dimension.
    """
    for name, old in list(experts_module.named_parameters(recurse=False)):
        if old.shape[0] != rows_E:
            raise ValueError(f"`{name}` has {old.shape[0]} experts, the router has {rows_E} rows")
        empty = torch.empty(experts_M, *old.shape[1:], dtype=old.dtype, device=old.device)
        experts_module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    device = next(experts_module.parameters()).device
    experts_module.num_experts = experts_M
    experts_module.register_buffer(ALIAS_MAP, torch.empty(rows_E, dtype=torch.int64, device=device))
    experts_module.__class__ = alias_class(type(experts_module))
