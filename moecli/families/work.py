"""Arithmetic and bytes of decoding one token, from config and tensor specs: no weight is read.

A multiplication and its addition are two operations. Counted are the products that grow with the model: every matrix
(attention with its real head size, router, k routed and all shared experts, dense layers, head) and attention's two
products with the cache. Norms, activations, softmax and positions are not. Latent attention (MLA) is counted with keys
and values made from the latent once per token; code that keeps only the latent and makes them again at every step, or
multiplies the queries into the latent space instead, does more than this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from moecli.core.artifacts import Checkpoint
from moecli.core.model import TensorSpec
from moecli.families.adapter import dense, parse_config
from moecli.families.family import family_of, linears_of

_PACKED = re.compile(r"_(packed|scale|shape|zero_point)$")


class DecodeBytes(NamedTuple):
    """Weights as stored."""

    stored: int
    """of the whole checkpoint"""
    read: float
    """for one token at batch size 1: all but the experts that are not chosen and the other rows of the embedding (a
    tied one is read whole, as the head); no cache"""


def decode_flops(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], tokens: int) -> float:
    """Operations per token, averaged over generating `tokens` tokens from an empty context. A token attends to itself
    and everything before it. `specs` are those of the weights as they multiply, unpacked.
    """
    family = family_of(config)
    linear = 0.0
    for found in linears_of(config, specs):
        if found.role != "head":  # tied heads have no tensor of their own
            linear += specs[found.name].numel * _share(family, found.role, found.layer)
    linear += family.facts.hidden * family.facts.vocab
    linear += sum(s.numel for name, s in specs.items() if re.search(r"\.layers\.\d+\..*conv.*\.weight$", name) and
                  len(s.shape) == 3 and not family.is_extra(name))  # fmt: skip
    return 2 * linear + sum(_attention(config, layer, tokens) for layer in range(family.facts.layers))


def _share(family: Any, role: str, layer: int | None) -> float:
    """Part of a tensor that one token multiplies with: k of a layer's experts, all of anything else."""
    return family.facts.top_k / family.experts_in(layer) if role == "expert" else 1.0


def _attention(config: Mapping[str, Any], layer: int, tokens: int) -> float:
    """Products with the cache, or with the state of linear attention, mean per token."""
    parsed = parse_config(config)
    kinds = getattr(parsed, "layer_types", None)
    kind = kinds[layer] if kinds else "full_attention"
    if kind == "conv":
        return 0.0
    if kind == "linear_attention":  # three products of each value head with its [d_k, d_v] state
        return 6.0 * parsed.linear_num_value_heads * parsed.linear_key_head_dim * parsed.linear_value_head_dim
    window = getattr(parsed, "sliding_window", None)
    slides = kind == "sliding_attention" or (not kinds and window is not None)
    lengths = (min(n, window) if slides else n for n in range(1, tokens + 1))
    heads = parsed.num_attention_heads
    if getattr(parsed, "kv_lora_rank", None):
        sizes = parsed.qk_nope_head_dim + parsed.qk_rope_head_dim + parsed.v_head_dim
    else:
        sizes = 2 * (getattr(parsed, "head_dim", None) or parsed.hidden_size // heads)
    return 2.0 * heads * sizes * math.fsum(lengths) / tokens


def decode_bytes(checkpoint: Checkpoint) -> DecodeBytes:
    """Bytes of the weights, all of them and those that one token needs."""
    family = family_of(checkpoint.config)
    opened = dense(checkpoint)
    specs = {name: opened.spec(name) for name in opened.names()}
    linears = {linear.name: linear for linear in linears_of(checkpoint.config, specs)}
    has_head = any(linear.role == "head" for linear in linears.values())
    stored, read = 0, 0.0
    for name in checkpoint.names():
        size = checkpoint.spec(name).bytes
        stored += size
        linear = linears.get(_PACKED.sub("", name))
        if family.is_extra(name):
            continue
        if linear is not None:
            read += size * min(1.0, _share(family, linear.role, linear.layer))
        elif re.search(r"embed_tokens\.weight$", name):
            read += size / family.facts.vocab if has_head else size
        else:
            read += size
    return DecodeBytes(stored, read)
