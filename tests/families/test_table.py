"""Facts come from config.json alone and agree with what transformers makes of the same file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moecli.core.errors import MoecliError, SurroundingsError
from moecli.core.model import ModelFacts
from moecli.families import FAMILIES, alias_config, facts_of, family_of, keep_problem
from moecli.families.table import TABLE
from tests import tiny

# What a bare `{"model_type": ...}` leaves to defaults cannot say k for DeepSeek-V2.
_BARE: dict[str, dict[str, Any]] = {"deepseek_v2": {"num_experts_per_tok": 6}}


def parse(config: dict[str, Any], folder: Path) -> Any:
    """transformers' reading of a config.json."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def test_the_toy_checkpoints_cover_the_table() -> None:
    assert sorted(tiny.FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type} | _BARE.get(model_type, {})
    stock = parse(config, tmp_path)
    newer = {"swiglu_alpha", "swiglu_limit"}  # constants in transformers' code before they became fields
    differing = {
        key: (value, getattr(stock, key, value if key in newer else None))
        for key, value in TABLE[model_type].defaults.items()
        if key not in config
        and value != getattr(stock, key, value if key in newer else None)
        and not (key == "mlp_only_layers" and value is None)
    }
    # -1 means "the last layer" and is resolved when transformers reads the file.
    differing.pop("moe_layer_end_index", None)
    assert differing == {}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_of_two_names_for_one_count_ours_wins_where_theirs_does(model_type: str, tmp_path: Path) -> None:
    for keys, fact in (
        (TABLE[model_type].experts_keys, "router_rows"),
        (TABLE[model_type].top_k_keys, "top_k"),
    ):
        if len(keys) == 2 or fact == "router_rows":
            config = {"model_type": model_type, **_BARE.get(model_type, {})}
            config |= {key: 40 + 8 * i for i, key in enumerate(keys)}
            stock = parse(config, tmp_path)
            assert getattr(facts_of(config), fact) == getattr(stock, keys[0]) == getattr(stock, keys[-1])


def test_facts_of_a_released_config() -> None:
    config = {
        "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "num_hidden_layers": 61, "hidden_size": 7168,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048, "n_shared_experts": 1, "norm_topk_prob": True, "vocab_size": 129280,
        "max_position_embeddings": 163840, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    assert facts_of(config) == ModelFacts(
        model_type="deepseek_v3", layers=61, moe_layers=tuple(range(3, 61)), experts=256, top_k=8,
        hidden=7168,
        expert_width=2048, vocab=129280, dtype="bfloat16", score="sigmoid", renormalized=True,
        max_positions=163840,
        router_rows=256, groups=8, groups_used=4, shared_width=2048, quantized="fp8",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "moe_layers"),
    [
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"model_type": "qwen2_moe", "mlp_only_layers": None}, (0, 1, 2, 3, 4, 5)),
        ({"model_type": "glm4_moe", "first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"model_type": "lfm2_moe"}, (2, 3, 4, 5)),
        ({"model_type": "ernie4_5_moe", "moe_layer_end_index": 4, "moe_layer_interval": 2}, (1, 3)),
        ({"model_type": "ernie4_5_moe"}, (1, 2, 3, 4, 5)),
    ],
)
def test_which_layers_are_moe(config: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    assert facts_of(config | {"num_hidden_layers": 6}).moe_layers == moe_layers


def test_greedy_deepseek_v2_ignores_its_groups() -> None:
    config = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}
    assert facts_of(config).groups == 1
    assert facts_of(config | {"topk_method": "group_limited_greedy"}).groups == 8


