"""Loading through any Checkpoint gives what `from_pretrained` gives, and says what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.errors import SurroundingsError
from moecli.families.adapter import empty_model, load_layer, load_model, load_tokenizer, tensor_map
from moecli.io.formats import put_packed, quantization_config
from moecli.io.overlay import OverlayWriter
from moecli.ops.pack import dequantize, quantize_rtn
from tests import tiny
from tests.engine.memory import MemoryCheckpoint, aliased, open_folder

Maker = Callable[..., Path]


def everything(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_model(left: Any, right: Any) -> None:
    a, b = everything(left), everything(right)
    assert a.keys() == b.keys()
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equal_to_from_pretrained(family: str, dtype: str, tiny_model: Maker) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family, dtype=dtype)
    expected, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    found = load_model(open_folder(folder))
    assert_same_model(found, expected)
    assert {**found.config.to_dict(), "_name_or_path": str(folder)} == expected.config.to_dict()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def test_biases_stay_in_fp32(tiny_model: Maker) -> None:
    model = load_model(open_folder(tiny_model("deepseek_v3", dtype="bfloat16")))
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_another_dtype(tiny_model: Maker) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("ernie4_5_moe")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same_model(load_model(open_folder(folder), dtype=torch.bfloat16), expected)


def test_shards_and_tied_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.make("qwen3_moe", tmp_path, tie_word_embeddings=True, shards=3)
    model = load_model(open_folder(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(folder))


def test_layers_load_one_by_one(tiny_model: Maker) -> None:
    checkpoint = open_folder(tiny_model("mixtral"))
    model, whole = empty_model(checkpoint.config), load_model(checkpoint)
    names = tensor_map(model, checkpoint)
    assert set(names.outside) == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    layer = load_layer(model, checkpoint, names, 1)
    assert_same_model(layer, whole.model.layers[1])
    assert all(p.is_meta for p in model.model.layers[0].parameters())


def test_alias_layers_have_a_map_and_fewer_experts(tiny_model: Maker) -> None:
    alias = [0, 1, 1, 2, 2, 0, 0, 1]
    small, _ = aliased(open_folder(tiny_model("mixtral")), [0, 3, 5], alias)
    experts = load_model(small).model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape[0] == experts.num_experts == 3
    assert experts.alias_map.tolist() == alias


def test_missing_tensors_are_named(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    del checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"], checkpoint.tensors["model.norm.weight"]
    expected = (
        "the checkpoint does not fit `qwen3_moe`: "
        "2 tensors missing: `model.layers.1.self_attn.q_proj.weight`, `model.norm.weight`"
    )
    with pytest.raises(SurroundingsError, match="2 tensors missing") as caught:
        load_model(checkpoint)
    assert caught.value.message == expected


def test_a_missing_head_is_not_made_up(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    del checkpoint.tensors["lm_head.weight"]
    with pytest.raises(SurroundingsError, match=r"1 tensor missing: `lm_head.weight`"):
        load_model(checkpoint)


def test_unexpected_tensors_are_named(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    checkpoint.tensors["model.layers.0.mlp.gate.bias"] = torch.zeros(8)
    with pytest.raises(SurroundingsError, match=r"1 tensor unexpected: `model.layers.0.mlp.gate.bias`"):
        load_model(checkpoint)


def test_mtp_layers_are_left_out(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("deepseek_v3")))
    checkpoint.tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    assert_same_model(load_model(checkpoint), load_model(open_folder(tiny_model("deepseek_v3"))))


def test_other_shapes_are_shown_with_both_sides(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    checkpoint.tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(6, 64)
    match = r"1 tensor of another shape: `model.layers.0.mlp.gate.weight` is \[6, 64\], expected \[8, 64\]"
    with pytest.raises(SurroundingsError, match=match):
        load_model(checkpoint)


def test_experts_of_unequal_widths_cannot_be_fused(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name][:, :16]
    with pytest.raises(SurroundingsError, match=r"cannot be converted: `model.layers.0.mlp.experts.down_proj"):
        load_model(checkpoint)


def test_an_unknown_model_type_is_named() -> None:
    with pytest.raises(SurroundingsError, match="has no model type `qwen9_moe`"):
        empty_model({"model_type": "qwen9_moe"})


def test_a_model_without_tokenizer_says_so(tiny_model: Maker) -> None:
    checkpoint = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    assert load_tokenizer(checkpoint).eos_token_id == 2
    with pytest.raises(SurroundingsError, match="the model has no tokenizer"):
        load_tokenizer(MemoryCheckpoint(checkpoint.tensors, checkpoint.config))


def test_packed_weights_are_dequantized(tiny_model: Maker, tmp_path: Path) -> None:
    source = open_folder(tiny_model("qwen3_moe"))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    codes, scale = quantize_rtn(source.get(name), bits=4, group_size=32)
    config = {**source.config, "quantization_config": quantization_config(4, 32)}
    with OverlayWriter(tmp_path / "packed", source, config=config) as out:
        out.part("layer", lambda part: put_packed(part, name, codes, scale, 4))
    expected = MemoryCheckpoint.of(source)
    expected.tensors[name] = dequantize(codes, scale)
    assert_same_model(load_model(out.checkpoint), load_model(expected))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("hidden_act", "no_such_act", "KeyError"), ("num_attention_heads", 0, "ZeroDivisionError")],
)
def test_config_values_that_make_no_model_are_said(key, value, said, tiny_model):
    config = json.loads((tiny_model("qwen3_moe") / "config.json").read_text())
    config.pop("head_dim")
    with pytest.raises(SurroundingsError, match=f"builds no model from config.json .{said}"):
        empty_model(config | {key: value})
