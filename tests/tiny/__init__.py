"""Toy checkpoints: two MoE layers, eight experts, random weights, in the family's own on-disk layout.

Families with dense layers in front get one (so their folder has `layers + 1` layers); hybrid families
alternate their two kinds of layer. Routers are wide enough that routing is not degenerate, and correction
biases are not zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB, HIDDEN, WIDTH, HEADS, HEAD_DIM = 128, 64, 32, 4, 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_NARROW = {"intermediate_size": WIDTH}
_BOTH_WIDTHS = {"intermediate_size": 48, "moe_intermediate_size": WIDTH}
_LATENT_ATTENTION = {
    "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": HEAD_DIM, "first_k_dense_replace": 1,
}  # fmt: skip
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip

# model_type -> (name of the expert count, name of top_k, dense layers in front, further fields)
_RECIPES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "qwen3_moe": ("num_experts", "num_experts_per_tok", 0, _BOTH_WIDTHS | {
        "head_dim": HEAD_DIM, "norm_topk_prob": True,
    }),
    "qwen2_moe": ("num_experts", "num_experts_per_tok", 0, _BOTH_WIDTHS | {
        "shared_expert_intermediate_size": 40,
    }),
    "mixtral": ("num_local_experts", "num_experts_per_tok", 0, _NARROW),
    "olmoe": ("num_experts", "num_experts_per_tok", 0, _NARROW),
    "deepseek_v2": ("n_routed_experts", "num_experts_per_tok", 1, _BOTH_WIDTHS | _LATENT_ATTENTION | {
        "n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 1.5,
    }),
    "deepseek_v3": ("n_routed_experts", "num_experts_per_tok", 1, _BOTH_WIDTHS | _LATENT_ATTENTION | {
        "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0,
    }),
    "glm4_moe": ("n_routed_experts", "num_experts_per_tok", 1, _BOTH_WIDTHS | {
        "head_dim": HEAD_DIM, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "routed_scaling_factor": 1.5,
    }),
    "phimoe": ("num_local_experts", "num_experts_per_tok", 0, _NARROW | {
        "attention_bias": True, "lm_head_bias": True,
        "router_jitter_noise": 0.2,  # wide, so that more than one logit is inside the band
    }),
    "gpt_oss": ("num_local_experts", "num_experts_per_tok", 0, _NARROW | {
        "head_dim": HEAD_DIM, "sliding_window": 16,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
                            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 8},
    }),
    "granitemoe": ("num_local_experts", "num_experts_per_tok", 0, _NARROW | {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5,
    }),
    "ernie4_5_moe": ("moe_num_experts", "moe_k", 1, _BOTH_WIDTHS | {
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    }),
    "minimax_m2": ("num_local_experts", "num_experts_per_tok", 0, _NARROW | {"head_dim": HEAD_DIM}),
    "lfm2_moe": ("num_experts", "num_experts_per_tok", 1, _BOTH_WIDTHS | {"num_dense_layers": 1}),
    "qwen3_next": ("num_experts", "num_experts_per_tok", 0, _BOTH_WIDTHS | _LINEAR_ATTENTION | {
        "head_dim": HEAD_DIM, "shared_expert_intermediate_size": 40,
    }),
}  # fmt: skip
_KINDS = {"lfm2_moe": ("conv", "full_attention"), "qwen3_next": ("linear_attention", "full_attention")}

FAMILIES: tuple[str, ...] = tuple(_RECIPES)
"""Model types that `make` knows."""


def make(
    model_type: str,
    folder: str | Path,
    *,
    layers: int = 2,
    experts: int = 8,
    seed: int = 0,
    dtype: str = "float32",
    top_k: int = 2,
    shards: int = 1,
    **fields: Any,
) -> Path:
    """Write a toy model with a tokenizer to `folder` and return it. `layers` counts MoE layers.

    `shards` > 1 splits the weights into at least that many files. Other keywords overrule the config.
    """
    folder = Path(folder)
    model = build(model_type, layers=layers, experts=experts, seed=seed, dtype=dtype, top_k=top_k, **fields)
    size = sum(t.nbytes for t in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=-(-size // shards) if shards > 1 else "5GB")
    make_tokenizer().save_pretrained(folder)
    return folder


def build(
    model_type: str, *, layers: int = 2, experts: int = 8, seed: int = 0, dtype: str = "float32",
    top_k: int = 2, **fields: Any,
) -> Any:  # fmt: skip
    """The model that `make` writes, in memory and in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    count_field, top_k_field, dense, extra = _RECIPES[model_type]
    layers += dense
    values = _COMMON | {"num_hidden_layers": layers, count_field: experts, top_k_field: top_k} | extra
    if model_type in _KINDS:
        values["layer_types"] = [_KINDS[model_type][i % 2] for i in range(layers)]
    config = AutoConfig.for_model(model_type, **(values | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # vectors keep their start value (sinks, dt_bias), which some families draw
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model, seed)
    return _cast(model, getattr(torch, dtype))


@torch.no_grad()
def _randomize(model: Any, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        noise = torch.randn(tensor.shape, generator=rng)
        if "correction_bias" in name or "expert_bias" in name:
            tensor.copy_(noise * 0.1)
        elif tensor.dim() == 1 and "inv_freq" not in name:
            tensor.add_(noise * 0.1)
        elif ("gate.weight" in name or "router" in name) and "shared" not in name:
            tensor.copy_(noise * 0.3)
        elif tensor.dim() >= 2:
            tensor.copy_(noise * (0.5 if "embed" in name else 0.12))


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """As a released checkpoint has it: tensors that the class keeps in fp32 stay so."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def make_tokenizer() -> Any:
    """Byte-level, one token a byte: printable ASCII, tab and newlines; other bytes become `<unk>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(byte) for byte in range(33, 127)] + ["Ġ", "Ċ", "ĉ", "č"]
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *characters]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
