"""Which channels of which experts stay, given a score for each, and the best `down` for those that do.

E experts, F channels, D model width. Higher scores stay; ties keep the lower layer, expert and channel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moecli.core.errors import MoecliError
from moecli.ops.budget import Item, Level, Problem, Solution, dynamic, greedy

Scope = Literal["expert", "layer", "global"]


def width_left(channels: int, ratio: float, block: int) -> int:
    """Channels that each expert keeps when `ratio` of them go, rounded up to whole blocks."""
    return math.ceil(channels * (1 - ratio) / block - 1e-9) * block


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a choice of channels must keep to, besides its total. Counts of channels are rounded up to whole blocks, the
    ceiling down.
    """

    block: int = 1
    """Each expert keeps a multiple of so many channels."""
    floor: int = 0
    """Channels that every expert keeps at least."""
    ceiling: int | None = None
    """... and at most."""
    layer_floor: float = 0.0
    """Part of its channels that every layer keeps at least; asked for where layers compete (`global`)."""
    safe: Mapping[int, Collection[int]] = field(default_factory=dict)
    """{layer: experts that keep everything}, ceiling or not"""


def keep_channels(
    score: Mapping[int, Tensor], ratio: float, scope: Scope, bounds: Bounds = Bounds(), one_width: bool = False
) -> dict[int, Tensor]:
    """{layer: bool [E, F]} of the channels that stay, from {layer: score [E, F]}; each expert keeps its best ones.

    `scope`: `expert` leaves `width_left` in each; `layer` and `global` hold the sum over a layer, or over all layers,
    to (1 - ratio) of the channels, rounded down to whole blocks, and choose the blocks of largest summed score. Safe
    experts are beside the ratio under `expert`, else inside it.

    Taking blocks in the order of their score is exact for that sum: an expert's blocks are sorted, all cost the same,
    and floors and ceilings nest (expert in layer in model), so no exchange of two blocks can gain. With `one_width` all
    experts of a layer keep as many, at least one block (`layer_widths`): only under `global`, where layers differ.

    ValueError: a score is NaN, the block does not divide F, or the bounds and the ratio contradict each other.
    """
    found = {layer: _Blocks.of(values, bounds, layer) for layer, values in score.items()}
    if one_width:
        widths = layer_widths({layer: blocks.score_EB for layer, blocks in found.items()}, ratio, bounds).choice
        counts = {layer: torch.full((len(blocks.score_EB),), widths[str(layer)]) for layer, blocks in found.items()}
    elif scope == "expert":
        counts = {layer: blocks.each(width_left(score[layer].shape[1], ratio, bounds.block) // bounds.block)
                  for layer, blocks in found.items()}  # fmt: skip
    elif scope == "layer":
        counts = {layer: _best([blocks], ratio, bounds)[0] for layer, blocks in found.items()}
    else:
        counts = dict(zip(found, _best(list(found.values()), ratio, bounds), strict=True))
    return {layer: _ranks(values) < bounds.block * counts[layer][:, None] for layer, values in score.items()}


def camera_energy(ph2_EF: Tensor, phmax_EF: Tensor, norm_EF: Tensor, alpha: float) -> Tensor:
    """((1 - alpha) sum_t (g_t h_tk)^2 + alpha max_t |g_t h_tk|^2) ||down_k||^2, float64 [E, F], from the two statistics
    of these names and the norms of down's columns (CAMERA, arXiv 2508.02322).
    """
    return ((1 - alpha) * ph2_EF + alpha * phmax_EF.double().square()) * norm_EF.square()


def tiers(score: Mapping[int, Tensor], shares: Sequence[float], block: int) -> dict[int, Tensor]:
    """{layer: int64 [E, F]}: the tier of each channel, 0 for the highest scores, by rank among all channels of its
    layer, `shares` of them in each tier. An expert has a multiple of `block` channels in each; so many blocks of a
    layer as fit in the shares from the top are in the tiers above. ValueError: see `keep_channels`.
    """
    found = {layer: torch.zeros_like(values, dtype=torch.int64) for layer, values in score.items()}
    for above in itertools.accumulate(shares[:-1]):
        kept = keep_channels(score, 1 - above, "layer", Bounds(block))
        found = {layer: tier_EF + ~kept[layer] for layer, tier_EF in found.items()}
    return found


def total_left(channels: int, ratio: float, block: int) -> int:
    """Blocks that stay of so many channels together, rounded down."""
    return math.floor(channels * (1 - ratio) + 1e-9) // block


def layer_widths(score: Mapping[int, Tensor], ratio: float, bounds: Bounds) -> Solution:
    """One number of blocks for all experts of each layer: the largest sum of the scores that stay, at most the
    (1 - ratio) of all channels. From {layer: score of each expert's blocks, descending, [E, F / block]}.

    Exact by dynamic programming up to 255 blocks an expert; beyond, along the hulls with a proven bound, which is exact
    too where layers have equally many experts, because sums of sorted blocks are concave. Protected experts keep their
    layer whole. Scores are shifted to be at least 0, so that the whole total is used. ValueError: bounds and ratio
    contradict each other.
    """
    block, lowest_score = bounds.block, min(float(found.min()) for found in score.values())
    items = []
    for layer, found_EB in score.items():
        experts, blocks = found_EB.shape
        gain_B = (found_EB - lowest_score).sum(0)
        lost = torch.cat((gain_B.flip(0).cumsum(0).flip(0), gain_B.new_zeros(1))).tolist()
        levels = tuple(Level(kept, kept * experts, lost[kept]) for kept in range(1, blocks + 1))
        lowest = max(1, math.ceil(bounds.floor / block), math.ceil(bounds.layer_floor * blocks - 1e-9))
        highest = blocks if bounds.ceiling is None else bounds.ceiling // block
        if bounds.safe.get(layer):
            lowest = highest = blocks
        items.append(Item(str(layer), levels, lowest=lowest, highest=highest))
    channels = sum(found.numel() for found in score.values()) * block
    try:
        problem = Problem(tuple(items), total_left(channels, ratio, block))
        return (dynamic if max(len(item.levels) for item in items) < 256 else greedy)(problem)
    except MoecliError as contradiction:
        raise ValueError(
            f"no widths of layers leave {total_left(channels, ratio, block) * block} channels: {contradiction.message}"
        ) from contradiction


def _ranks(score_EF: Tensor) -> Tensor:
    """0 for an expert's best channel, 1 for the next."""
    order_EF = score_EF.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order_EF).scatter_(1, order_EF, torch.arange(order_EF.shape[1]).expand_as(order_EF))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of a layer's experts, each expert's sorted."""

    score_EB: Tensor
    """float64, descending"""
    must_EB: Tensor
    may_EB: Tensor

    @classmethod
    def of(cls, score_EF: Tensor, bounds: Bounds, layer: int) -> _Blocks:
        block = bounds.block
        if torch.isnan(score_EF).any():
            expert, channel = torch.isnan(score_EF).nonzero()[0].tolist()
            raise ValueError(f"score of channel {channel} of expert {expert} in layer {layer} is NaN")
        if score_EF.shape[1] % block:
            raise ValueError(f"blocks of {block} do not divide {score_EF.shape[1]} channels")
        sorted_EF = score_EF.double().sort(dim=1, descending=True, stable=True).values
        score_EB = sorted_EF.unflatten(1, (-1, block)).sum(-1)
        place_B = torch.arange(score_EB.shape[1])
        must_EB = (place_B < math.ceil(bounds.floor / block)).expand_as(score_EB).clone()
        may_EB = torch.ones_like(must_EB)
        if bounds.ceiling is not None:
            may_EB = (place_B < bounds.ceiling // block).expand_as(score_EB).clone()
        safe = list(bounds.safe.get(layer, ()))
        must_EB[safe] = may_EB[safe] = True
        if bool((must_EB & ~may_EB).any()):
            raise ValueError(f"experts must keep {bounds.floor} channels and may keep {bounds.ceiling}")
        return cls(score_EB, must_EB, may_EB)

    def each(self, blocks: int) -> Tensor:
        """Blocks of each expert: so many, or more where more must stay."""
        if bool((self.may_EB.sum(1) < blocks).any()):
            raise ValueError("experts may keep fewer channels than the ratio leaves in each")
        return self.must_EB.sum(1).clamp(min=blocks)


def _best(found: list[_Blocks], ratio: float, bounds: Bounds) -> list[Tensor]:
    """Blocks of each expert when the best of all are taken together."""
    block, numbers = bounds.block, [blocks.score_EB.numel() for blocks in found]
    score, must, may = (torch.cat([getattr(b, name).flatten() for b in found]) for name in _Blocks.__slots__)
    total = total_left(len(score) * block, ratio, block)
    taken = must.clone()
    for start, number in zip(itertools.accumulate([0, *numbers]), numbers, strict=False):
        layer = slice(start, start + number)  # the layer's best ones up to its floor
        _take(taken[layer], score[layer], may[layer], math.ceil(bounds.layer_floor * number - 1e-9))
    if int(taken.sum()) > total:
        raise ValueError(f"{int(taken.sum()) * block} channels must stay, the ratio leaves {total * block}")
    if int(may.sum()) < total:
        raise ValueError(f"{int(may.sum()) * block} channels may stay, the ratio leaves {total * block}")
    _take(taken, score, may, total)
    pieces = taken.split(numbers)
    return [piece.view_as(blocks.score_EB).sum(1) for piece, blocks in zip(pieces, found, strict=True)]


def _take(taken: Tensor, score: Tensor, may: Tensor, number: int) -> None:
    """Take the best of what may stay until `number` are taken, in place."""
    order = score.argsort(descending=True, stable=True)
    free = order[may[order] & ~taken[order]]
    taken[free[: max(0, number - int(taken.sum()))]] = True


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
