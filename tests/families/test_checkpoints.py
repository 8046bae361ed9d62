"""Checkpoints that are damaged, quantized by others, or hold more than the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecli.core.artifacts import ExpertWeights
from moecli.core.errors import MoecliError, SurroundingsError
from moecli.core.model import ModelSketch
from moecli.families import accounting, facts_of, family_of, forecast_alias, forecast_keep
from moecli.io.overlay import OverlayWriter, fates
from moecli.io.reader import FolderCheckpoint

TinyModel = Callable[..., Path]
Tensors = dict[str, Tensor]


def altered(source: Path, folder: Path, change: Callable[[Tensors], None], **config: object) -> FolderCheckpoint:
    """A copy of a toy checkpoint with other tensors and config fields."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return FolderCheckpoint(folder, facts_of)


def unchanged(tensors: Tensors) -> None:
    pass


def one_problem(ckpt: FolderCheckpoint) -> SurroundingsError:
    (problem,) = accounting(ckpt)
    return problem


# -- accounting --------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    ckpt = altered(tiny_model("qwen3_moe"), tmp_path / "m", lambda tensors: tensors.__delitem__(name))
    assert one_problem(ckpt).message == f"tensor `{name}` is missing from the checkpoint"
    assert one_problem(ckpt).where == "layer 1"
    with pytest.raises(SurroundingsError, match=r"experts\.3\.up_proj\.weight` is missing"):
        family_of(ckpt.config).read_expert(ckpt, 1, 3)


