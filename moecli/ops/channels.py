"""Which channels of which experts stay, given a score for each, and the best `down` for those that do.

E experts, F channels, D model width. Higher scores stay; ties keep the lower layer, expert and channel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["expert", "layer", "global"]


def width_left(channels: int, ratio: float, block: int) -> int:
    """Channels that each expert keeps when `ratio` of them go, rounded up to whole blocks."""
    return math.ceil(channels * (1 - ratio) / block - 1e-9) * block


def keep_channels(
    score: Mapping[int, Tensor], ratio: float, scope: Scope, *, block: int = 1, floor: int = 0,
    safe: Mapping[int, Collection[int]] | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """{layer: bool [E, F]} of the channels that stay, from {layer: score [E, F]}.

    Each expert keeps a multiple of `block` channels, its best ones, and at least `floor` (rounded up). `scope`:
    `expert` leaves `width_left` in each; `layer` and `global` hold the sum over a layer, or over all layers, to
    (1 - ratio) of the channels, rounded down to whole blocks: blocks of an expert's sorted channels are taken in order
    of their summed score, which is the best choice for that sum. Experts in `safe` keep everything; under `expert`
    that is beside the ratio, else inside it.

    ValueError: a score is NaN, `block` does not divide F, or `floor` and `safe` leave nothing of the ratio.
    """
    safe = safe or {}
    blocks = {layer: _blocks(values, block, floor, safe.get(layer, ()), layer) for layer, values in score.items()}
    if scope == "expert":
        left = {layer: width_left(values.shape[1], ratio, block) // block for layer, values in score.items()}
        counts = {layer: _at_least(found_EB, left[layer]) for layer, found_EB in blocks.items()}
    elif scope == "layer":
        counts = {layer: _best([found_EB], ratio, block)[0] for layer, found_EB in blocks.items()}
    else:
        counts = dict(zip(blocks, _best(list(blocks.values()), ratio, block), strict=True))
    return {layer: _ranks(values) < block * counts[layer][:, None] for layer, values in score.items()}


def _ranks(score_EF: Tensor) -> Tensor:
    """0 for an expert's best channel, 1 for the next."""
    order_EF = score_EF.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order_EF).scatter_(1, order_EF, torch.arange(order_EF.shape[1]).expand_as(order_EF))


def _blocks(score_EF: Tensor, block: int, floor: int, safe: Collection[int], layer: int) -> Tensor:
    """Score of each block of an expert's sorted channels, float64 [E, F / block], descending; infinite where it must
    stay.
    """
    if torch.isnan(score_EF).any():
        expert, channel = torch.isnan(score_EF).nonzero()[0].tolist()
        raise ValueError(f"score of channel {channel} of expert {expert} in layer {layer} is NaN")
    if score_EF.shape[1] % block:
        raise ValueError(f"blocks of {block} do not divide {score_EF.shape[1]} channels")
    found_EB = score_EF.double().sort(dim=1, descending=True, stable=True).values.unflatten(1, (-1, block)).sum(-1)
    found_EB[:, : math.ceil(floor / block)] = torch.inf
    found_EB[list(safe)] = torch.inf
    return found_EB


def _at_least(found_EB: Tensor, blocks: int) -> Tensor:
    """Blocks of each expert: so many, or more where more must stay."""
    return (found_EB == torch.inf).sum(1).clamp(min=blocks)


def _best(found: list[Tensor], ratio: float, block: int) -> list[Tensor]:
    """Blocks of each expert when the best of all are taken together."""
    flat = torch.cat([found_EB.flatten() for found_EB in found])
    total = math.floor(len(flat) * block * (1 - ratio) + 1e-9) // block
    fixed = int((flat == torch.inf).sum())
    if fixed > total:
        raise ValueError(f"{fixed * block} channels must stay, the ratio leaves {total * block}")
    taken = torch.zeros(len(flat), dtype=torch.int64)
    taken[flat.argsort(descending=True, stable=True)[:total]] = 1
    pieces = taken.split([found_EB.numel() for found_EB in found])
    return [piece.view_as(found_EB).sum(1) for piece, found_EB in zip(pieces, found, strict=True)]


def coverage_scores(value_EF: Tensor, weight_E: Tensor) -> Tensor:
    """-m at which a channel comes in when every expert keeps its smallest set of channels that holds
    min(1, weight_e m) of its summed value; float64 [E, F].

    Values and weights are at least 0. Keeping the n highest scores is keeping what the largest m gives whose sets have
    n channels together. An expert of weight 0 has one channel at m = 0, as all have, and the rest after all others.
    """
    value_EF, order_EF = value_EF.double().sort(dim=1, descending=True, stable=True)
    tiny = torch.finfo(torch.float64).tiny
    before_EF = (value_EF.cumsum(1) - value_EF) / value_EF.sum(1, keepdim=True).clamp(min=tiny)
    weight_E1 = weight_E.double().clamp(min=max(1e-9 * float(weight_E.max()), tiny))[:, None]
    return torch.empty_like(value_EF).scatter_(1, order_EF, -before_EF / weight_E1)


def budgeted(
    score: Mapping[int, Tensor], value: Mapping[int, Tensor], weight: Mapping[int, float]
) -> dict[int, Tensor]:
    """{layer: float64 [E, F]}: each layer's channels in the order of `score`, with values such that keeping the highest
    of all layers gives each layer as many channels as it needs for min(1, weight s) of its summed `value`, one s for
    all.
    """
    found = {}
    for layer, score_EF in score.items():
        line = coverage_scores(value[layer].reshape(1, -1), torch.tensor([weight[layer]])).flatten()
        order = score_EF.flatten().argsort(descending=True, stable=True)
        placed = torch.empty_like(line).index_copy_(0, order, line.sort(descending=True).values)
        found[layer] = placed.view_as(score_EF)
    return found


def refit_down(down_EDF: Tensor, gram_EFF: Tensor, kept_EF: Tensor, ridge: float) -> Tensor:
    """`down` of the kept channels that best gives what all channels gave, the others 0; float64 [E, D, F].

    argmin over D' of sum_t |down h_t - D' h_t[kept]|^2 + lambda |D' - down[kept]|^2, with `gram_EFF` the sum of h h^T
    over tokens and lambda `ridge` times its mean diagonal: D' = down_S + down_P C_PS (C_SS + lambda I)^-1 for S kept
    and P gone. Where tokens say nothing, and for an expert without tokens, `down` stays as it is. One factorisation for
    all experts.
    """
    down_EDF, gram_EFF = down_EDF.double(), gram_EFF.double()
    kept_E1F, size = kept_EF[:, None, :].to(down_EDF), gram_EFF.shape[-1]
    diagonal_EF = gram_EFF.diagonal(dim1=-2, dim2=-1)
    scale_E = diagonal_EF.mean(-1)
    lambda_E = ridge * torch.where(scale_E > 0, scale_E, torch.ones_like(scale_E))
    inside_EFF = gram_EFF * kept_E1F * kept_E1F.mT  # zero rows for what is gone: the ridge makes them solvable
    eye_FF = torch.eye(size, dtype=torch.float64, device=gram_EFF.device)
    factor_EFF = torch.linalg.cholesky(inside_EFF + lambda_E[:, None, None] * eye_FF)
    gone_EDF = (down_EDF * (1 - kept_E1F)) @ gram_EFF * kept_E1F
    return down_EDF * kept_E1F + torch.cholesky_solve(gone_EDF.mT, factor_EFF).mT
