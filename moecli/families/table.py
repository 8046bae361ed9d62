"""Where each model family keeps its experts and how it routes: data, one row a family.

Names are on-disk names of released checkpoints; `memory` names are those of the transformers modules, which
are also on disk where a model was saved with `save_original_format=False`. Defaults are those of the
transformers configs, for fields that `config.json` leaves out. Source: transformers, with which
tests/families and tests/contract compare every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moecli.core.model import ScoreRule

Values = Mapping[str, Any]
"""config.json with the defaults filled in"""

PER_EXPERT = ("gate_proj", "up_proj", "down_proj")
W123 = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class Stacked:
    """All experts of a layer in 3-D tensors [E, ...], gate and up in one. Names below the block."""

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool = False
    """[E, D, 2F] and [E, F, D] instead of [E, 2F, D] and [E, D, F]"""
    interleaved: bool = False
    """gate and up alternate along 2F instead of gate first, then up"""
    blocks: bool = False
    """Stock readers know these tensors in MXFP4 (`io.gpt_oss_layout`)"""
    gate_up_bias: str | None = None
    down_bias: str | None = None


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """A tensor with one entry for each expert, below the block."""

    disk: str
    memory: str
    axis: int = 0
    role: Literal["weight", "bias", "correction"] = "weight"
    only_if: str | None = None
    """Name of the config flag that switches it on."""


def every_layer(c: Values) -> tuple[int, ...]:
    return tuple(range(c["num_hidden_layers"]))


def sparse_steps(c: Values) -> tuple[int, ...]:
    dense = set(c["mlp_only_layers"] or ())
    return tuple(i for i in every_layer(c) if i not in dense and (i + 1) % c["decoder_sparse_step"] == 0)


def after_dense(field_name: str) -> Callable[[Values], tuple[int, ...]]:
    return lambda c: tuple(i for i in every_layer(c) if i >= (c[field_name] or 0))


def ernie_layers(c: Values) -> tuple[int, ...]:
    end = c["moe_layer_end_index"]
    end = c["num_hidden_layers"] - 1 if end == -1 else end
    return tuple(
        i for i in every_layer(c) if c["moe_layer_start_index"] <= i <= end and (i + 1) % c["moe_layer_interval"] == 0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One family. Values named `..._key` or `..._keys` are names of config fields."""

    disk_block: str = "mlp"
    """Path of the MoE block below `model.layers.{i}.` on disk ..."""
    block: str = "mlp"
    """... and in memory."""
    router: str = "gate"
    """In-memory name of the router module in the block; the experts module is always `experts`."""
    projections: tuple[str, str, str] | None = PER_EXPERT
    """Names of gate, up, down in `experts.{e}.`; None where released checkpoints stack the experts."""
    stacked: tuple[Stacked, ...] = (Stacked(),)
    """Stacked layouts that may be on disk, the released one first."""
    router_tensors: tuple[RouterTensor, ...] = (RouterTensor("gate.weight", "gate.weight"),)
    experts_keys: tuple[str, ...]
    """Config fields of the number of experts: where several are present, the first wins (measured)."""
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    width_key: str = "moe_intermediate_size"
    shared: str | None = None
    """Shared experts' module below the block; its projections are called as in PER_EXPERT."""
    shared_width: Callable[[Values], int] = lambda c: 0
    shared_count_key: str | None = None
    """Config field that `shared_width` is a multiple of the routed width by; None where it is a number of its own."""
    moe_layers: Callable[[Values], tuple[int, ...]] = every_layer
    score: ScoreRule = "softmax"
    renormalized: bool | str = True
    """Whether the k weights are divided by their sum, or the config flag that says so."""
    floor: float | str = 0.0
    floor_is: Literal["added", "minimum"] = "added"
    scale_key: str | None = None
    groups_if: Callable[[Values], bool] = lambda c: False
    """Whether `n_group` and `topk_group` are in force."""
    group_score: Literal["max", "top2"] = "max"
    fixed_top_k: int | None = None
    """The k the code has built in, whatever the config says."""
    band_key: str | None = None
    activation: str | None = None
    """The activation the code has built in; None: the config's `hidden_act`."""
    gated: Literal["plain", "clamped"] = "plain"
    """plain: act(gate) * up; clamped: gpt_oss's clamped SwiGLU with (up + 1)"""
    mtp_keys: tuple[str, ...] = ()
    """Config fields that count multi-token-prediction layers, the one that wins first. Present by default."""
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"mlp_only_layers": None, "decoder_sparse_step": 1, "hidden_act": "silu"}
_CORRECTION = RouterTensor("gate.e_score_correction_bias", "gate.e_score_correction_bias", role="correction")
_GATE = RouterTensor("gate.weight", "gate.weight")


