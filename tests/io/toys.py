"""Checkpoints small enough to check by eye, made with the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moecli.core.model import ModelFacts

CONFIG = {"model_type": "toy", "num_experts": 4, "hidden_size": 8}


def toy_facts(config: Mapping[str, Any]) -> ModelFacts:
    experts = config["num_experts"]
    return ModelFacts(
        model_type=config["model_type"], layers=2, moe_layers=(0, 1), experts=experts, top_k=2, hidden=8,
        expert_width=4, vocab=16, dtype="float32", score="softmax", renormalized=True, max_positions=64,
        router_rows=experts, quantized=(config.get("quantization_config") or {}).get("quant_method"),
    )  # fmt: skip


def numbered(names: Sequence[str], shape: tuple[int, ...] = (4, 2)) -> dict[str, Tensor]:
    """A tensor for each name, all different."""
    return {name: torch.full(shape, float(i)) for i, name in enumerate(names)}


def make_folder(
    folder: Path,
    tensors: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    config: Mapping[str, Any] = CONFIG,
    side_files: Mapping[str, str] | None = None,
) -> Path:
    """One mapping gives `model.safetensors`; a list of them gives as many shards and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in (side_files or {}).items():
        (folder / name).write_text(text)
    if isinstance(tensors, Mapping):
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, shard in enumerate(tensors, start=1):
        file = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file(dict(shard), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
