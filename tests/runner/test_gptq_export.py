"""GPTQ's layout as an export: what is refused, what is checked, and that no other loader takes it by mistake."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecli.core.artifacts import sketch_of
from moecli.core.errors import RecipeError, UsageError
from moecli.families import facts_of
from moecli.io.formats import DenseView
from moecli.io.reader import FolderCheckpoint
from moecli.runner.estimate import estimate
from moecli.runner.execute import run as run_plan
from moecli.runner.export import export, why_not_exported
from moecli.runner.open import open_recipe
from moecli.runner.verify import verify, verify_folder
from tests.runner.chains import merged, opened, quantized

UP = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture
def source(tiny_model):
    return opened(tiny_model("qwen3_moe", dtype="bfloat16"))


@pytest.fixture
def by_layer(source, tmp_path):
    """Experts of 4 and 8 bits by layer, which no stock checkpoint may hold, and the folder they were exported to."""
    chain = quantized(source, tmp_path / "chain", 4, per_layer={1: 8})
    with pytest.raises(UsageError, match="there is no stock form of this model"):
        export(chain, tmp_path / "stock", "stock")
    export(chain, tmp_path / "model", "gptq")
    return chain, tmp_path / "model"


def test_it_holds_the_weights_that_were_packed(by_layer):
    chain, folder = by_layer
    here, there = DenseView(chain), DenseView(FolderCheckpoint(folder, facts_of))
    assert there.names() == here.names()
    assert all(torch.equal(there.get(name), here.get(name)) for name in here.names())
    assert {there.bits(f"model.layers.{layer}.mlp.experts.3.up_proj.weight") for layer in (0, 1)} == {4, 8}


def test_all_is_checked_but_what_transformers_cannot_load(by_layer):
    chain, folder = by_layer
    for found in (verify(folder, chain), verify_folder(folder), verify_folder(folder, chain.source)):
        assert (found.problems, found.status) == ((), "skipped")
        assert {check.name for check in found.checks if check.status == "skipped"} == {"reload", "logits"}
        assert found.checks[-1].detail.startswith("stock transformers does not load GPTQ's layout")
    assert "decoded" in {check.name for check in verify(folder, chain).checks}


def test_transformers_refuses_it_aloud(by_layer):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ImportError, match="Loading a GPTQ quantized model requires optimum"):
        AutoModelForCausalLM.from_pretrained(by_layer[1])


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("qweight", lambda x: x ^ 1, f"`{UP}.weight` does not decode to what the stages packed"),
        ("scales", lambda x: x * 2, f"`{UP}.weight` does not decode to what the stages packed"),
        ("qzeros", lambda x: x + 1, f"`{UP}.qzeros` has other zero points than symmetric codes of 8 bits"),
        ("g_idx", lambda x: x * 0, f"`{UP}.g_idx` puts inputs into groups out of order, which moecli does not read"),
    ],
)
def test_a_damaged_weight_is_named(by_layer, part, change, problem):
    chain, folder = by_layer
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert problem in verify(folder, chain).problems


def test_a_rule_that_is_lost_is_found(by_layer):
    chain, folder = by_layer
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    assert any(f"`{UP}" in problem for problem in verify(folder, chain).problems)


# -- refused ----


def refusal(chain) -> str:
    problem = why_not_exported(sketch_of(chain), "gptq")
    return f"{problem.message}; {problem.hint}"


def test_what_the_layout_has_no_place_for_is_refused(source, tiny_model, tmp_path):
    assert refusal(source) == "GPTQ's layout is for packed weights, and no stage packs any; write `export: auto`"
    assert refusal(quantized(merged(source, tmp_path / "m", 3), tmp_path / "shared")) == (
        "GPTQ's layout is for experts of one count and width, each a matrix of its own; write `export: compact`"
    )
    assert refusal(quantized(opened(tiny_model("qwen3_moe")), tmp_path / "float32")) == (
        "scales are float16 in GPTQ's layout, this model's would be float32; set `model` to a bfloat16 copy of it"
    )
    assert refusal(quantized(opened(tiny_model("granitemoe", dtype="bfloat16")), tmp_path / "stacked")) == (
        "there is no GPTQ layout of this model: `model.layers.0.block_sparse_moe.input_linear.weight` holds all "
        "experts of a layer, which the layout does not know; write `export: auto`"
    )


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"format": "mxfp4"}, "GPTQ's layout is for integers, this model has weights in mxfp4",
         "write `format: int` in the `quantize/...` stage, or `export: auto`"),
        ({"bits": 3, "group_size": 16}, None, None),
    ],
)  # fmt: skip
def test_a_recipe_is_refused_at_its_export(tiny_model, tmp_path, options, message, hint):
    recipe = written(tmp_path, tiny_model("qwen3_moe", dtype="bfloat16"), options)
    if message is None:
        open_recipe(recipe)
        return
    with pytest.raises(RecipeError) as refused:
        open_recipe(recipe)
    (found,) = refused.value.diagnostics
    assert (found.message, found.hint) == (message, hint)


def written(folder, model, options):
    stages = [{"run": "quantize/rtn", "with": options}]
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"recipe": 1, "model": str(model), "stages": stages, "export": "gptq"}))
    return recipe


def test_a_run_counts_what_it_writes(tiny_model, tmp_path):
    model = tiny_model("qwen3_moe", dtype="bfloat16")
    recipe = written(tmp_path, model, {"bits": 4, "group_size": 32, "attention_bits": 16})
    opened_recipe = open_recipe(recipe)
    result = run_plan(opened_recipe, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert (result.report.export, result.report.verification.status) == ("gptq", "skipped")
    assert result.report.size.after.bytes == estimate(opened_recipe.plan).output_bytes == size
    assert sum(result.report.size.after.by_part.values()) == size
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "from vllm import LLM" in card and "AutoModelForCausalLM" not in card
