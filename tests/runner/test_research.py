"""A research export: dense weights that any program runs, and beside them exactly what they are packed to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecli.core.errors import UsageError
from moecli.families.adapter import load_model
from moecli.io.formats import DenseView, packed_weights, parts_of
from moecli.runner.estimate import estimate
from moecli.runner.execute import run as run_plan
from moecli.runner.export import export
from moecli.runner.open import open_recipe, sketch_of
from moecli.runner.sidecar import sidecar_problems
from moecli.runner.verify import verify, verify_folder
from tests.runner.chains import merged, opened, quantized

UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def mixed(tiny_model, tmp_path):
    """Experts of 3 and 8 bits by layer, and the folder they were exported to."""
    chain = quantized(opened(tiny_model("qwen3_moe")), tmp_path / "chain", 3, per_layer={1: 8})
    export(chain, tmp_path / "model", "research")
    return chain, tmp_path / "model"


def test_any_program_computes_what_the_packed_model_computes(mixed):
    from transformers import AutoModelForCausalLM

    chain, folder = mixed
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(stock(tokens).logits, load_model(DenseView(chain))(tokens).logits)


def test_the_sidecar_holds_the_packed_bytes(mixed):
    chain, folder = mixed
    specs = sketch_of(chain).specs
    parts = [part for name in packed_weights(specs) for part in parts_of(name, specs)]
    held = load_file(folder / "packed" / "model.safetensors")
    assert set(held) == set(parts)
    assert all(torch.equal(held[name], chain.get(name)) for name in parts)
    assert held[f"{UP}_packed"].shape[1] == 64 * 8 // 32
    assert held[f"{UP.replace('layers.1', 'layers.0')}_packed"].shape[1] == 64 * 3 // 32  # dense: not ten codes a word


def test_it_verifies_with_the_chain_and_alone(mixed):
    chain, folder = mixed
    for found in (verify(folder, chain), verify_folder(folder)):
        assert found.problems == ()
        assert {check.name for check in found.checks} >= {"sidecar", "reload", "logits"}


def change(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 1
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "name", "said"),
    [
        ("model.safetensors", UP, [f"`{UP}` is not what its codes in `packed/` decode to"]),
        ("packed/model.safetensors", f"{UP}_packed", [
            f"`{UP}` is not what its codes in `packed/` decode to",
            f"`{UP}_packed` in `packed/` differs from the stage that wrote it",
        ]),
    ],
)  # fmt: skip
def test_a_weight_that_is_not_its_codes_is_named(file, name, said, mixed):
    chain, folder = mixed
    assert sidecar_problems(folder, chain) == []
    change(folder / file, name)
    assert sidecar_problems(folder, chain) == said
    assert sidecar_problems(folder) == said[:1]


def test_a_sidecar_that_lacks_something_is_said(mixed):
    chain, folder = mixed
    file = folder / "packed" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file({name: value for name, value in tensors.items() if name != f"{UP}_scale"}, file, {"format": "pt"})
    said = [f"`packed/` cannot be read: the checkpoint has packed weights but no `{UP}_scale`"]
    assert sidecar_problems(folder, chain) == said


def test_what_has_no_research_form_is_refused(tiny_model, tmp_path):
    source = opened(tiny_model("qwen3_moe"))
    shared = quantized(merged(source, tmp_path / "merged", 3), tmp_path / "packed")
    with pytest.raises(UsageError, match="the research form is for experts of one count and width"):
        export(shared, tmp_path / "model", "research")
    with pytest.raises(UsageError, match="the research form is for packed weights, and no stage packs any"):
        export(source, tmp_path / "model", "research")


def recipe(folder: Path, model: Path, **options) -> Path:
    stages = [{"run": "quantize/rtn", "with": options}]
    (folder / "r.yaml").write_text(
        json.dumps({"recipe": 1, "model": str(model), "stages": stages, "export": "research"})
    )
    return folder / "r.yaml"


def test_a_run_says_what_is_packed_and_that_the_folder_is_not_smaller(tiny_model, tmp_path):
    plan = open_recipe(recipe(tmp_path, tiny_model("qwen3_moe", dtype="bfloat16"), format="fp8_block"))
    result = run_plan(plan, tmp_path / "run")
    report = result.report
    assert (report.export, report.verification.status) == ("research", "passed")
    assert report.size.after.bytes == plan.plan.sketch_of(plan.plan.final).bytes < report.size.before.bytes
    (warning,) = report.warnings
    assert warning.startswith("`model/` is a research export and no smaller on disk: it takes ")
    files = [*result.model.glob("*.safetensors"), *result.model.glob("packed/*.safetensors")]
    tensors = sum(value.nbytes for file in files for value in load_file(file).values())
    assert estimate(plan.plan).output_bytes == tensors > report.size.before.bytes
