"""GPTQ's layout against a reader that takes one bit after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecli.core.errors import StageFailed, SurroundingsError
from moecli.core.model import ModelFacts, TensorSpec
from moecli.io.formats import CHANNEL, DenseView, Group, packed_names, quantization_config
from moecli.io.gptq_layout import BITS, GptqView, gptq_config, gptq_names, unpacked_gptq, why_no_gptq
from moecli.io.reader import FolderCheckpoint
from moecli.io.writer import export_folder
from moecli.ops.pack import pack_rows, quantize_rtn
from tests.io.toys import CONFIG, make_folder, toy_facts

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.norm.weight"
N, K, GROUP_SIZE = 96, 64, 32
NAMES = gptq_names(QUERY)


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    return replace(toy_facts(config), dtype="bfloat16")


def packed(folder: Path, bits: int, weight_NK: Tensor | None = None) -> FolderCheckpoint:
    """A model with one weight of 96 outputs and 64 inputs in `pack-quantized`."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(bits)) if weight_NK is None else weight_NK
    codes, scale = quantize_rtn(weight.bfloat16(), bits, GROUP_SIZE)
    names, shape = packed_names(QUERY), torch.tensor([N, K])
    tensors = {names.packed: pack_rows(codes, bits), names.scale: scale, names.shape: shape, NORM: torch.ones(8)}
    config = CONFIG | {"quantization_config": quantization_config(bits, GROUP_SIZE, ["lm_head"])}
    return FolderCheckpoint(make_folder(folder, tensors, config), facts_of)


