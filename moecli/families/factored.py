"""Experts whose matrices are products: W_e = left_e right_e, perhaps with a matrix that all share, perhaps with rows.

A stock `experts` module gets its `gate_up_proj` and `down_proj` replaced by five modules whose entries are named as the
projections are on disk:

    left.gate_proj     [E, O, r]     right.gate_proj    [E, r, I]
    base.gate_proj     [O, I]        what every expert adds
    rows.gate_proj     [E, n, I]     rows_at.gate_proj  int64 [E, n]: rows that are added, and to which

A token runs through two thin products for each of its experts. The shared matrix is multiplied with a token once,
whatever number of experts it has: gate and up before the visits, down after their weighted sum. Experts run one after
the other, as in the stock eager implementation. Needs torch only: `runtime` may quote this file as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FACTOR_PARTS = ("left", "right", "base", "rows", "rows_at")


def make_factored(experts: nn.Module, projections: Sequence[Mapping[str, Any]]) -> None:
    """Let a stock module, or its alias class, hold empty factors, on the device of its parameters (usually meta).

    `projections`: for gate, up and down in this order `name`, `rank`, `base` (bool) and `rows` (how many).
    """
    like = experts.gate_up_proj
    count, width, hidden = like.shape[0], like.shape[1] // 2, like.shape[2]
    sizes = [(width, hidden), (width, hidden), (hidden, width)]
    del experts.gate_up_proj, experts.down_proj
    for part in FACTOR_PARTS:
        setattr(experts, part, nn.Module())
    for found, (outputs, inputs) in zip(projections, sizes, strict=True):
        shapes = {"left": (count, outputs, found["rank"]), "right": (count, found["rank"], inputs)}
        if found["base"]:
            shapes["base"] = (outputs, inputs)
        if found["rows"]:
            shapes["rows"] = (count, found["rows"], inputs)
            at = torch.empty(count, found["rows"], dtype=torch.int64, device=like.device)
            experts.rows_at.register_buffer(found["name"], at)
        for part, shape in shapes.items():
            value = torch.empty(shape, dtype=like.dtype, device=like.device)
            getattr(experts, part).register_parameter(found["name"], nn.Parameter(value, requires_grad=False))
    experts._is_hf_initialized = True  # transformers would fill the parameters that are gone
    experts.factor_names = tuple(found["name"] for found in projections)
    experts.__class__ = factored_class(type(experts))


def factored_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward multiplies with the factors; activation and gating are the stock class's."""
    return type("Factored" + base.__name__, (base,), {"forward": _forward, "stock": getattr(base, "stock", base)})


def _forward(self: nn.Module, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
    if hasattr(self, "alias_map"):
        index_Tk = self.alias_map[index_Tk]
    order_S = index_Tk.flatten().argsort(stable=True)
    token_S = order_S // index_Tk.shape[1]
    visits = torch.bincount(index_Tk.flatten(), minlength=self.num_experts).tolist()  # the one wait for the device
    gate, up, down = self.factor_names
    x_SD, weight_S1 = hidden_TD[token_S], weight_Tk.flatten()[order_S][:, None]
    both = [_products(self, name, x_SD, visits) for name in (gate, up)]
    for inner_SF, name in zip(both, (gate, up), strict=True):
        if (base_FD := getattr(self.base, name, None)) is not None:
            inner_SF += nn.functional.linear(hidden_TD, base_FD)[token_S]
    h_SF = self._apply_gate(torch.cat(both, -1))
    y_SD = _products(self, down, h_SF, visits) * weight_S1
    out_TD = torch.zeros_like(hidden_TD).index_add_(0, token_S, y_SD.to(hidden_TD.dtype))
    if (base_DF := getattr(self.base, down, None)) is not None:
        mixed_TF = h_SF.new_zeros(len(hidden_TD), h_SF.shape[1]).index_add_(
            0, token_S, (h_SF * weight_S1).to(h_SF.dtype)
        )
        out_TD += nn.functional.linear(mixed_TF, base_DF)
    return out_TD


def _products(experts: nn.Module, name: str, x_SI: Tensor, visits: Sequence[int]) -> Tensor:
    """What each expert's factors and rows make of its visits, which are sorted by expert: [S, O]."""
    left_EOr, right_ErI = getattr(experts.left, name), getattr(experts.right, name)
    rows_EnI, at_En = getattr(experts.rows, name, None), getattr(experts.rows_at, name, None)
    pieces = []
    for expert, x in enumerate(x_SI.split(visits)):
        y = nn.functional.linear(nn.functional.linear(x, right_ErI[expert]), left_EOr[expert])
        if rows_EnI is not None:
            y.index_add_(1, at_En[expert], nn.functional.linear(x, rows_EnI[expert]))
        pieces.append(y)
    return torch.cat(pieces)
