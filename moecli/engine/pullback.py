"""A decoder layer's routed pass with a way back: gradients of activations, never of weights, and what collectors read.

One pass for every family, written against what all experts modules share (fused `gate_up_proj` and `down_proj`,
`_apply_gate`, biases and transposed storage where the family has them). Going back needs the projections before the
gate only: with s_t the gradient of the routed sum, u_t = down^T s_t is computed once per visit; the gradient of the
intermediate activation h is g_t * u_t, that of the weight g_t is h . u_t (plus s_t . bias), so outputs of single
experts are neither kept nor computed again. In bf16 on CUDA, products are grouped and the activation's way back, RMS
norms and statistics are one kernel each; elsewhere experts are multiplied one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moecli.core.errors import StageFailed
from moecli.engine import fused
from moecli.families import adapter
from moecli.families.alias import ALIAS_MAP
from moecli.ops import gradients, grouped


@dataclass(frozen=True, eq=False)
class Pulled:
    """What the way back through the experts leaves of some tokens. S visits sorted by expert, padding among them, whose
    gradients are 0; F expert width.
    """

    groups: grouped.Groups
    inner_SF: Tensor
    """h, the input of the down projection, in the model's dtype"""
    inner_grad_SF: Tensor
    """dl/dh, in the model's dtype"""

    def only(self, rows: Tensor) -> Pulled:
        """The gradients of all tokens but these rows of [T] set to 0."""
        tokens, slots = self.groups.place_Tk.shape
        kept_T = torch.zeros(tokens, dtype=self.inner_grad_SF.dtype, device=rows.device).index_fill_(0, rows, 1)
        return replace(self, inner_grad_SF=self.inner_grad_SF * kept_T[self.groups.slot_S // slots, None])

    @cached_property
    def sums(self) -> gradients.ChannelSums:
        """float64 [E, F] sums over each expert's visits"""
        return gradients.channel_sums(self.inner_SF, self.inner_grad_SF, self.groups.end_E)


class Routed:
    """The experts of one layer while they are differentiable. `seen` is what the latest way there was given: hidden
    [T, D], router rows, stored experts (-1 where an alias made the slot part of an earlier one) and weights [T, k].
    `pulled` is what the latest way back found.
    """

    def __init__(self, experts: nn.Module, keep: bool) -> None:
        self._experts, self._keep = experts, keep
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.alias_E: Tensor | None = None
        self.pulled: Pulled | None = None
        self._grouped = fused.suits(experts.gate_up_proj) and all(n % 8 == 0 for n in experts.down_proj.shape[1:])

    def run(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Stands for the forward of the experts module."""
        hidden_TD, index_Tk, weight_Tk = (x.reshape(-1, x.shape[-1]) for x in (hidden, index, weight))
        self.alias_E = getattr(self._experts, ALIAS_MAP, None)
        choice_Tk = counted_Tk = index_Tk
        if self.alias_E is not None:
            index_Tk = self.alias_E[choice_Tk]
            counted_Tk, weight_Tk = _one_visit_each(index_Tk, weight_Tk)
        self.seen = hidden_TD.detach(), choice_Tk, counted_Tk, weight_Tk.detach()
        routed_TD = _Pass.apply(hidden_TD, weight_Tk, grouped.group(index_Tk, self._experts.num_experts), self)
        return routed_TD.view(hidden.shape)

    def take(self) -> Pulled:
        """What the way back found, given away so that its memory can go."""
        pulled, self.pulled = self.pulled, None
        assert pulled is not None
        return pulled

    # -- the pass itself

    def forward(self, hidden_TD: Tensor, weight_Tk: Tensor, groups: grouped.Groups) -> tuple[Tensor, Tensor]:
        """The routed sum [T, D], and gate and up of each visit [S, 2F]."""
        experts = self._experts
        gate_up_SF = self._linear(hidden_TD[groups.slot_S // weight_Tk.shape[1]], experts.gate_up_proj, groups, False)
        if experts.has_bias:
            gate_up_SF = gate_up_SF + experts.gate_up_proj_bias[groups.expert_S]
        y_SD = self._linear(self._gated(gate_up_SF), experts.down_proj, groups, False)
        if experts.has_bias:
            y_SD = y_SD + experts.down_proj_bias[groups.expert_S]
        return grouped.combine(y_SD, groups.place_Tk, weight_Tk).routed_TD, gate_up_SF

    def backward(
        self, slope_TD: Tensor, gate_up_SF: Tensor, weight_Tk: Tensor, groups: grouped.Groups
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the hidden state [T, D] and of the weights [T, k]."""
        experts, (tokens, slots) = self._experts, weight_Tk.shape
        slope_SD = slope_TD[groups.slot_S // slots]
        slope_SF = self._linear(slope_SD, experts.down_proj, groups, True)
        back = self._gate_back(gate_up_SF, slope_SF, weight_Tk.flatten()[groups.slot_S])
        weight_S = back.weight_S
        if experts.has_bias:
            weight_S = weight_S + (slope_SD * experts.down_proj_bias[groups.expert_S]).sum(-1, dtype=weight_S.dtype)
        del slope_SD, slope_SF
        if self._keep:
            self.pulled = Pulled(groups, back.inner_SF, back.inner_grad_SF)
        grad_SD = self._linear(back.gate_up_SF, experts.gate_up_proj, groups, True)
        one_Tk = torch.ones(tokens, slots, dtype=grad_SD.dtype, device=grad_SD.device)
        grad_TD = grouped.combine(grad_SD, groups.place_Tk, one_Tk).routed_TD
        return grad_TD, weight_S[groups.place_Tk].to(weight_Tk.dtype)

    def _linear(self, x_SN: Tensor, weight: Tensor, groups: grouped.Groups, back: bool) -> Tensor:
        """Each visit by its own expert's weight, or `back` by its transpose."""
        there = self._experts.is_transposed != back  # [E, in, out]: what comes in meets the second dimension
        if self._grouped:
            multiply = gradients.linear_back if there else grouped.linear
            return multiply(x_SN, weight, groups.end_E)
        ends = groups.end_E.tolist()
        pieces = zip(weight, [0, *ends], ends, strict=False)
        return torch.cat([x_SN[a:b] @ (one if there else one.mT) for one, a, b in pieces])

    def _gated(self, gate_up_SF: Tensor) -> Tensor:
        if self._grouped and fused._is_silu(self._experts):
            return grouped.silu_gate(gate_up_SF)
        return self._experts._apply_gate(gate_up_SF)

    def _gate_back(self, gate_up_SF: Tensor, slope_SF: Tensor, weight_S: Tensor) -> gradients.GateBack:
        """Back through the activation: plain silu in one step, all others as autograd does it."""
        if fused._is_silu(self._experts) and self._experts.is_concatenated:
            return gradients.silu_gate_back(gate_up_SF, slope_SF, weight_S)
        grad_SF = slope_SF * weight_S[:, None].to(slope_SF.dtype)
        with torch.enable_grad():
            leaf_SF = gate_up_SF.detach().requires_grad_()
            inner_SF = self._experts._apply_gate(leaf_SF)
        (back_SF,) = torch.autograd.grad(inner_SF, leaf_SF, grad_SF)
        exact = torch.promote_types(slope_SF.dtype, torch.float32)
        inner_SF = inner_SF.detach()
        weight_grad_S = (inner_SF.to(exact) * slope_SF.to(exact)).sum(-1)
        return gradients.GateBack(back_SF, inner_SF, grad_SF, weight_grad_S)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_Tk: Tensor, groups: grouped.Groups, routed: Routed) -> Tensor:
        found_TD, gate_up_SF = routed.forward(hidden_TD, weight_Tk, groups)
        ctx.save_for_backward(gate_up_SF, weight_Tk)
        ctx.groups, ctx.routed = groups, routed
        return found_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.routed.backward(slope_TD, *ctx.saved_tensors, ctx.groups), None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, early: bool) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return grouped.rms_norm(x, weight_D, eps, early)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight_D = ctx.saved_tensors
        return gradients.rms_norm_back(x, weight_D, grad, ctx.eps), None, None, None


@contextmanager
def differentiable(layer: nn.Module, parts: adapter.MoeParts | None, keep: bool) -> Iterator[Routed | None]:
    """Run `layer` with our routed pass, and on CUDA in bf16 with fast norms, while this lasts. None for a dense layer.

    `keep`: whether collectors want what the way back finds. StageFailed for experts that are not of the form above.
    """
    with ExitStack() as undo:
        routed = None
        if parts is not None:
            _refuse_unusual(parts.experts)
            routed = Routed(parts.experts, keep)
            fused._patch(undo, parts.experts, routed.run)
        for norm in filter(fused._is_plain_norm, layer.modules()):
            fused._patch(undo, norm, _norm_of(norm))
        yield routed


def _norm_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    early = bool(fused._EARLY[type(module)])
    return lambda x: _Norm.apply(x, module.weight, fused._eps(module), early)


def _refuse_unusual(experts: nn.Module) -> None:
    unusual = ("has_post_expert_norm", "_is_expert_parallel")
    if not getattr(experts, "has_gate", False) or any(getattr(experts, flag, False) for flag in unusual):
        raise StageFailed(
            f"gradients through `{type(experts).__name__}` are not known here",
            hint="leave statistics of gradients out of `statistics`",
        )


def _one_visit_each(index_Tk: Tensor, weight_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Slots of a token that an alias map sends to one expert: the first gets the sum of their weights, the others -1
    and 0, so that their gradients of h are 0.
    """
    first_Tk = (index_Tk[:, :, None] == index_Tk[:, None, :]).int().argmax(-1)
    own_Tk = first_Tk == torch.arange(index_Tk.shape[1], device=index_Tk.device)
    return index_Tk.where(own_Tk, index_Tk.new_tensor(-1)), torch.zeros_like(weight_Tk).scatter_add(
        1, first_Tk, weight_Tk
    )
