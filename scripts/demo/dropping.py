"""Drop a random half of the experts of every layer: the damage any method has to beat."""

from __future__ import annotations

from random import Random

import torch


def drop_experts(model: torch.nn.Module, keep: int, seed: int) -> list[list[int]]:
    """Keep `keep` random experts per layer, in place, with their router rows; return who stays."""
    rng = Random(f"drop/{seed}")
    kept = []
    for layer in model.model.layers:
        stay = sorted(rng.sample(range(len(layer.mlp.gate.weight)), keep))
        _slice(layer.mlp, stay)
        kept.append(stay)
    model.config.num_experts = keep
    return kept


def _slice(block: torch.nn.Module, stay: list[int]) -> None:
    experts, gate = block.experts, block.gate
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.data[stay])
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data[stay])
    gate.weight = torch.nn.Parameter(gate.weight.data[stay])
    experts.num_experts = gate.num_experts = len(stay)