def test_fewer_experts_than_the_config_says(tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt = altered(tiny_model("olmoe"), tmp_path / "m", unchanged, num_experts=10)
    messages = [problem.message for problem in accounting(ckpt)]
    assert "tensor `model.layers.0.mlp.experts.8.gate_proj.weight` is missing from the checkpoint" in messages
    assert "`model.layers.0.mlp.gate.weight` has shape [8, 64], config.json asks for [10, 64]" in messages
    with pytest.raises(SurroundingsError, match=r"config.json says 10 experts, the checkpoint has 8 \(and 15 more\)"):
        family_of(ckpt.config).check(ckpt)


def test_more_experts_than_the_config_says(tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt = altered(tiny_model("olmoe"), tmp_path / "m", unchanged, num_experts=6)
    messages = [problem.message for problem in accounting(ckpt)]
    assert (
        "`model.layers.0.mlp.experts.6.gate_proj.weight` exists: "
        "config.json says 6 experts, the checkpoint has 8" in messages
    )


def test_stacked_experts_that_contradict_the_config(tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt = altered(tiny_model("granitemoe"), tmp_path / "m", unchanged, intermediate_size=48)
    assert accounting(ckpt)[0].message == (
        "`model.layers.0.block_sparse_moe.input_linear.weight` has shape [8, 64, 64], config.json asks for [8, 96, 64]"
    )


def test_a_lost_correction_bias_is_missed(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    ckpt = altered(tiny_model("glm4_moe"), tmp_path / "m", lambda tensors: tensors.__delitem__(name))
    assert one_problem(ckpt).message == f"tensor `{name}` is missing from the checkpoint"


def test_a_model_without_expert_bias_needs_none(tiny_model: TinyModel, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("expert_bias")]:
            del tensors[name]

    ckpt = altered(tiny_model("lfm2_moe"), tmp_path / "m", without, use_expert_bias=False)
    assert accounting(ckpt) == []


# -- quantized by others -----------------------------------------------------------------


def to_fp8(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


def to_mxfp4(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"] = torch.zeros(8, 4, 2, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(8, 4, 2, dtype=torch.uint8)
        del tensors[name]


def to_packed(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        tensors[f"{name}_packed"] = torch.zeros(2, 2, dtype=torch.int32)
        del tensors[name]


@pytest.mark.parametrize(
    ("model_type", "change", "method", "message"),
    [
        ("deepseek_v3", to_fp8, "fp8", r"experts are quantized \(`.*` is float8_e4m3fn\) and cannot be read"),
        ("gpt_oss", to_mxfp4, "mxfp4", r"experts are quantized as MXFP4 \(`.*_blocks`\) and cannot be read"),
        (
            "qwen3_moe",
            to_packed,
            "compressed-tensors",
            r"experts are quantized \(compressed-tensors\) and cannot",
        ),
    ],
)
def test_quantized_experts_are_refused(
    model_type: str,
    change: Callable[[Tensors], None],
    method: str,
    message: str,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    ckpt = altered(tiny_model(model_type), tmp_path / "m", change, quantization_config={"quant_method": method})
    family = family_of(ckpt.config)
    assert ckpt.facts.quantized == method
    for read in (family.read_experts, lambda c, layer: family.read_expert(c, layer, 2)):
        with pytest.raises(SurroundingsError, match=message) as error:
            read(ckpt, 1)
        assert error.value.hint == "set `model` to a bfloat16 copy of it"
    with pytest.raises(SurroundingsError, match="experts are quantized") as error:
        forecast_keep(ModelSketch(ckpt.facts, ckpt.config), 4)
    assert error.value.hint == "set `model` to a bfloat16 copy of it"


def test_experts_quantized_by_an_earlier_stage_are_refused_in_the_plan(tiny_model: TinyModel) -> None:
    ckpt = FolderCheckpoint(tiny_model("olmoe"), facts_of)
    sketch = ModelSketch(replace(ckpt.facts, quantized="compressed-tensors"), ckpt.config)
    with pytest.raises(SurroundingsError, match=r"experts are quantized \(compressed-tensors\)") as error:
        forecast_alias(sketch, 4)
    assert error.value.hint == "move this stage above the `quantize/...` stage"


# -- multi-token prediction --------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("deepseek_v3", ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]),
        ("qwen3_next", ["mtp.layers.0.mlp.experts.0.up_proj.weight", "mtp.fc.weight"]),
        ("ernie4_5_moe", ["model.mtp_block.0.mlp.up_proj.weight"]),
    ],
)
def test_mtp_layers_are_recognised_and_dropped(
    model_type: str, names: list[str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    def with_mtp(tensors: Tensors) -> None:
        tensors.update({name: torch.ones(4, 4) for name in names})

    ckpt = altered(tiny_model(model_type), tmp_path / "m", with_mtp, num_nextn_predict_layers=1)
    family = family_of(ckpt.config)
    assert sorted(family.extra_tensors(ckpt)) == sorted(names)
    assert accounting(ckpt) == []
    assert not {linear.name for linear in family.linears(ckpt)} & set(names)
    with OverlayWriter(tmp_path / "overlay", ckpt, family.shrink_config(ckpt.config, 8)) as out:
        out.part("mtp", lambda part: family.drop_mtp(part, ckpt))
    assert out.checkpoint.dropped() == dict.fromkeys(names, "MTP layer")
    assert out.checkpoint.config["num_nextn_predict_layers"] == 0
    sketch = ModelSketch(ckpt.facts, ckpt.config, {name: ckpt.spec(name) for name in ckpt.names()})
    assert set(forecast_keep(sketch, 8).specs) == set(out.checkpoint.names())


# -- what becomes of each expert ---------------------------------------------------------


def test_every_pruned_tensor_is_accounted_for(tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt = FolderCheckpoint(tiny_model("mixtral"), facts_of)
    family = family_of(ckpt.config)
    with OverlayWriter(tmp_path / "overlay", ckpt) as out:
        out.part("layer-0", lambda part: family.keep_experts(part, ckpt, 0, [0, 2, 5, 7]))
    of_expert = [
        {fate.verb for name, fate in fates(out.checkpoint).items() if f"layers.0.block_sparse_moe.experts.{e}." in name}
        for e in range(8)
    ]
    kept, lost = {"kept"}, [{"displaced"}, {"displaced"}, {"dropped"}, {"dropped"}]
    assert [of_expert[e] for e in (0, 2, 5, 7)] == [kept] * 4
    assert [of_expert[e] for e in (1, 3, 4, 6)] == lost
    assert torch.equal(family.read_expert(out.checkpoint, 0, 3).up_FD, family.read_expert(ckpt, 0, 7).up_FD)
    assert out.checkpoint.written() == ()


def test_kept_experts_may_come_in_any_order(tiny_model: TinyModel, tmp_path: Path) -> None:
    for model_type in ("qwen2_moe", "gpt_oss"):
        ckpt = FolderCheckpoint(tiny_model(model_type), facts_of)
        family = family_of(ckpt.config)
        with OverlayWriter(tmp_path / model_type, ckpt, family.shrink_config(ckpt.config, 3)) as out:
            out.part("layer-0", lambda part, f=family, c=ckpt: f.keep_experts(part, c, 0, [6, 0, 1]))
        for new, old in enumerate([6, 0, 1]):
            got, wanted = family.read_expert(out.checkpoint, 0, new), family.read_expert(ckpt, 0, old)
            assert torch.equal(got.gate_FD, wanted.gate_FD)
            assert torch.equal(got.down_DF, wanted.down_DF)


def test_stacked_experts_share_one_width(tiny_model: TinyModel, tmp_path: Path) -> None:
    ckpt = FolderCheckpoint(tiny_model("granitemoe"), facts_of)
    family = family_of(ckpt.config)
    experts = [family.read_expert(ckpt, 0, e) for e in range(8)]
    experts[3] = ExpertWeights(experts[3].gate_FD[:16], experts[3].up_FD[:16], experts[3].down_DF[:, :16])
    with (
        pytest.raises(MoecliError, match="experts of different widths cannot share"),
        OverlayWriter(tmp_path / "overlay", ckpt) as out,
    ):
        out.part("layer-0", lambda part: family.write_experts(part, ckpt, 0, experts))
