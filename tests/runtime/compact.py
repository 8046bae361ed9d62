"""Toy compact checkpoints, written by hand so that the loader is tested against nothing of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecli.ops.pack import dequantize, pack_rows, quantize_rtn

LAYERS, EXPERTS, TOP_K, WIDTH, HIDDEN, VOCAB = 2, 8, 2, 32, 32, 64

_COMMON = {
    "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "intermediate_size": WIDTH,
    "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "gpt_oss": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "granitemoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": None, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_intermediate_size": WIDTH,
        "moe_layer_start_index": 0, "moe_num_shared_experts": 1,
    },
}  # fmt: skip
"""Each layout on disk (per expert, w1/w2/w3, fused, transposed) and each kind of router tensor."""


def make_model(folder: Path, family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> Path:
    """A stock toy model with random weights; router biases are random too, so that losing one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES[family]), dtype=dtype)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "bias" in name or "router" in name or "gate.weight" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(folder)
    return folder


def alias_of(layer: int, experts: int) -> list[int]:
    """Which of `experts` each of the router's rows leads to; not sorted, and different in each layer."""
    return [(row * 3 + layer) % experts for row in range(EXPERTS)]


def write_compact(
    source: Path, folder: Path, experts: dict[int, int], bits: int | None = None, group_size: int = 16
) -> Path:
    """Keep experts 0..M-1 of each layer behind an alias map; pack every weight but router and ends."""
    tensors = load_file(source / "model.safetensors")
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        kept = _kept(name, value, experts)
        if kept is not None:
            out |= packed(name, kept, bits, group_size) if bits and packs(name) else {name: kept}
    for layer, count in experts.items():
        block = _block(tensors, layer)
        if count != EXPERTS:
            out[f"{block}experts.alias_map"] = torch.tensor(alias_of(layer, count))
    config = json.loads((source / "config.json").read_text())
    quantization: dict[str, Any] = {
        "quant_method": "moecli",
        "experts": {str(k): v for k, v in experts.items()},
    }
    quantization |= {"rows": EXPERTS, "packed": None}
    if bits:
        quantization["packed"] = {"bits": bits, "group_size": group_size}
        quantization["guard"] = f"{_memory_block(source)}experts.down_proj"
        out[quantization["guard"]] = torch.empty(0, dtype=torch.uint8)
    write(folder, config | {"quantization_config": quantization}, out)
    return folder


def write_expanded(source: Path, folder: Path, experts: dict[int, int], bits: int | None = None) -> Path:
    """What the compact model must compute: a stock model in which each row has its own copy, rounded."""
    tensors = load_file(source / "model.safetensors")
    out = {}
    for name, value in tensors.items():
        if bits and packs(name):
            value = rounded(name, value, bits)
        out[name] = value
    for name in list(out):
        layer = _layer(name)
        if layer not in experts or experts[layer] == EXPERTS or not is_expert(name):
            continue
        alias = alias_of(layer, experts[layer])
        if match := re.search(r"experts\.(\d+)\.", name):
            row = int(match[1])
            source_name = name.replace(f"experts.{row}.", f"experts.{alias[row]}.")
            out[name] = rounded(name, tensors[source_name], bits) if bits else tensors[source_name]
        else:
            out[name] = out[name][alias]
    write(folder, json.loads((source / "config.json").read_text()), out)
    return folder


def rounded(name: str, weight: Tensor, bits: int) -> Tensor:
    inputs_last = weight.mT if transposed(name) else weight
    dense = dequantize(*quantize_rtn(inputs_last, bits, 16))
    return dense.mT if transposed(name) else dense


def packed(name: str, weight: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    codes, scale = quantize_rtn(weight.mT if transposed(name) else weight, bits, group_size)
    shape = [*weight.shape, int(transposed(name))] if weight.dim() == 3 else list(weight.shape)
    return {
        f"{name}_packed": pack_rows(codes, bits),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(shape),
    }


def packs(name: str) -> bool:
    ends = ("embed_tokens", "lm_head", "norm", ".gate.", "router", "bias")
    return name.endswith(("weight", "proj")) and not any(part in name for part in ends)


def transposed(name: str) -> bool:
    """gpt_oss: the experts of a layer with inputs before outputs."""
    return name.endswith("_proj")


def is_expert(name: str) -> bool:
    return ".experts." in name or "input_linear" in name or "output_linear" in name


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous().clone() for k, v in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def logits(folder: Path, **options: Any) -> Tensor:
    """Logits of fixed tokens; the loading info must be empty."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits


TOKENS = torch.arange(24).reshape(2, 12) * 5 % VOCAB


def _kept(name: str, value: Tensor, experts: dict[int, int]) -> Tensor | None:
    layer = _layer(name)
    if layer not in experts or not is_expert(name):
        return value
    match = re.search(r"experts\.(\d+)\.", name)
    if match is None:
        return value[: experts[layer]]
    return value if int(match[1]) < experts[layer] else None


def _layer(name: str) -> int:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _block(tensors: dict[str, Tensor], layer: int) -> str:
    name = next(n for n in tensors if f"layers.{layer}." in n and is_expert(n))
    return re.split(r"experts\.|input_linear|output_linear", name)[0]


def _memory_block(source: Path) -> str:
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    return "model.layers.0.block_sparse_moe." if model_type == "granitemoe" else "model.layers.0.mlp."
