"""Corrections of packed weights (`compensate/...`) as a PEFT adapter beside the exported model.

    adapter/adapter_config.json          LoRA of rank r, alpha r: lora_B lora_A is added as it is
    adapter/adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, K], .lora_B.weight [N, r]

It lies in a folder of its own: transformers takes a model folder with an adapter_config.json in it for an adapter.
Modules have the names that transformers gives them, and those of routed experts, which it fuses, their names on disk:
PEFT finds these only in programs that keep experts apart.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moecli.core.artifacts import Checkpoint
from moecli.io.durable import json_text, natural_key, write_text
from moecli.io.formats import DenseView, corrected_weights, factor_names
from moecli.io.tensorfile import read_header, read_tensor, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"


class _Factors(NamedTuple):
    """PEFT's names of one correction, and moecli's."""

    module: str
    tensors: dict[str, str]


def write_adapter(checkpoint: Checkpoint, model_folder: Path | str) -> None:
    """Write `adapter/` into the folder of an exported model; nothing for a checkpoint without corrections."""
    factors = _factors(checkpoint)
    if not factors:
        return
    folder = Path(model_folder) / FOLDER
    folder.mkdir(exist_ok=True)
    names = {peft: name for found in factors for peft, name in found.tensors.items()}
    specs = {peft: checkpoint.spec(name) for peft, name in names.items()}
    write_tensors(folder / WEIGHTS, specs, lambda peft: checkpoint.get(names[peft]))
    write_text(folder / CONFIG, json_text(_config(checkpoint, factors)))


def adapter_problems(checkpoint: Checkpoint, model_folder: Path | str) -> list[str]:
    """What of a checkpoint's corrections is not in the folder bit by bit, one sentence each."""
    import torch

    file = Path(model_folder) / FOLDER / WEIGHTS
    if not file.is_file():
        return [f"`{FOLDER}/{WEIGHTS}` is missing"]
    entries = dict(read_header(file).entries)
    problems = []
    for found in _factors(checkpoint):
        for peft, name in found.tensors.items():
            entry = entries.pop(peft, None)
            if entry is None:
                problems.append(f"`{peft}` is missing from the adapter")
            elif not torch.equal(_bits(read_tensor(entry)), _bits(checkpoint.get(name))):
                problems.append(f"`{peft}` of the adapter differs from the stage that wrote it")
    return [*problems, *(f"`{peft}` is in the adapter, but no stage wrote it" for peft in entries)]


def _factors(checkpoint: Checkpoint) -> list[_Factors]:
    from moecli.families.adapter import empty_model, tensor_map

    corrected = sorted(corrected_weights(checkpoint.names()), key=natural_key)
    if not corrected:
        return []
    dense = DenseView(checkpoint)
    targets = tensor_map(empty_model(dense.config), dense).targets
    found = []
    for name in corrected:
        target = targets[name] if targets[name].endswith(".weight") else name
        module, factors = target.removesuffix(".weight"), factor_names(name)
        stem = f"base_model.model.{module}"
        tensors = {f"{stem}.lora_A.weight": factors.a, f"{stem}.lora_B.weight": factors.b}
        found.append(_Factors(module, tensors))
    return found


def _config(checkpoint: Checkpoint, factors: list[_Factors]) -> dict[str, Any]:
    ranks = {found.module: checkpoint.spec(next(iter(found.tensors.values()))).shape[0] for found in factors}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: value for module, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": other, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "target_modules": list(ranks),
    }  # fmt: skip


def _bits(value: Tensor) -> Tensor:
    import torch

    return value.contiguous().view(-1).view(torch.uint8)
