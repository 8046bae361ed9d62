"""Experts narrower than the model's config says: a stock `experts` module with fewer channels, alike or not.

One width for all experts of the layer: parameters get smaller, the class stays. Several widths: `gate_up_proj` and
`down_proj` become flat, the experts of one width side by side, widest first, so they take what the channels take; an
expert without channels takes nothing. A forward sorts the slots by expert and runs the stock implementation once for
each width. Against padding every expert to the layer's widest, that takes the memory of the kept channels alone, and on
a CPU less time as well (`scripts/bench_widths.py`: 0.6 to 0.7 of it with half of the channels kept, for 1 to 512
tokens); on a GPU one launch a width instead of one, and one wait for the device, which is not measured yet.
Needs torch only: `runtime` may quote this file as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def narrow_experts(experts: nn.Module, widths: Sequence[int]) -> None:
    """Let expert e have its first `widths[e]` channels; on meta, only sizes change.

    Before, all experts of the module are as wide as its parameters say. ValueError: a width does not fit, there is not
    one for each expert, or widths differ where experts have biases (stacked on disk, so they cannot).
    """
    if len(widths) != experts.down_proj.shape[0]:
        raise ValueError(f"{len(widths)} widths for {experts.down_proj.shape[0]} experts")
    channels = experts.down_proj.shape[_axis(experts, "down_proj")]
    if not 0 <= min(widths) <= max(widths) <= channels:
        raise ValueError(f"widths must lie between 0 and {channels}, got {min(widths)} to {max(widths)}")
    parts = [name for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj") if hasattr(experts, name)]
    if len(set(widths)) == 1 and widths[0] > 0:
        for name in parts:
            _put(experts, name, _first(experts, name, getattr(experts, name), widths[0]))
        return
    if len(parts) == 3:
        raise ValueError("experts with biases must have one width a layer, at least 1")
    for name in parts:
        whole = getattr(experts, name)
        pieces = [_first(experts, name, whole[members], width).flatten() for width, members in width_groups(widths)]
        _put(experts, name, torch.cat(pieces) if pieces else whole.flatten()[:0])
    experts.widths = tuple(widths)
    experts.__class__ = ragged_class(type(experts))


def width_groups(widths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(width, its experts ascending), widest first; experts without channels are in none."""
    return [(width, [e for e, w in enumerate(widths) if w == width]) for width in sorted({*widths} - {0}, reverse=True)]


def ragged_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a stock class, or of its alias class, that runs the stock one on each width's experts."""
    stock = getattr(base, "stock", base)

    def forward(self: nn.Module, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        if hasattr(self, "alias_map"):
            index_Tk = self.alias_map[index_Tk]
        groups = width_groups(self.widths)
        rank_E, ends = _places(self, groups, hidden_TD.device)
        rank_S, order_S = rank_E[index_Tk.flatten()].sort(stable=True)
        stops = torch.searchsorted(rank_S, ends).tolist()  # the one wait for the device
        out_SD = hidden_TD.new_zeros(index_Tk.numel(), hidden_TD.shape[-1])
        start = first = 0
        for stop, (_, members), piece in zip(
            stops, groups, _pieces(self, stock, groups, hidden_TD.shape[-1]), strict=True
        ):
            slot_S = order_S[start:stop]
            if stop > start:
                index_S1 = (rank_S[start:stop] - first)[:, None]
                weight_S1 = weight_Tk.flatten()[slot_S][:, None]
                out_SD[slot_S] = stock.forward(piece, hidden_TD[slot_S // index_Tk.shape[1]], index_S1, weight_S1)
            start, first = stop, first + len(members)
        return out_SD.view(*index_Tk.shape, -1).sum(1)

    return type("Ragged" + base.__name__, (base,), {"forward": forward, "stock": stock})


def _places(experts: nn.Module, groups: list[tuple[int, list[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Place of each expert among all, group after group, those without channels last; and where each group ends."""
    known = experts.__dict__.setdefault("_places_on", {})
    if device not in known:
        order = [expert for _, members in groups for expert in members]
        rank_E = torch.full((len(experts.widths),), len(order))
        rank_E[order] = torch.arange(len(order))
        ends = torch.tensor([len(members) for _, members in groups], dtype=torch.int64).cumsum(0)
        known[device] = rank_E.to(device), ends.to(device)
    return known[device]


def _pieces(
    experts: nn.Module, stock: type[nn.Module], groups: list[tuple[int, list[int]]], hidden: int
) -> list[nn.Module]:
    """For each width a stock module of its experts; its parameters are views."""
    sizes = [hidden * width * len(members) for width, members in groups]
    gate_up, down = experts.gate_up_proj.split([2 * n for n in sizes]), experts.down_proj.split(sizes)
    found = []
    for (width, members), both, out in zip(groups, gate_up, down, strict=True):
        piece = copy.copy(experts)
        shapes = (len(members), 2 * width, hidden), (len(members), hidden, width)
        if experts.is_transposed:
            shapes = tuple((count, columns, rows) for count, rows, columns in shapes)
        piece.__dict__["_parameters"] = {"gate_up_proj": both.view(shapes[0]), "down_proj": out.view(shapes[1])}
        piece.num_experts = len(members)
        piece.__class__ = stock
        found.append(piece)
    return found


def _axis(experts: nn.Module, name: str) -> int:
    """The dimension of a parameter that counts channels."""
    if name == "gate_up_proj_bias":
        return 1
    return 1 if (name == "gate_up_proj") != bool(experts.is_transposed) else 2


def _first(experts: nn.Module, name: str, value: Tensor, width: int) -> Tensor:
    """The first channels of a parameter of some of the experts."""
    axis = _axis(experts, name)
    if name == "down_proj":
        return value.narrow(axis, 0, width)
    if not experts.is_concatenated:  # gate and up alternate
        return value.narrow(axis, 0, 2 * width)
    return torch.cat([half.narrow(axis, 0, width) for half in value.chunk(2, axis)], axis)


def _put(experts: nn.Module, name: str, value: Tensor) -> None:
    like = getattr(experts, name)
    setattr(experts, name, nn.Parameter(value.detach().clone(), requires_grad=like.requires_grad))