def _sizes(layers: int, hidden: int, vocab: int, positions: int, **more: Any) -> dict[str, Any]:
    common = {
        "num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocab,
        "max_position_embeddings": positions, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    return common | more


def _shared_experts(c: Values) -> int:
    return c["moe_intermediate_size"] * (c["n_shared_experts"] or 0)


def _always(c: Values) -> bool:
    return True


TABLE: Mapping[str, Row] = {
    "qwen3_moe": Row(
        experts_keys=("num_local_experts", "num_experts"),
        moe_layers=sparse_steps,
        renormalized="norm_topk_prob",
        defaults=_sizes(24, 2048, 151936, 32768) | _QWEN | {
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
    "qwen2_moe": Row(
        experts_keys=("num_experts",),
        moe_layers=sparse_steps,
        renormalized="norm_topk_prob",
        shared="shared_expert",
        shared_width=lambda c: c["shared_expert_intermediate_size"],
        defaults=_sizes(24, 2048, 151936, 32768) | _QWEN | {
            "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_next": Row(
        experts_keys=("num_experts",),
        moe_layers=sparse_steps,
        renormalized="norm_topk_prob",
        shared="shared_expert",
        shared_width=lambda c: c["shared_expert_intermediate_size"],
        defaults=_sizes(48, 2048, 151936, 32768) | _QWEN | {
            "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "mixtral": Row(
        disk_block="block_sparse_moe",
        projections=W123,
        experts_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        defaults=_sizes(
            32, 4096, 32000, 131072, num_local_experts=8, num_experts_per_tok=2, intermediate_size=14336
        ),
    ),
    "olmoe": Row(
        experts_keys=("num_local_experts", "num_experts"),
        width_key="intermediate_size",
        renormalized="norm_topk_prob",
        defaults=_sizes(
            16, 2048, 50304, 4096, num_experts=64, num_experts_per_tok=8, intermediate_size=2048,
            norm_topk_prob=False
        ),
    ),
    "deepseek_v2": Row(
        experts_keys=("num_experts", "n_routed_experts"),
        moe_layers=after_dense("first_k_dense_replace"),
        renormalized=False,
        scale_key="routed_scaling_factor",
        groups_if=lambda c: c["topk_method"] == "group_limited_greedy",
        shared="shared_experts",
        shared_width=_shared_experts,
        shared_count_key="n_shared_experts",
        defaults=_sizes(32, 4096, 102400, 2048) | {
            "n_routed_experts": 64, "num_experts_per_tok": None, "moe_intermediate_size": 1407,
            "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
            "topk_method": "greedy", "n_group": None, "topk_group": None,
        },
    ),
    "deepseek_v3": Row(
        experts_keys=("num_local_experts", "n_routed_experts"),
        moe_layers=after_dense("first_k_dense_replace"),
        router_tensors=(_GATE, _CORRECTION),
        score="sigmoid",
        renormalized="norm_topk_prob",
        floor=1e-20,
        scale_key="routed_scaling_factor",
        groups_if=_always,
        group_score="top2",
        shared="shared_experts",
        shared_width=_shared_experts,
        shared_count_key="n_shared_experts",
        mtp_keys=("num_nextn_predict_layers", "num_mtp_layers"),
        defaults=_sizes(61, 7168, 129280, 4096) | {
            "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
            "n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "n_group": 8,
            "topk_group": 4, "norm_topk_prob": True,
        },
    ),
    "glm4_moe": Row(
        experts_keys=("num_local_experts", "n_routed_experts"),
        moe_layers=after_dense("first_k_dense_replace"),
        router_tensors=(_GATE, _CORRECTION),
        score="sigmoid",
        renormalized="norm_topk_prob",
        floor=1e-20,
        scale_key="routed_scaling_factor",
        groups_if=_always,
        group_score="top2",
        shared="shared_experts",
        shared_width=_shared_experts,
        shared_count_key="n_shared_experts",
        mtp_keys=("num_nextn_predict_layers", "num_mtp_layers"),
        defaults=_sizes(46, 4096, 151552, 131072) | {
            "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": True,
        },
    ),
    "phimoe": Row(
        disk_block="block_sparse_moe",
        router="router",
        projections=W123,
        router_tensors=(RouterTensor("gate.weight", "router.weight"),),
        experts_keys=("num_local_experts",),
        width_key="intermediate_size",
        score="sparsemixer",
        renormalized=False,
        fixed_top_k=2,
        band_key="router_jitter_noise",
        defaults=_sizes(
            32, 4096, 32064, 131072, num_local_experts=16, num_experts_per_tok=2, intermediate_size=6400,
            router_jitter_noise=0.01,
        ),
    ),
    "gpt_oss": Row(
        router="router",
        projections=None,
        stacked=(Stacked(transposed=True, interleaved=True, blocks=True,
                         gate_up_bias="experts.gate_up_proj_bias", down_bias="experts.down_proj_bias"),),
        router_tensors=(RouterTensor("router.weight", "router.weight"),
                        RouterTensor("router.bias", "router.bias", role="bias")),
        experts_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        score="topk_softmax",
        gated="clamped",
        defaults=_sizes(
            36, 2880, 201088, 131072, num_local_experts=128, num_experts_per_tok=4, intermediate_size=2880,
            swiglu_alpha=1.702, swiglu_limit=7.0,
        ),
    ),
    "granitemoe": Row(
        disk_block="block_sparse_moe",
        block="block_sparse_moe",
        router="router",
        projections=None,
        stacked=(Stacked("input_linear.weight", "output_linear.weight"), Stacked()),
        router_tensors=(RouterTensor("router.layer.weight", "router.weight"),),
        experts_keys=("num_local_experts",),
        width_key="intermediate_size",
        score="topk_softmax",
        defaults=_sizes(
            32, 4096, 32000, 2048, num_local_experts=8, num_experts_per_tok=2, intermediate_size=11008
        ),
    ),
    "ernie4_5_moe": Row(
        experts_keys=("num_experts", "moe_num_experts"),
        top_k_keys=("num_experts_per_tok", "moe_k"),
        moe_layers=ernie_layers,
        router_tensors=(_GATE, RouterTensor("moe_statics.e_score_correction_bias",
                                            "gate.moe_statics.e_score_correction_bias", axis=1,
                                            role="correction")),
        floor="moe_norm_min",
        floor_is="minimum",
        shared="shared_experts",
        shared_width=lambda c: c["moe_intermediate_size"] * (c["moe_num_shared_experts"] or 0),
        shared_count_key="moe_num_shared_experts",
        defaults=_sizes(28, 2560, 103424, 131072, tie_word_embeddings=True) | {
            "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
        },
    ),
    "minimax_m2": Row(
        disk_block="block_sparse_moe",
        projections=W123,
        router_tensors=(_GATE, RouterTensor("e_score_correction_bias", "e_score_correction_bias",
                                            role="correction")),
        experts_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        score="sigmoid",
        defaults=_sizes(
            62, 3072, 200064, 196608, num_local_experts=256, num_experts_per_tok=8, intermediate_size=1536
        ),
    ),
    "lfm2_moe": Row(
        disk_block="feed_forward",
        block="feed_forward",
        projections=W123,
        router_tensors=(_GATE, RouterTensor("expert_bias", "expert_bias", role="correction",
                                            only_if="use_expert_bias")),
        experts_keys=("num_experts",),
        moe_layers=after_dense("num_dense_layers"),
        score="sigmoid",
        renormalized="norm_topk_prob",
        floor=1e-6,
        scale_key="routed_scaling_factor",
        activation="silu",
        defaults={
            "num_hidden_layers": 32, "hidden_size": 2048, "vocab_size": 65536,
            "max_position_embeddings": 128000, "tie_word_embeddings": True,
            "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792, "num_dense_layers": 2,
            "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        },
    ),
}  # fmt: skip
