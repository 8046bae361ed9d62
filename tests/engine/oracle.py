"""The catalogue's statistics again, from the whole model: plain hooks, loops over tokens, float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moecli.core.artifacts import Checkpoint
from moecli.engine.data import Batch
from moecli.families import expert_forward, family_of

NORM_BEFORE_BLOCK = {"lfm2_moe": "ffn_norm"}


def statistics(model: Any, source: Checkpoint, batches: Iterable[Batch]) -> dict[int, dict[str, Tensor]]:
    """{MoE layer: {name: value}} with `tokens` among them."""
    family = family_of(source.config)
    layers = {layer: _Layer(model, family, source, layer) for layer in source.facts.moe_layers}
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for layer in layers.values():
            layer.add(batch.attention_mask.flatten().tolist())
    return {index: layer.total for index, layer in layers.items()}


class _Layer:
    def __init__(self, model: Any, family: Any, source: Checkpoint, layer: int) -> None:
        self.family, self.facts = family, source.facts
        self.experts = [
            type(w)(*(None if t is None else t.double() for t in w))
            for w in (family.read_expert(source, layer, e) for e in range(source.facts.experts))
        ]
        self.router, self.bias = (self._router(source, layer, role) for role in ("weight", "bias"))
        self.scale = source.config.get("residual_multiplier", 1.0)
        experts, width = source.facts.experts, source.facts.hidden
        vectors = (
            "count",
            "gate_sum",
            "prob_sum",
            "ean_sum",
            "ean_sq",
            "gean_sum",
            "gean_sq",
            "easy",
            "absmax",
        )
        self.total: dict[str, Tensor] = {name: torch.zeros(experts, dtype=torch.float64) for name in vectors}
        self.total["y_mean"] = torch.zeros(experts, width, dtype=torch.float64)
        self.total["logit_gram"] = torch.zeros(experts, experts, dtype=torch.float64)
        self.total["tokens"] = torch.zeros(())
        norm = NORM_BEFORE_BLOCK.get(source.facts.model_type, "post_attention_layernorm")
        model.get_submodule(family.experts_module(layer)).register_forward_pre_hook(self._routing)
        model.get_submodule(f"model.layers.{layer}.{norm}").register_forward_pre_hook(self._stream)

    def _router(self, source: Checkpoint, layer: int, role: str) -> Tensor | None:
        name = self.family.router_role(source, layer, role)
        return None if name is None else source.get(name).double()

    def _routing(self, module: Any, args: tuple) -> None:
        hidden, index, weight = args
        self.seen = hidden.flatten(0, -2).double(), index.tolist(), weight.double()

    def _stream(self, module: Any, args: tuple) -> None:
        self.before = args[0].flatten(0, -2).double()

    def add(self, mask: list[int]) -> None:
        hidden, index, weight = self.seen
        for t in (t for t, valid in enumerate(mask) if valid):
            self._add(hidden[t], index[t], weight[t], self.before[t])

    def _add(self, x_D: Tensor, chosen: list[int], g_k: Tensor, before_D: Tensor) -> None:
        total = self.total
        logits = self.router @ x_D + (0 if self.bias is None else self.bias)
        total["tokens"] += 1
        total["prob_sum"] += logits.sigmoid() if self.facts.score == "sigmoid" else logits.softmax(-1)
        total["logit_gram"] += torch.outer(logits, logits)
        y_ED = torch.stack([expert_forward(self.family, w, x_D[None])[0] for w in self.experts])
        total["y_mean"] += y_ED
        routed = sum(g * y_ED[e] for e, g in zip(chosen, g_k, strict=True)) * self.scale
        change = max(0.0, 1 - float(torch.cosine_similarity(before_D, before_D + routed, dim=0)))
        for expert, gate in zip(chosen, g_k.tolist(), strict=True):
            norm = float(y_ED[expert].norm())
            shares: Mapping[str, float] = {
                "count": 1, "gate_sum": gate, "ean_sum": norm, "ean_sq": norm**2, "gean_sum": gate * norm,
                "gean_sq": (gate * norm) ** 2, "easy": gate * norm * change,
            }  # fmt: skip
            for name, share in shares.items():
                total[name][expert] += share
            total["absmax"][expert] = max(float(total["absmax"][expert]), float(y_ED[expert].abs().max()))
