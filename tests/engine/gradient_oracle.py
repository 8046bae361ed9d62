"""Statistics of gradients again, from autograd through the whole model: one graph, loops over tokens and slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moecli.core.artifacts import Checkpoint
from moecli.core.model import ModelFacts
from moecli.engine.data import Batch
from moecli.families import family_of

SUMS = ("count", "gate_sum", "h2", "gh2", "hgh", "hgh2")


def statistics(
    model: Any, source: Checkpoint, batches: Sequence[Batch], left_out: Tensor | None = None
) -> tuple[float, dict[int, dict[str, Tensor]]]:
    """Summed loss, and {MoE layer: {name: sum}} over tokens that are no padding, but for those `left_out` [B, S].
    `model` is changed.
    """
    family, facts = family_of(source.config), source.facts
    plain = {layer: _Plain(model, family, source, layer) for layer in facts.moe_layers}
    total = {layer: {name: _zeros(name, facts) for name in SUMS} for layer in plain}
    loss_of_all = 0.0
    for batch in batches:
        loss = _loss(model, batch)
        loss.backward()
        loss_of_all += float(loss.detach())
        for layer, experts in plain.items():
            counted = batch.attention_mask if left_out is None else batch.attention_mask.masked_fill(left_out, 0)
            experts.add_to(total[layer], counted.flatten().tolist())
    return loss_of_all, total


def _zeros(name: str, facts: ModelFacts) -> Tensor:
    per_expert = name in ("count", "gate_sum")
    shape = (facts.experts,) if per_expert else (facts.experts, facts.expert_width)
    return torch.zeros(shape, dtype=torch.float64)


def _loss(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    losses = []
    for ids, mask, row in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), logits, strict=True):
        for t in range(len(ids) - 1):
            if mask[t] and mask[t + 1]:
                losses.append(functional.cross_entropy(row[t], torch.tensor(ids[t + 1])))
    return torch.stack(losses).sum()


class _Plain:
    """The experts of one layer, computed visit by visit with the weights as they are on disk."""

    def __init__(self, model: Any, family: Any, source: Checkpoint, layer: int) -> None:
        dtype = model.dtype
        self.family = family
        self.weights = [
            type(w)(*(None if t is None else t.to(dtype) for t in w))
            for w in (family.read_expert(source, layer, e) for e in range(source.facts.experts))
        ]
        experts: nn.Module = model.get_submodule(family.experts_module(layer))
        experts.forward = self.forward

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        self.index, self.weight = index.tolist(), weight.tolist()
        self.inner: list[list[Tensor]] = []
        rows = []
        for t, chosen in enumerate(self.index):
            self.inner.append([])
            total = 0
            for slot, expert in enumerate(chosen):
                w = self.weights[expert]
                gate, up = _affine(hidden_TD[t], w.gate_FD, w.gate_bias_F), _affine(hidden_TD[t], w.up_FD, w.up_bias_F)
                h = self.family.gate_and_up(gate, up)
                h.retain_grad()
                self.inner[t].append(h)
                total = total + weight[t, slot] * _affine(h, w.down_DF, w.down_bias_D)
            rows.append(total)
        return torch.stack(rows).to(hidden.dtype).view(hidden.shape)

    def add_to(self, total: dict[str, Tensor], mask: list[int]) -> None:
        for t in (t for t, valid in enumerate(mask) if valid):
            for slot, expert in enumerate(self.index[t]):
                h = self.inner[t][slot]
                value, slope = h.detach().double(), h.grad.double()
                total["count"][expert] += 1
                total["gate_sum"][expert] += self.weight[t][slot]
                for name, share in (
                    ("h2", value**2), ("gh2", slope**2), ("hgh", value * slope), ("hgh2", (value * slope) ** 2),
                ):  # fmt: skip
                    total[name][expert] += share


def _affine(x_D: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = weight @ x_D
    return y if bias is None else y + bias
