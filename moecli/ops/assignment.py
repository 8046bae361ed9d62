"""Put the neurons of similar experts in one order before they are averaged.

An expert computes the same whatever the order of its F neurons, as long as rows of gate and up and columns of down move
together. Averages do depend on it. P neurons of the reference, found by linear assignment (SciPy), O(F^3) an expert.

Sources: weight matching as M-SMoE (arXiv 2310.01334, appendix) uses it, all three matrices counted; weights and
activations as REAM (2604.04356) does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moecli.core.artifacts import ExpertWeights

CHUNK_BYTES = 256 << 20


def matched(similarity_PFF: Tensor) -> Tensor:
    """For each pair the order of the member's neurons that maximises sum_r similarity[r, order[r]]: int64 [P, F]."""
    from scipy.optimize import linear_sum_assignment

    found = [linear_sum_assignment(pair, maximize=True)[1] for pair in similarity_PFF.double().cpu().numpy()]
    return torch.stack([torch.from_numpy(order) for order in found]).to(torch.int64)


def reordered(experts: ExpertWeights, order_EF: Tensor) -> ExpertWeights:
    """Neuron r of the result is neuron order[r] of the expert; a leading E everywhere. Outputs do not change."""
    order_EF = order_EF.to(experts.gate_FD.device)
    rows, columns = order_EF[..., None], order_EF[:, None]

    def taken(bias_EF: Tensor | None) -> Tensor | None:
        return None if bias_EF is None else bias_EF.take_along_dim(order_EF, 1)

    return ExpertWeights(
        experts.gate_FD.take_along_dim(rows, 1),
        experts.up_FD.take_along_dim(rows, 1),
        experts.down_DF.take_along_dim(columns, 2),
        taken(experts.gate_bias_F),
        taken(experts.up_bias_F),
        experts.down_bias_D,
    )


def weight_products(lead: ExpertWeights, member: ExpertWeights) -> Tensor:
    """<gate_r, gate_s> + <up_r, up_s> + <down_r, down_s> of all pairs of neurons, float32 [P, F, F]."""
    return torch.baddbmm(
        lead.gate_FD.float() @ member.gate_FD.float().mT + lead.up_FD.float() @ member.up_FD.float().mT,
        lead.down_DF.float().mT,
        member.down_DF.float(),
    )


def weight_distance(lead: ExpertWeights, member: ExpertWeights) -> Tensor:
    """||n_r - n_s|| of the neurons' rows [gate | up | down^T], each of length 1: float32 [P, F, F]."""
    return _unit_distance(weight_products(lead, member), _square(lead), _square(member))


def activation_distance(lead_PTF: Tensor, member_PTF: Tensor) -> Tensor:
    """||a_r - a_s|| of the neurons' activations on the same T tokens, each of length 1: float32 [P, F, F]."""
    lead, member = lead_PTF.float(), member_PTF.float()
    return _unit_distance(lead.mT @ member, lead.square().sum(1), member.square().sum(1))


def aligned(
    experts: ExpertWeights,
    lead_E: Tensor,
    inner: Callable[[ExpertWeights], Tensor] | None = None,
) -> ExpertWeights:
    """Experts with their neurons in the order of their leads', those that lead themselves as they are.

    `inner` gives activations [P, T, F] of some experts on tokens that are the same for all: then neurons are matched by
    the sum of weight and activation distances, else by weight products. Pairs go through in chunks of bounded memory.
    """
    pairs = (lead_E != torch.arange(len(lead_E))).nonzero().flatten()
    if len(pairs) == 0:
        return experts
    _, width, hidden = experts.gate_FD.shape
    order_EF = torch.arange(width).repeat(len(lead_E), 1)
    per_call = max(1, CHUNK_BYTES // (4 * width * max(width, 6 * hidden)))
    for some in pairs.split(per_call):
        lead, member = _some(experts, lead_E[some]), _some(experts, some)
        if inner is None:
            similarity = weight_products(lead, member)
        else:
            similarity = -(weight_distance(lead, member) + activation_distance(inner(lead), inner(member)))
        order_EF[some] = matched(similarity)
    return reordered(experts, order_EF)


def _some(experts: ExpertWeights, index: Tensor) -> ExpertWeights:
    index = index.to(experts.gate_FD.device)
    return ExpertWeights(*(None if value is None else value[index] for value in experts))


def _square(w: ExpertWeights) -> Tensor:
    """Squared length of each neuron's row, float32 [P, F]"""
    gate, up, down = (m.float().square() for m in w[:3] if m is not None)
    return gate.sum(-1) + up.sum(-1) + down.sum(-2)


def _unit_distance(product_PFF: Tensor, lead_PF: Tensor, member_PF: Tensor) -> Tensor:
    """sqrt(2 - 2 cos); a neuron of length 0 is at distance sqrt(2) from all."""
    length = (lead_PF[:, :, None] * member_PF[:, None, :]).sqrt()
    return (2 - 2 * product_PFF / length.clamp(min=1e-30)).clamp(min=0).sqrt()
