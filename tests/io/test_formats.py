"""compressed-tensors names and config, and reading packed weights as dense ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor

from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.formats import (
    CHANNEL,
    DenseView,
    Group,
    is_packed,
    packed_names,
    packed_specs,
    put_packed,
    put_packed_stack,
    quantization_config,
)
from moecli.io.overlay import OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.io.writer import export_folder
from moecli.ops.pack import dequantize, pack_rows, quantize_rtn
from tests.io.toys import CONFIG, make_folder, toy_facts

EXPERT = "layers.0.mlp.experts.0.up_proj.weight"
STACK = "layers.0.mlp.experts.down_proj"
QUERY = "layers.0.self_attn.q_proj.weight"


def packed(name: str, weight_NK: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    codes, scale = quantize_rtn(weight_NK, bits, group_size)
    names = packed_names(name)
    return {
        names.packed: pack_rows(codes, bits),
        names.scale: scale,
        names.shape: torch.tensor(weight_NK.shape),
    }


def rounded(weight_NK: Tensor, bits: int, group_size: int) -> Tensor:
    return dequantize(*quantize_rtn(weight_NK, bits, group_size))


def opened(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> FolderCheckpoint:
    extra = {} if config is None else {"quantization_config": config}
    return FolderCheckpoint(make_folder(folder, tensors, config=CONFIG | extra), toy_facts)


def test_names() -> None:
    assert packed_names("x.weight") == ("x.weight_packed", "x.weight_scale", "x.weight_shape")
    assert packed_names("experts.down_proj").packed == "experts.down_proj_packed"


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (8, CHANNEL)])
def test_the_library_accepts_our_config(bits: int, group_size: int) -> None:
    extra = [Group(["re:.*self_attn.*"], 8, CHANNEL), Group(["layers.0.mlp.shared.up_proj"], 4, 32)]
    ours = quantization_config(bits, group_size, ["lm_head", "re:.*mlp.gate$"], extra)
    assert json.loads(json.dumps(ours)) == ours
    theirs = QuantizationConfig.model_validate(ours)
    assert theirs.ignore == ["lm_head", "re:.*mlp.gate$"]
    assert (theirs.quant_method, theirs.format) == ("compressed-tensors", "pack-quantized")
    assert theirs.quantization_status == "compressed"
    schemes = [theirs.config_groups[f"group_{i}"] for i in range(3)]
    assert all(isinstance(scheme, QuantizationScheme) for scheme in schemes)
    first = schemes[0]
    assert (first.targets, first.weights.num_bits, first.weights.symmetric) == (["Linear"], bits, True)
    assert first.weights.strategy == ("channel" if group_size == CHANNEL else "group")
    assert first.weights.group_size == (None if group_size == CHANNEL else group_size)
    assert first.input_activations is None and first.output_activations is None
    assert [scheme.targets for scheme in schemes[1:]] == [
        ["re:.*self_attn.*"],
        ["layers.0.mlp.shared.up_proj"],
    ]


def test_config_in_full() -> None:
    assert quantization_config(4, 128, ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
                    "dynamic": False, "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.18.0",
    }  # fmt: skip


def test_a_pattern_that_transformers_would_misread() -> None:
    with pytest.raises(ValueError, match=r"`re:\.\*shared_experts\.\*` would be read as the routed experts' scheme"):
        quantization_config(4, 32, extra_groups=[Group(["re:.*shared_experts.*"], 8, 32)])
    quantization_config(4, 32, extra_groups=[Group(["re:.*shared_expert[s].*"], 8, 32)])


@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 32), (8, CHANNEL)])
def test_forecast_and_what_is_written_agree(tmp_path: Path, bits: int, group_size: int) -> None:
    weight = torch.randn(6, 96)
    source = opened(tmp_path / "m", {EXPERT: weight}, None)
    codes, scale = quantize_rtn(weight, bits, 96 if group_size == CHANNEL else group_size)
    with OverlayWriter(tmp_path / "o", source) as out:
        out.part("p", lambda part: put_packed(part, EXPERT, codes, scale, bits))
    found = {name: out.checkpoint.spec(name) for name in out.checkpoint.names()}
    assert found == packed_specs(EXPERT, source.spec(EXPERT), bits, group_size)
    assert out.checkpoint.dropped() == {EXPERT: f"packed to {bits} bits"}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bits", "columns"), [(3, 96), (4, 48), (8, 6)])
def test_a_stack_of_experts_is_each_expert_packed(tmp_path: Path, bits: int, columns: int, transposed: bool) -> None:
    """As many inputs as outputs in one case: shapes alone do not tell which way round a tensor is."""
    weight_ENK = torch.randn(3, 6, columns, generator=torch.Generator().manual_seed(bits)).to(torch.bfloat16)
    on_disk = weight_ENK.mT.contiguous() if transposed else weight_ENK
    source = opened(tmp_path / "m", {STACK: on_disk}, None)
    codes, scale = quantize_rtn(weight_ENK, bits, 6)
    words = torch.stack([pack_rows(expert, bits) for expert in codes])
    config = CONFIG | {"quantization_config": quantization_config(bits, 6)}
    with OverlayWriter(tmp_path / "o", source, config=config) as out:
        out.part("p", lambda part: put_packed_stack(part, STACK, words, scale, on_disk.shape, bits, transposed))
    found = {name: out.checkpoint.spec(name) for name in out.checkpoint.names()}
    assert found == packed_specs(STACK, source.spec(STACK), bits, 6, transposed)
    assert out.checkpoint.get(f"{STACK}_shape").tolist() == [*on_disk.shape, int(transposed)]

    dense = DenseView(out.checkpoint)
    experts = [rounded(expert, bits, 6) for expert in weight_ENK]
    expected = torch.stack([expert.mT if transposed else expert for expert in experts])
    assert dense.names() == (STACK,)
    assert dense.spec(STACK) == source.spec(STACK)
    assert torch.equal(dense.get(STACK), expected)
    assert torch.equal(dense.rows(STACK, 1, 3), expected[1:])
    assert (dense.bits(STACK), dense.group_size(STACK)) == (bits, 6)


class TestDenseView:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_reads_what_the_library_decompresses(self, tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
        weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(bits)).to(dtype)
        tensors = packed(EXPERT, weight, bits, 16)
        config = quantization_config(bits, 16)
        dense = DenseView(opened(tmp_path / "m", tensors | {"norm": torch.ones(2)}, config))
        scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
        state = {name.removeprefix(EXPERT.removesuffix("weight")): tensor for name, tensor in tensors.items()}
        theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(dense.get(EXPERT), theirs)
        assert torch.equal(dense.rows(EXPERT, 2, 5), theirs[2:5])
        assert dense.spec(EXPERT) == TensorSpec(str(dtype).removeprefix("torch."), (6, 48))
        assert dense.names() == (EXPERT, "norm")
        assert dense.bits(EXPERT) == bits

    def test_groups_of_their_own(self, tmp_path: Path) -> None:
        expert, query = torch.randn(4, 32), torch.randn(4, 16)
        tensors = packed(EXPERT, expert, 4, 16) | packed(QUERY, query, 8, 16)
        config = quantization_config(4, 16, extra_groups=[Group(["re:.*self_attn.*"], 8, CHANNEL)])
        dense = DenseView(opened(tmp_path / "m", tensors, config))
        assert torch.equal(dense.get(EXPERT), rounded(expert, 4, 16))
        assert torch.equal(dense.get(QUERY), rounded(query, 8, 16))

    def test_is_the_dense_model(self, tmp_path: Path) -> None:
        tensors = packed(EXPERT, torch.randn(4, 32), 4, 16) | {"norm": torch.ones(2)}
        ckpt = opened(tmp_path / "m", tensors, quantization_config(4, 16))
        dense = DenseView(ckpt)
        assert is_packed(ckpt, EXPERT) and not is_packed(ckpt, "norm") and not is_packed(dense, EXPERT)
        assert (ckpt.facts.quantized, dense.facts.quantized) == ("compressed-tensors", None)
        assert dense.config == CONFIG
        assert (dense.origin(EXPERT), dense.origin("norm")) == (("own", EXPERT), ("source", "norm"))
        with pytest.raises(KeyError, match=r"no tensor `.*weight_packed`"):
            dense.get(f"{EXPERT}_packed")
        export = export_folder(dense, tmp_path / "expanded")
        assert export.linked == ()
        back = FolderCheckpoint(tmp_path / "expanded", toy_facts)
        assert back.names() == dense.names()
        assert torch.equal(back.get(EXPERT), dense.get(EXPERT))

    def test_an_unquantized_model_reads_as_it_is(self, tmp_path: Path) -> None:
        dense = DenseView(opened(tmp_path / "m", {"x.weight": torch.ones(2, 2)}, None))
        assert dense.get("x.weight").tolist() == [[1, 1], [1, 1]]

    def test_refusals(self, tmp_path: Path) -> None:
        tensors = packed(EXPERT, torch.randn(4, 32), 4, 16)
        config = quantization_config(4, 16)
        group = config["config_groups"]["group_0"]
        asymmetric = {"config_groups": {"group_0": group | {"weights": group["weights"] | {"symmetric": False}}}}
        missing = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
        zero_point = tensors | {f"{EXPERT}_zero_point": torch.zeros(1, 2)}
        elsewhere = {"config_groups": {"group_0": group | {"targets": ["re:.*self_attn.*"]}}}
        wrong_bits = quantization_config(8, 16)
        cases = [
            (tensors, {"quant_method": "awq"}, r"weights quantized by `awq` cannot be read as dense ones"),
            (
                tensors,
                config | asymmetric,
                r"`group_0` of `quantization_config` is asymmetric int in `pack-quantized`",
            ),
            (missing, config, rf"the checkpoint has packed weights but no `{EXPERT}_scale`"),
            (zero_point, config, rf"`{EXPERT}` is packed with `zero_point`, which moecli does not read"),
            (
                tensors,
                config | elsewhere,
                r"is packed, but no config group of `quantization_config` covers it",
            ),
            (tensors, wrong_bits, r"needs 8 words a row at 8 bits, it has 4"),
        ]
        for number, (stored, settings, message) in enumerate(cases):
            ckpt = opened(tmp_path / str(number), stored, settings)
            with pytest.raises(SurroundingsError, match=message):
                DenseView(ckpt).get(EXPERT)