def test_alias_checkpoints_have_more_rows_than_experts() -> None:
    config = alias_config(
        {"model_type": "qwen3_moe", "num_hidden_layers": 3, "num_experts": 128}, {0: 64, 1: 64, 2: 48}
    )
    facts = facts_of(config)
    assert (facts.router_rows, facts.experts, family_of(config).experts_in(2)) == (128, 64, 48)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"model_type": "qwen3_meo"}, "model type `qwen3_meo` is not among", "`qwen3_moe`"),
        ({"model_type": "llama"}, "model type `llama` is not among", "known are qwen3_moe"),
        ({}, "config.json has no `model_type`", None),
        (
            {"model_type": "mixtral", "hidden_size": "4096"},
            "`hidden_size` in config.json must be a whole number, got",
            None,
        ),
        (
            {"model_type": "deepseek_v2"},
            "`num_experts_per_tok` in config.json must be a whole number, got `None`",
            None,
        ),
    ],
)
def test_a_config_that_cannot_be_used(config: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(SurroundingsError, match=message) as error:
        facts_of(config)
    assert hint is None or hint in str(error.value.hint)


def test_facts_need_no_transformers() -> None:
    code = "import sys; from moecli.families import facts_of; facts_of({'model_type': 'qwen3_moe'}); "
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what a router can live with ---------------------------------------------------------

_GROUPED = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 32,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 6,
}


@pytest.mark.parametrize(
    ("config", "keep", "message", "hint"),
    [
        ({"model_type": "qwen3_moe"}, 160, "`keep` must be at most the model's 128 experts, got 160",
        "use `keep: 128`"),
        ({"model_type": "qwen3_moe"}, 0, "`keep` must be at least 1, got 0", "use `keep: 8`"),
        ({"model_type": "qwen3_moe"}, 5, "the router picks 8 experts per token, only 5 would be left",
        "use `keep: 8`"),
        ({"model_type": "phimoe"}, 1, "the router picks 2 experts per token, only 1 would be left",
        "use `keep: 2`"),
        (_GROUPED, 18, "`keep` must be a multiple of the router's 4 groups (`n_group`), got 18",
        "use `keep: 16`"),
        (
            _GROUPED | {"num_experts_per_tok": 2}, 4,
            "each of the router's 4 groups needs at least 2 experts, `keep: 4` leaves 1", "use `keep: 8`",
        ),
        (
            _GROUPED, 8,
            "the router picks 6 experts per token from 2 of 4 groups, `keep: 8` leaves 4 there",
            "use `keep: 12`",
        ),
        (
            {"model_type": "glm4_moe", "num_experts_per_tok": 1}, 1,
            "the router needs at least 2 experts, `keep: 1` leaves 1", "use `keep: 2`",
        ),
    ],
)  # fmt: skip
def test_illegal_counts(config: dict[str, Any], keep: int, message: str, hint: str) -> None:
    problem = keep_problem(facts_of(config), keep)
    assert problem is not None
    assert (problem.option, problem.message, problem.hint) == ("keep", message, hint)
    with pytest.raises(MoecliError, match=re.escape(message)):
        family_of(config).shrink_config(config, keep)


def test_phimoe_always_picks_two() -> None:
    assert facts_of({"model_type": "phimoe", "num_experts_per_tok": 4}).top_k == 2


@pytest.mark.parametrize("keep", [12, 16, 32])
def test_legal_counts(keep: int) -> None:
    assert keep_problem(facts_of(_GROUPED), keep) is None


# -- the config of a smaller model -------------------------------------------------------


def test_shrinking_edits_the_name_in_use_and_removes_its_twin() -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 160,
        "num_local_experts": 128,
        "moecli_experts": {"0": 64},
    }
    assert family_of(config).shrink_config(config, 64) == {"model_type": "qwen3_moe", "num_local_experts": 64}
    assert config["num_experts"] == 160
    released = {"model_type": "qwen3_moe", "num_experts": 128}
    assert family_of(released).shrink_config(released, 64) == {"model_type": "qwen3_moe", "num_experts": 64}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_reads_the_shrunk_count(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type} | _BARE.get(model_type, {})
    keep = facts_of(config).experts // 2
    shrunk = family_of(config).shrink_config(config, keep)
    stock = parse(shrunk, tmp_path)
    assert getattr(stock, TABLE[model_type].experts_keys[0]) == keep == facts_of(shrunk).experts
    assert getattr(stock, "num_mtp_layers", 0) == 0


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_shrinking_asks_for_no_mtp_layers(key: str) -> None:
    config = {"model_type": "glm4_moe", "n_routed_experts": 128, key: 1}
    assert family_of(config).shrink_config(config, 64) == {
        "model_type": "glm4_moe",
        "n_routed_experts": 64,
        key: 0,
    }


def test_the_compact_quantizer_is_not_a_quantization() -> None:
    config = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "moecli"}}
    assert facts_of(config).quantized is None
