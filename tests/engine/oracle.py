"""The catalogue's statistics again, from the whole model: plain hooks, loops over tokens, float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moecli.core.artifacts import Checkpoint, ExpertWeights, LayerStats
from moecli.engine.collectors import CATALOGUE
from moecli.engine.collectors.samples import token_key
from moecli.engine.data import Batch
from moecli.families import expert_forward, family_of

VECTORS = (
    "count", "gate_sum", "gate_sq", "prob_sum", "prob_routed", "ean_sum", "ean_sq", "gean_sum", "gean_sq", "easy",
    "share", "absmax",
)  # fmt: skip
OF_X, OF_H = ("x2", "px2", "x_abs", "x_max"), ("h1", "h2", "h_abs", "h_max", "ph2", "phmax")
NORM_BEFORE_BLOCK = {"lfm2_moe": "ffn_norm"}


def statistics(model: Any, source: Checkpoint, batches: Iterable[Batch]) -> dict[int, dict[str, Tensor]]:
    """{MoE layer: {name: value}} with `tokens` among them."""
    family = family_of(source.config)
    layers = {layer: _Layer(model, family, source, layer) for layer in source.facts.moe_layers}
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        before: list[list[int]] | None = None
        for layer in layers.values():
            before = layer.add(batch.attention_mask.flatten().tolist(), before)
    return {index: layer.found() for index, layer in layers.items()}


class _Layer:
    def __init__(self, model: Any, family: Any, source: Checkpoint, layer: int) -> None:
        self.family, self.facts = family, source.facts
        self.experts = [
            type(w)(*(None if t is None else t.double() for t in w))
            for w in (family.read_expert(source, layer, e) for e in range(source.facts.experts))
        ]
        self.router, self.bias = (self._router(source, layer, role) for role in ("weight", "bias"))
        self.scale = source.config.get("residual_multiplier", 1.0)
        experts, width, inner = source.facts.experts, source.facts.hidden, source.facts.expert_width
        first = layer == source.facts.moe_layers[0]
        shapes = {
            **dict.fromkeys(VECTORS, (experts,)), **dict.fromkeys(OF_X, (experts, width)),
            **dict.fromkeys(OF_H, (experts, inner)),
            "y_mean": (experts, width), "gy_mean": (experts, width), "entropy": (1,), "block_cos": (1,), "tokens": (),
            **dict.fromkeys(("logit_gram", "gram_cos", "coactivation"), (experts, experts)),
            "transition": (0 if first else experts, experts),
            "x_cov": (experts, width, width), "gx_cov": (experts, width, width), "x_cov_pool": (1, width, width),
            **dict.fromkeys(("h_cov", "gh_cov", "ph_cov"), (experts, inner, inner)),
        }  # fmt: skip
        self.total: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
        }
        self.rows: dict[str, list[Tensor]] = {n: [] for n in ("topk_idx", "topk_w", "tok_reservoir", "act_sample")}
        norm = NORM_BEFORE_BLOCK.get(source.facts.model_type, "post_attention_layernorm")
        model.get_submodule(family.experts_module(layer)).register_forward_pre_hook(self._routing)
        model.get_submodule(f"model.layers.{layer}.{norm}").register_forward_pre_hook(self._stream)
        model.get_submodule(family.moe_block(layer)).register_forward_hook(self._added)

    def _router(self, source: Checkpoint, layer: int, role: str) -> Tensor | None:
        name = self.family.router_role(source, layer, role)
        return None if name is None else source.get(name).double()

    def _routing(self, module: Any, args: tuple) -> None:
        hidden, index, weight = args
        self.seen = hidden.flatten(0, -2).double(), index.tolist(), weight.double()

    def _stream(self, module: Any, args: tuple) -> None:
        self.before = args[0].flatten(0, -2).double()

    def _added(self, module: Any, args: tuple, out: Any) -> None:
        self.after = (out[0] if isinstance(out, tuple) else out).flatten(0, -2).double() * self.scale

    def add(self, mask: list[int], before: list[list[int]] | None) -> list[list[int]]:
        """One batch; `before` and the answer say where all of its tokens went, padding among them."""
        hidden, index, weight = self.seen
        for t in (t for t, valid in enumerate(mask) if valid):
            self._add(hidden[t], index[t], weight[t], self.before[t], self.after[t])
            for old in before[t] if before is not None else ():
                for new in index[t]:
                    self.total["transition"][old, new] += 1
        return index

    def found(self) -> dict[str, Tensor]:
        rows = {name: torch.stack(values) for name, values in self.rows.items()}
        order = token_key(torch.arange(len(rows["topk_idx"]))).argsort()
        sample = {
            "tok_reservoir": rows["tok_reservoir"][order][: CATALOGUE["tok_reservoir"].tokens],
            "act_sample": rows["act_sample"][order][: CATALOGUE["act_sample"].tokens].transpose(0, 1),
        }
        return self.total | rows | sample

    def _add(self, x_D: Tensor, chosen: list[int], g_k: Tensor, before_D: Tensor, block_D: Tensor) -> None:
        total = self.total
        logits = self.router @ x_D + (0 if self.bias is None else self.bias)
        softmax = logits.softmax(-1)
        score = logits.sigmoid() if self.facts.score == "sigmoid" else softmax
        total["tokens"] += 1
        total["prob_sum"] += score
        total["entropy"] -= (softmax * softmax.log()).sum()
        total["logit_gram"] += torch.outer(logits, logits)
        total["block_cos"] += x_D @ block_D / (x_D.norm() * block_D.norm())
        y_ED = torch.stack([expert_forward(self.family, w, x_D[None])[0] for w in self.experts])
        h_EF = torch.stack([expert_forward(self.family, _without_down(w), x_D[None])[0] for w in self.experts])
        total["y_mean"] += y_ED
        total["gy_mean"] += softmax[:, None] * y_ED
        total["gram_cos"] += torch.cosine_similarity(y_ED[:, None], y_ED[None], dim=-1)
        total["x_cov_pool"][0] += torch.outer(x_D, x_D)
        pairs = sorted(zip(g_k.tolist(), chosen, strict=True), key=lambda pair: -pair[0])
        self.rows["topk_idx"].append(torch.tensor([e for _, e in pairs]))
        self.rows["topk_w"].append(torch.tensor([g for g, _ in pairs]))
        self.rows["tok_reservoir"].append(x_D)
        self.rows["act_sample"].append(h_EF)
        routed = sum(g * y_ED[e] for e, g in zip(chosen, g_k, strict=True)) * self.scale
        change = max(0.0, 1 - float(torch.cosine_similarity(before_D, before_D + routed, dim=0)))
        for expert, gate in zip(chosen, g_k.tolist(), strict=True):
            norm = float(y_ED[expert].norm())
            h_F = h_EF[expert]
            shares: Mapping[str, Any] = {
                "share": gate * float(y_ED[expert] @ routed) / (float(block_D @ block_D) + 1e-6),
                "count": 1, "gate_sum": gate, "gate_sq": gate**2, "ean_sum": norm, "ean_sq": norm**2,
                "gean_sum": gate * norm, "gean_sq": (gate * norm) ** 2, "easy": gate * norm * change,
                "prob_routed": score[expert], "x2": x_D**2, "px2": (gate * x_D) ** 2, "x_abs": x_D.abs(),
                "h1": h_F, "h2": h_F**2, "h_abs": h_F.abs(), "ph2": (gate * h_F) ** 2,
                "x_cov": torch.outer(x_D, x_D), "gx_cov": gate * torch.outer(x_D, x_D),
                "h_cov": torch.outer(h_F, h_F), "gh_cov": gate * torch.outer(h_F, h_F),
                "ph_cov": torch.outer(gate * h_F, gate * h_F),
            }  # fmt: skip
            for name, share in shares.items():
                total[name][expert] += share
            for other in chosen:
                total["coactivation"][expert, other] += 1
            largest = {"absmax": y_ED[expert].abs().max(), "x_max": x_D.abs(), "h_max": h_F.abs(),
                       "phmax": (gate * h_F).abs()}  # fmt: skip
            for name, value in largest.items():
                total[name][expert] = torch.maximum(total[name][expert], value)


def _without_down(w: ExpertWeights) -> ExpertWeights:
    """The expert with an identity in the place of its down projection: its output is what that would take."""
    width = w.gate_FD.shape[0]
    bias = None if w.down_bias_D is None else torch.zeros(width, dtype=torch.float64)
    return w._replace(down_DF=torch.eye(width, dtype=torch.float64), down_bias_D=bias)


def assert_same(found: LayerStats, expected: Mapping[str, Tensor], where: str) -> None:
    """Every statistic of the oracle; float16 weights as such, the others to the precision of float32 sums."""
    for name, value in expected.items():
        size = max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        rtol, atol = (1e-3, 1e-3) if name == "topk_w" else (2e-4, 2e-5 * size)
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{where} {n}: {m}"
        )
