"""Compact checkpoints load through stock classes and compute what their expanded form computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from moecli.ops.pack import dequantize, pack_rows, quantize_rtn
from tests.runtime.compact import (
    EXPERTS,
    FAMILIES,
    TOKENS,
    alias_of,
    logits,
    make_model,
    write,
    write_compact,
    write_expanded,
)

ADDING_ORDER = 3e-7
"""fp32: rows that share an expert are added in another order."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_alias_map_computes_what_copies_of_the_experts_compute(family, tmp_path):
    source = make_model(tmp_path / "source", family)
    experts = {0: 3, 1: 5}
    compact = logits(write_compact(source, tmp_path / "compact", experts))
    expanded = logits(write_expanded(source, tmp_path / "expanded", experts))
    assert (compact - expanded).abs().max() <= ADDING_ORDER
    assert (compact - logits(source)).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_experts_and_linears_load_to_the_rounded_weights(family, bits, tmp_path):
    source = make_model(tmp_path / "source", family, torch.bfloat16)
    experts = {0: 4, 1: 8}
    compact = logits(write_compact(source, tmp_path / "compact", experts, bits))
    assert torch.equal(compact, logits(write_expanded(source, tmp_path / "expanded", experts, bits)))


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_a_model_of_packed_stacks_saves_dense_under_the_names_on_disk(family, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", family, torch.bfloat16)
    folder = write_compact(source, tmp_path / "compact", {0: EXPERTS, 1: EXPERTS}, 4)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    saved, stock = (load_file(path / "model.safetensors") for path in (tmp_path / "again", source))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in stock.items()}
    assert torch.equal(logits(tmp_path / "again"), logits(folder))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_dtype_asked_for_reaches_every_tensor(bits, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", "mixtral", torch.bfloat16)
    folder = write_compact(source, tmp_path / "compact", {0: 4, 1: 4}, bits)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_different_numbers_of_experts_without_alias_maps_need_different_routers(tmp_path):
    """Layer 0 keeps 5 experts and their rows, layer 1 all 8: what a mask on the dropped rows does."""
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", "deepseek_v3")
    folder = tmp_path / "ragged"
    tensors = load_file(source / "model.safetensors")
    out = {}
    for name, value in tensors.items():
        if "layers.0.mlp.gate." in name:
            out[name] = value[:5]
        elif not any(f"layers.0.mlp.experts.{dropped}." in name for dropped in (5, 6, 7)):
            out[name] = value
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "moecli", "experts": {"0": 5, "1": 8}, "rows": {"0": 5, "1": 8}}
    write(folder, config | {"quantization_config": quantization}, out)

    stock = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        stock.model.layers[0].mlp.gate.e_score_correction_bias[5:] = -1e9
        masked = stock(TOKENS).logits
    assert (logits(folder) - masked).abs().max() <= ADDING_ORDER


@pytest.mark.parametrize("bits", [None, 4])
def test_a_loaded_model_saves_and_loads_again(bits, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source")
    folder = write_compact(source, tmp_path / "compact", {0: 3, 1: 5}, bits)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(folder))
    alias = load_file(tmp_path / "again" / "model.safetensors")["model.layers.1.mlp.experts.alias_map"]
    assert alias.tolist() == alias_of(1, 5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_stock_expert_implementations_work_on_aliased_experts(implementation, tmp_path):
    source = make_model(tmp_path / "source")
    compact = write_compact(source, tmp_path / "compact", {0: 3, 1: 5})
    expanded = logits(write_expanded(source, tmp_path / "expanded", {0: 3, 1: 5}), experts_implementation="eager")
    assert (logits(compact, experts_implementation=implementation) - expanded).abs().max() <= 1e-6


def test_packed_and_dense_experts_in_one_layer_are_refused(tmp_path):
    source = make_model(tmp_path / "source")
    folder = write_compact(source, tmp_path / "compact", {0: 4, 1: 4}, 4)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.gate_proj.weight"
    tensors = {key: value for key, value in tensors.items() if not key.startswith(name)}
    tensors[name] = load_file(source / "model.safetensors")[name]
    write(folder, json.loads((folder / "config.json").read_text()), tensors)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        logits(folder)


def test_a_layer_without_experts_in_the_config_is_named(tmp_path):
    source = make_model(tmp_path / "source")
    folder = write_compact(source, tmp_path / "compact", {0: 4, 1: 4})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["experts"]["7"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names layers without experts: 7"):
        logits(folder)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_a_stack_is_unpacked_expert_by_expert(bits, transposed):
    """As many inputs as outputs: only the last entry of the shape tells which way round it was."""
    from moecli.runtime.compact_model import unpack_stack

    weight_ENK = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(bits)).to(torch.bfloat16)
    codes, scale = quantize_rtn(weight_ENK, bits, 16)
    unpacked = unpack_stack(pack_rows(codes, bits), scale, torch.tensor([3, 48, 48, transposed]))
    dense = dequantize(codes, scale)
    assert torch.equal(unpacked, dense.mT if transposed else dense)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("columns", [32, 48, 160])
def test_unpack_inverts_the_packing_of_the_quantizers(bits, columns):
    from moecli.runtime.compact_model import unpack

    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(bits)).to(torch.bfloat16)
    codes, scale = quantize_rtn(weight, bits, 16)
    unpacked = unpack(pack_rows(codes, bits), scale, torch.tensor(weight.shape))
    assert torch.equal(unpacked, dequantize(codes, scale))


def test_expert_counts_are_those_of_the_config(tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(write_compact(source, tmp_path / "compact", {0: 3, 1: EXPERTS}))
    assert [layer.mlp.experts.down_proj.shape[0] for layer in model.model.layers] == [3, EXPERTS]
    assert type(model.model.layers[1].mlp.experts).__name__ == "Qwen3MoeExperts"