def code(words_WB: Tensor, a: int, b: int, bits: int) -> int:
    """Code `a` of column `b`, in a stream that begins with the lowest bit of the first word."""
    places = range(a * bits, (a + 1) * bits)
    return sum((int(words_WB[place // 32, b]) >> place % 32 & 1) << i for i, place in enumerate(places))


def slowly_read(tensors: Mapping[str, Tensor], bits: int, below: int) -> Tensor:
    """The weight, as the layout is written down: (code - zero) * scale, zeros stored `below` their value."""
    qweight, qzeros, scales, g_idx = (tensors[name] for name in NAMES)
    dense = torch.empty(N, K)
    for n in range(N):
        zeros = [code(qzeros.T, n, g, bits) + below for g in range(len(scales))]
        for k in range(K):
            group = int(g_idx[k])
            dense[n, k] = (code(qweight, k, n, bits) - zeros[group]) * float(scales[group, n])
    return dense.bfloat16()


@pytest.mark.parametrize(("version", "below"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("bits", BITS)
def test_it_says_what_the_packed_weights_say(tmp_path, bits, version, below):
    model = packed(tmp_path / "packed", bits)
    export_folder(GptqView(model, version), tmp_path / "written")
    tensors = load_file(tmp_path / "written" / "model.safetensors")
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items() if name != NORM} == {
        NAMES.qweight: (torch.int32, [K * bits // 32, N]),
        NAMES.qzeros: (torch.int32, [K // GROUP_SIZE, N * bits // 32]),
        NAMES.scales: (torch.float16, [K // GROUP_SIZE, N]),
        NAMES.g_idx: (torch.int32, [K]),
    }
    dense = DenseView(model).get(QUERY)
    assert torch.equal(slowly_read(tensors, bits, below), dense)
    assert torch.equal(DenseView(FolderCheckpoint(tmp_path / "written", facts_of)).get(QUERY), dense)


def test_it_reads_back_as_the_same_packed_tensors(tmp_path):
    model = packed(tmp_path / "packed", 4)
    again = unpacked_gptq(GptqView(model, "gptq"))
    assert again.names() == model.names()
    for name in model.names():
        assert again.spec(name) == model.spec(name)
        assert torch.equal(again.get(name), model.get(name))
        assert torch.equal(again.rows(name, 1, 2), model.rows(name, 1, 2))
    assert unpacked_gptq(model) is model


def test_a_scale_that_float16_does_not_hold_is_refused(tmp_path):
    just = GptqView(packed(tmp_path / "just", 4, torch.full((N, K), 7.5 * 2**-17)), "gptq")
    assert just.get(NAMES.scales).unique().tolist() == [2**-17]
    wrong = r"q_proj.weight_scale` has the scale 7.42e-06, which float16, .* does not hold exactly"
    between = torch.full((N, K), 7.5 * 7.4e-6)
    with pytest.raises(StageFailed, match=wrong):
        GptqView(packed(tmp_path / "small", 4, between), "gptq").get(NAMES.scales)
    with pytest.raises(StageFailed, match=r"has the scale 7\.\d+e\+04, which float16"):
        GptqView(packed(tmp_path / "large", 4, torch.full((N, K), 7.5 * 7e4)), "gptq").get(NAMES.scales)


def test_words_that_do_not_come_out_even_are_refused():
    names = packed_names(QUERY)

    def why_not(rows: int, columns: int, bits: int, group_size: int) -> str | None:
        groups = 1 if group_size == CHANNEL else columns // group_size
        shapes = {names.packed: (rows, -(-columns * bits // 32)), names.scale: (rows, groups)}
        specs = {name: TensorSpec("int32", shape) for name, shape in shapes.items()}
        return why_no_gptq(QUERY, specs, Group([], bits, group_size))

    assert why_not(96, 64, 3, 32) is None
    assert why_not(96, 64, 8, CHANNEL) is None
    assert why_not(96, 64, 1, 32) == "has codes of 1 bit, which the layout has no zero point for"
    assert why_not(80, 64, 3, 16) == "is [80, 64], and the layout wants 32 bits to divide both ways at 3 bits"
    assert why_not(96, 48, 3, 16) == "is [96, 48], and the layout wants 32 bits to divide both ways at 3 bits"
    stacked = {names.packed: TensorSpec("int32", (8, 96, 8)), names.scale: TensorSpec("bfloat16", (8, 96, 2))}
    assert why_no_gptq(QUERY, stacked, Group([], 4, 32)) == (
        "holds all experts of a layer, which the layout does not know"
    )


# -- config ----


def modules(layers: int, experts: int = 2) -> list[str]:
    attention = [f"self_attn.{x}_proj" for x in "qkv"]
    inside = [f"mlp.experts.{e}.{x}_proj" for e in range(experts) for x in ("gate", "down")]
    return [f"model.layers.{i}.{name}" for i in range(layers) for name in [*attention, *inside]]


def written_config(kept: list[str], other: Mapping[str, int]) -> dict[str, Any]:
    """4 bits but for `other`."""
    groups = [Group([name for name in other if other[name] == bits], bits, 32) for bits in sorted({*other.values()})]
    packed_modules = [name for name in modules(12) if name not in kept]
    config = {"quantization_config": quantization_config(4, 32, [*kept, "lm_head"], groups)}
    return gptq_config(config, [f"{name}.weight" for name in packed_modules], "gptq_v2")


ROUTERS = [f"model.layers.{i}.mlp.gate" for i in range(12)]
ROUTER_RULE = r"-:model\.layers\.\d+\.mlp\.gate(\.|$)"


def test_the_config_names_what_differs_by_its_highest_module():
    attention = [name for name in modules(12) if "self_attn" in name]
    found = written_config(ROUTERS + attention, {})
    assert found == {
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 32, "sym": True,
        "desc_act": False, "lm_head": False, "pack_dtype": "int32",
        "dynamic": {ROUTER_RULE: {}, r"-:model\.layers\.\d+\.self_attn(\.|$)": {}, r"-:lm_head(\.|$)": {}},
    }  # fmt: skip
    eight = written_config(ROUTERS, dict.fromkeys(attention, 8))
    assert eight["dynamic"][r"+:model\.layers\.\d+\.self_attn(\.|$)"] == {"bits": 8, "group_size": 32}


def test_layers_with_bits_of_their_own_are_named_apart():
    """Layer 1, not 10 or 11."""
    other = {name: 8 for name in modules(12) if name.startswith("model.layers.1.mlp.experts")}
    assert written_config(ROUTERS, other)["dynamic"] == {
        ROUTER_RULE: {},
        r"-:lm_head(\.|$)": {},
        r"+:model\.layers\.1\.mlp\.experts(\.|$)": {"bits": 8, "group_size": 32},
    }


# -- what others wrote ----


@pytest.fixture
def changed(tmp_path):
    """The dense view of the exported folder after a change of its config and tensors."""

    def open_changed(config: Mapping[str, Any] = {}, **tensors: Tensor) -> DenseView:
        folder = tmp_path / "written"
        export_folder(GptqView(packed(tmp_path / "packed", 4), "gptq"), folder)
        whole = json.loads((folder / "config.json").read_text())
        whole["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(whole))
        new = load_file(folder / "model.safetensors") | {getattr(NAMES, part): t for part, t in tensors.items()}
        save_file(new, folder / "model.safetensors")
        return DenseView(FolderCheckpoint(folder, facts_of))

    return open_changed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sym": False}, "GPTQ's layout with asymmetric codes"),
        ({"desc_act": True}, "GPTQ's layout with inputs out of order"),
        ({"checkpoint_format": "marlin"}, "`checkpoint_format: marlin` is a GPTQ layout that moecli does not read"),
        ({"bits": 5}, r"`model.layers.0.self_attn.q_proj` has codes of 5 bits"),
        ({"dynamic": {r"-:.*q_proj": {}}}, "has codes, and the rule `-:.*q_proj` of `dynamic` leaves it dense"),
        ({"dynamic": {r".*q_proj": {"sym": False}}}, "asymmetric codes"),
    ],
)
def test_a_config_that_says_something_else_is_refused(changed, config, message):
    with pytest.raises(SurroundingsError, match=message):
        changed(config)


def test_other_zero_points_are_refused(changed):
    with pytest.raises(SurroundingsError, match=r"q_proj.qzeros` has other zero points than symmetric codes of 4 bits"):
        changed({"checkpoint_format": "gptq_v2"}).get(QUERY)


def test_inputs_out_of_order_are_refused(changed):
    with pytest.raises(SurroundingsError, match=r"q_proj.g_idx` puts inputs into groups out of order"):
        changed(g_idx=torch.arange(K, dtype=torch.int32).flip(0) // GROUP_SIZE).get(QUERY)


def test_the_first_rule_that_matches_counts(changed):
    rules = {r"+:.*q_proj": {"bits": 8, "group_size": 16}, r".*self_attn": {"bits": 2}}
    assert changed({"dynamic": rules}).bits(QUERY) == 8
