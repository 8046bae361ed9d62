"""What the engine runs in the place of a layer's stock modules, on CUDA in bf16: one grouped pass through the routed
experts that keeps the un-gated outputs, and RMS norms that read their input once.

The stock experts module gives only the weighted sum, so statistics of single outputs would run the experts twice;
its norms and its weighting pass over memory many times. Products and roundings here follow the stock modules, only
the order inside a sum differs: hidden states agree within a few units of bf16 rounding. fp32 models, other devices
and experts of another layout (biases, transposed or interleaved storage) keep the stock modules and their exact bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecli.families import adapter
from moecli.families.alias import ALIAS_MAP
from moecli.ops import grouped

_GATE_UP_BYTES = 512 << 20
"""Largest intermediate of all experts on all tokens held at a time."""
_GROUPED_MM_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Visits:
    """What one pass through the experts leaves behind. S = T*k visits, sorted by expert; padding is among them."""

    groups: grouped.Groups
    output_SD: Tensor | None
    """y, un-gated"""
    square_S: Tensor | None
    """float32, ||y||^2"""
    largest_S: Tensor | None
    """float32, max |y|"""
    inner_SF: Tensor | None
    """h, what the down projection takes"""


class FusedLayer:
    """A decoder layer with its stock modules replaced; `visits` of the latest pass when they are asked for: outputs
    with `keep`, what down projections take with `inner`.
    """

    def __init__(self, parts: adapter.MoeParts | None, keep: bool, inner: bool = False) -> None:
        self.experts = parts.experts if parts is not None and is_plain(parts.experts) else None
        self._keep, self._inner, self._visits = keep, inner, None

    def take(self) -> Visits | None:
        """The latest pass, given away so that its memory can go."""
        visits, self._visits = self._visits, None
        return visits

    def run(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Stands for the forward of the experts module."""
        experts = self.experts
        hidden_TD, index_Tk, weight_Tk = (x.reshape(-1, x.shape[-1]) for x in (hidden, index, weight))
        alias_E = getattr(experts, ALIAS_MAP, None)
        if alias_E is not None:
            index_Tk = alias_E[index_Tk]
        groups = grouped.group(index_Tk, experts.num_experts)
        inner_SF = inner_sorted(experts, hidden_TD[groups.slot_S // index_Tk.shape[1]], groups.end_E)
        y_SD = grouped.linear(inner_SF, experts.down_proj, groups.end_E)
        found = grouped.combine(y_SD, groups.place_Tk, weight_Tk, read=self._keep)
        if self._keep or self._inner:
            output_SD, kept_SF = y_SD if self._keep else None, inner_SF if self._inner else None
            self._visits = Visits(groups, output_SD, found.square_S, found.largest_S, kept_SF)
        return found.routed_TD.view(hidden.shape)

    def sum_all(self, hidden_TD: Tensor, weight_TE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sum over tokens of y of every expert, float32 [E, D], and the sum weighted by token and expert.

        Sums are taken before the last product, which is linear: a third of the arithmetic is not needed.
        """
        experts = self.experts
        rows = experts.gate_up_proj.shape[1]
        per_call = max(1, _GATE_UP_BYTES // (len(hidden_TD) * rows * hidden_TD.element_size()))
        sums = []
        for start, some in enumerate(experts.gate_up_proj.split(per_call)):
            part = slice(start * per_call, start * per_call + len(some))
            gate_up_TEF = (hidden_TD @ some.flatten(0, 1).T).view(len(hidden_TD), len(some), rows)
            inner = _gated_sums(experts, gate_up_TEF, None if weight_TE is None else weight_TE[:, part])
            down_EDF = experts.down_proj[part].float()
            sums.append([None if i is None else torch.bmm(down_EDF, i[..., None])[..., 0] for i in inner])
        plain, weighted = zip(*sums, strict=True)
        return torch.cat(plain), None if weight_TE is None else torch.cat(weighted)


def inner_sorted(experts: nn.Module, x_SD: Tensor, end_E: Tensor) -> Tensor:
    """h of each row, rows sorted by expert: what the down projection takes, [S, F]."""
    gate_up = grouped.linear(x_SD, experts.gate_up_proj, end_E)
    del x_SD
    return grouped.silu_gate(gate_up) if _is_silu(experts) else experts._apply_gate(gate_up)


def inner_of(experts: nn.Module, x_SD: Tensor, expert_S: Tensor) -> Tensor:
    """h of each row by its own expert, [S, F], for every layout of the stock experts modules; rows sorted by expert.

    Rows of an expert after the last are computed by the last.
    """
    index_S = expert_S.clamp(max=experts.num_experts - 1)
    weight_EFD = experts.gate_up_proj.mT if experts.is_transposed else experts.gate_up_proj
    gate_up = grouped.linear(x_SD, weight_EFD, _ends(index_S, experts.num_experts))
    if experts.has_bias:
        gate_up = gate_up + experts.gate_up_proj_bias[index_S]
    return experts._apply_gate(gate_up)


def outputs_of(experts: nn.Module, x_SD: Tensor, expert_S: Tensor) -> Tensor:
    """Un-gated y of each row by its own expert, [S, D], for the plain layout; rows sorted by expert."""
    end_E = _ends(expert_S.clamp(max=experts.num_experts - 1), experts.num_experts)
    return grouped.linear(inner_sorted(experts, x_SD, end_E), experts.down_proj, end_E)


def _ends(expert_S: Tensor, experts: int) -> Tensor:
    following = torch.arange(1, experts + 1, dtype=torch.int32, device=expert_S.device)
    return torch.searchsorted(expert_S, following, out_int32=True)


@contextmanager
def fused(layer: nn.Module, parts: adapter.MoeParts | None, keep: bool, inner: bool = False) -> Iterator[FusedLayer]:
    """Run `layer` with faster modules while this lasts. Where none fit, `FusedLayer.experts` is None and nothing
    changes.
    """
    plan = FusedLayer(parts, keep, inner)
    with ExitStack() as undo:
        if plan.experts is not None:
            _patch(undo, plan.experts, plan.run)
        for norm in filter(_is_plain_norm, layer.modules()):
            _patch(undo, norm, _norm_of(norm))
        yield plan


def _patch(undo: ExitStack, module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Only the instance: hooks still run, other layers do not notice."""
    module.forward = forward
    undo.callback(module.__dict__.pop, "forward")


def suits(tensor: Tensor) -> bool:
    """Whether grouped products of this tensor run on its device: bf16 on CUDA."""
    if not tensor.is_cuda or tensor.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= _GROUPED_MM_CAPABILITY


# --- what fits ------------------------------------------------------------------------------------


def is_plain(experts: nn.Module) -> bool:
    """Gate and up in one [E, 2F, D], down in [E, D, F], no biases, nothing after; sizes in steps of 16 bytes."""
    up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.dim() != 3 or down.dim() != 3:
        return False
    names = {name for name, _ in experts.named_parameters()}
    unusual = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    return (
        names == {"gate_up_proj", "down_proj"}
        and up.shape == (len(down), 2 * down.shape[2], down.shape[1])
        and not any(getattr(experts, flag, False) for flag in unusual)
        and getattr(experts, "has_gate", False)
        and getattr(experts, "is_concatenated", True)
        and all(size % 8 == 0 for size in down.shape[1:])
        and suits(up)
    )


def _is_silu(experts: nn.Module) -> bool:
    gate = getattr(type(experts), "_apply_gate", None)
    stock = getattr(gate, "__name__", "") == "_default_apply_gate"
    return stock and type(getattr(experts, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _gated_sums(experts: nn.Module, gate_up_TEF: Tensor, weight_TE: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if _is_silu(experts):
        return grouped.silu_gate_sum(gate_up_TEF, weight_TE)
    return grouped.sums_over_tokens(experts._apply_gate(gate_up_TEF), weight_TE)


# --- norms ----------------------------------------------------------------------------------------

_EARLY: dict[type, bool | None] = {}
"""The `early` with which `ops.grouped.rms_norm` computes what a class of norms computes, found by trying; None: neither
does."""


def _is_plain_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or not suits(weight):
        return False
    if weight.dim() != 1 or _eps(module) is None:
        return False
    if type(module) not in _EARLY:
        _EARLY[type(module)] = _early(module)
    return _EARLY[type(module)] is not None


def _eps(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _early(module: nn.Module) -> bool | None:
    """Compare both ways once, on random values and with a weight that is neither 0 nor 1, so that norms which scale by
    1 + weight are told apart. Up to rounding means: the order inside the mean moves the last bit of few values.
    """
    stock = module.weight
    source = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(64, len(stock), generator=source)
    weight = torch.rand(len(stock), generator=source) + 0.5
    x, weight = x.to(stock), weight.to(stock)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        wanted = module(x)
    finally:
        module._parameters["weight"] = stock
    for early in (True, False):
        found = grouped.rms_norm(x, weight, _eps(module), early)
        if found.dtype == wanted.dtype and _equal_up_to_rounding(found, wanted):
            return early
    return None


def _equal_up_to_rounding(found: Tensor, wanted: Tensor) -> bool:
    near = torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=0)
    return near and (found.dtype != torch.bfloat16 or bool((found != wanted).float().mean() < 0.02))


def _norm_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    early = bool(_EARLY[type(module)])
    return lambda x: grouped.rms_norm(x, module.weight, _eps(module), early)
