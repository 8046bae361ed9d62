"""Verification passes what is right, in a fresh process, and names the tensor in what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecli.core.model import ModelFacts
from moecli.io.overlay import OverlayWriter
from moecli.runner import verify as verification
from moecli.runner.export import export
from moecli.runner.report import Verification as Reported
from moecli.runner.verify import fixed_tokens, verify, verify_folder
from tests.runner.chains import merged, opened, pruned, quantized

NO_MEMORY = 1000
"""Free bytes that no model fits in: only the checks that read headers and routers run."""


def results(found: verification.Verification) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def detail(found: verification.Verification, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor of a written folder, or remove it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


PASSED = dict.fromkeys(("tensors", "shapes", "routers", "reload", "logits"), "passed")


@pytest.mark.parametrize("kind", ["compact", "expanded"])
def test_a_merged_model_passes_in_both_forms(kind, tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe", dtype="bfloat16")), tmp_path / "chain", 3)
    export(chain, tmp_path / "model", kind)
    found = verify(tmp_path / "model", chain)
    assert found.problems == ()
    assert results(found) == PASSED
    assert detail(found, "logits") == "largest difference 0, allowed 0"
    assert detail(found, "reload").startswith("tokenizer of ")
    assert found.accounting["model.layers.0.mlp.gate.weight"] == "kept"
    lost = "dropped: the layer's 8 experts became 3"
    assert found.accounting["model.layers.1.mlp.experts.7.up_proj.weight"] == lost


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "glm4_moe"))]
)
def test_a_pruned_model_passes_as_stock(family, tiny_model, tmp_path):
    chain = pruned(opened(tiny_model(family)), tmp_path / "chain", [0, 2, 3, 7])
    export(chain, tmp_path / "model")
    found = verify(tmp_path / "model", chain, source=chain.source)
    assert found.problems == ()
    assert results(found) == PASSED


def test_a_packed_model_that_was_written_dense_passes_without_its_kind(tiny_model, tmp_path):
    chain = quantized(opened(tiny_model("qwen3_moe", dtype="bfloat16")), tmp_path / "quantized")
    export(chain, tmp_path / "model", "expanded")
    found = verify(tmp_path / "model", chain, free_bytes=NO_MEMORY)
    assert found.problems == ()


@pytest.mark.own_interpreter
@pytest.mark.parametrize("merge_first", [False, True], ids=["stock", "compact"])
def test_packed_models_pass_with_a_difference_of_zero(merge_first, tiny_model, tmp_path):
    chain = opened(tiny_model("qwen3_moe", dtype="bfloat16"))
    chain = merged(chain, tmp_path / "merged", 4) if merge_first else chain
    chain = quantized(chain, tmp_path / "quantized")
    export(chain, tmp_path / "model")
    found = verify(tmp_path / "model", chain)
    assert found.problems == ()
    assert detail(found, "logits").startswith("largest difference 0, allowed 0.0")
    assert found.accounting["model.layers.0.self_attn.q_proj.weight"] == "dropped: packed to 4 bits"
    assert results(verify_folder(tmp_path / "model")) == dict.fromkeys(
        ("shapes", "packing", "reload", "logits"), "passed"
    )


def test_accounting_says_what_became_of_each_tensor(tiny_model, tmp_path):
    chain = pruned(opened(tiny_model("qwen3_moe")), tmp_path / "chain", [0, 2])
    export(chain, tmp_path / "model")
    found = verify(tmp_path / "model", chain, free_bytes=NO_MEMORY)
    prefix = "model.layers.0.mlp."
    assert found.accounting[f"{prefix}gate.weight"] == "rewritten from [8, 64] to [2, 64]"
    assert found.accounting[f"{prefix}experts.0.up_proj.weight"] == "kept"
    assert found.accounting[f"{prefix}experts.2.up_proj.weight"] == f"kept as {prefix}experts.1.up_proj.weight"
    assert found.accounting[f"{prefix}experts.5.up_proj.weight"] == "dropped: expert pruned"
    assert detail(found, "tensors") == "69 tensors of the source: 31 kept, 2 rewritten, 36 dropped"


def test_too_little_memory_is_said_and_is_not_a_pass(tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe")), tmp_path / "chain", 3)
    export(chain, tmp_path / "model")
    found = verify(tmp_path / "model", chain, free_bytes=NO_MEMORY)
    assert found.status == "skipped"
    assert results(found) == PASSED | {"reload": "skipped", "logits": "skipped"}
    assert "GiB of memory, " in detail(found, "logits") and "GiB free" in detail(found, "logits")
    reported = Reported.model_validate(found.as_json())
    assert reported.checks[-1].detail.startswith("skipped: needs ")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("model.norm.weight", None, "`model.norm.weight` is missing from the folder"),
        ("model.extra.weight", torch.zeros(2), "`model.extra.weight` is in the folder, but no stage wrote it"),
        (
            "model.layers.1.mlp.experts.2.up_proj.weight",
            torch.zeros(30, 64),
            "`model.layers.1.mlp.experts.2.up_proj.weight` is float32 [30, 64], expected float32 [32, 64]",
        ),
        (
            "model.layers.1.mlp.gate.weight",
            torch.zeros(8, 64),
            "`model.layers.1.mlp.gate.weight` differs from the source",
        ),
    ],
    ids=["missing", "unexpected", "shape", "router"],
)
def test_damage_is_named_from_the_files_alone(name, value, problem, tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe")), tmp_path / "chain", 3)
    export(chain, tmp_path / "model")
    change(tmp_path / "model", name, value)
    found = verify(tmp_path / "model", chain, free_bytes=NO_MEMORY)
    assert found.status == "failed"
    assert problem in found.problems


def test_a_router_row_that_a_stage_did_not_write_must_keep_its_bits_and_dtype(tiny_model, tmp_path):
    chain = pruned(opened(tiny_model("glm4_moe", dtype="bfloat16")), tmp_path / "chain", [0, 2, 3, 7])
    export(chain, tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(tmp_path / "model", name, chain.get(name).bfloat16())
    found = verify(tmp_path / "model", chain, free_bytes=NO_MEMORY)
    assert f"`{name}` is torch.bfloat16, the source's is torch.float32" in found.problems


def test_a_drop_needs_a_reason(tiny_model, tmp_path):
    source = opened(tiny_model("qwen3_moe"))
    with OverlayWriter(tmp_path / "chain", source) as out:
        out.part("norm", lambda part: part.drop("model.norm.weight", ""))
    export(out.checkpoint, tmp_path / "model")
    found = verify(tmp_path / "model", out.checkpoint, free_bytes=NO_MEMORY)
    assert found.problems == ("`model.norm.weight` is dropped without a reason",)


def test_weights_that_changed_after_the_export_change_the_logits(tiny_model, tmp_path):
    chain = pruned(opened(tiny_model("qwen3_moe")), tmp_path / "chain", [0, 2, 3, 7])
    export(chain, tmp_path / "model")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    change(tmp_path / "model", name, chain.get(name) * 1.5)
    found = verify(tmp_path / "model", chain)
    assert results(found) == PASSED | {"logits": "failed"}
    assert found.problems[0].startswith("logits of a fresh process differ by ")


@pytest.mark.own_interpreter
def test_a_fresh_process_names_what_is_missing_and_of_another_shape(tiny_model, tmp_path):
    export(opened(tiny_model("qwen3_moe")), tmp_path / "model")
    change(tmp_path / "model", "model.norm.weight", torch.zeros(3))
    change(tmp_path / "model", "model.layers.0.input_layernorm.weight", None)
    change(tmp_path / "model", "model.odd.weight", torch.zeros(3))
    tokens = fixed_tokens(opened(tmp_path / "model").facts)
    report, error = verification._in_fresh_process(opened(tmp_path / "model"), tokens, tmp_path)
    assert error is None
    assert list(verification._loading_problems(report, opened(tmp_path / "model"))) == [
        "a fresh process misses `model.layers.0.input_layernorm.weight`",
        "a fresh process does not expect `model.odd.weight`",
        "a fresh process reads `model.norm.weight` as [3], expected [64]",
    ]


@pytest.mark.own_interpreter
def test_a_folder_that_does_not_load_says_why(tiny_model, tmp_path):
    chain = merged(opened(tiny_model("qwen3_moe")), tmp_path / "chain", 3)
    export(chain, tmp_path / "model")
    (tmp_path / "model" / "modeling_moecli.py").write_text("raise ImportError('not today')")
    found = verify(tmp_path / "model", chain)
    assert "a fresh process cannot load the folder: ImportError: not today" in found.problems
    assert results(found)["logits"] == "skipped"


def test_a_folder_against_its_source_lists_what_changed(tiny_model, tmp_path):
    source = tiny_model("qwen3_moe")
    export(pruned(opened(source), tmp_path / "chain", [0, 2, 3, 7]), tmp_path / "model")
    found = verify_folder(tmp_path / "model", source, free_bytes=NO_MEMORY)
    assert found.problems == ()
    assert detail(found, "routers") == "2 rows of the source"
    assert found.accounting["model.layers.0.mlp.experts.5.up_proj.weight"] == "dropped: expert pruned or merged"
    change(tmp_path / "model", "model.norm.weight", None)
    found = verify_folder(tmp_path / "model", source, free_bytes=NO_MEMORY)
    assert found.problems == ("`model.norm.weight` of the source is gone, and nothing says why",)


def test_packed_stacks_are_packed_and_not_lost(tiny_model, tmp_path):
    """gpt_oss: the empty guard has the name that a packed tensor had."""
    source = opened(tiny_model("gpt_oss", dtype="bfloat16"))
    export(quantized(source, tmp_path / "chain"), tmp_path / "model")
    found = verify_folder(tmp_path / "model", source, free_bytes=NO_MEMORY)
    assert found.problems == ()
    experts = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert {found.accounting[f"{e}.{name}"] for e in experts for name in ("gate_up_proj", "down_proj")} == {
        "dropped: packed"
    }
    assert {found.accounting[f"{e}.gate_up_proj_bias"] for e in experts} == {"kept"}


def test_a_folder_that_contradicts_its_config_is_named(tiny_model, tmp_path):
    export(opened(tiny_model("qwen3_moe")), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["num_local_experts"] = 6
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    found = verify_folder(tmp_path / "model", free_bytes=NO_MEMORY)
    said = "`model.layers.0.mlp.experts.6.gate_proj.weight` exists: config.json says 6 experts, the checkpoint has 8"
    assert found.problems[0] == said
    assert "`model.layers.0.mlp.gate.weight` has shape [8, 64], config.json asks for [6, 64]" in found.problems


def test_the_fixed_tokens_are_the_same_everywhere():
    facts = ModelFacts("toy", 1, (0,), 2, 1, 4, 4, 100, "float32", "softmax", False, 64, 2)
    tokens = fixed_tokens(facts)
    assert [len(row) for row in tokens] == [64, 64]
    assert tokens[0][:6] == [30, 67, 80, 38, 40, 18]
    assert min(map(min, tokens)) >= 0 and max(map(max, tokens)) < 100


def test_free_memory_is_a_positive_number_of_bytes():
    assert 2**20 < verification.available_bytes() < 2**50


PACKED = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("scale", lambda t: t.index_fill(1, torch.tensor([2]), 0.0), "has values that are not finite or are zero"),
        ("scale", lambda t: t * float("nan"), "has values that are not finite or are zero"),
        ("scale", lambda t: t[:, :3].contiguous(), "of [32, 64] has 3 scales a row"),
        ("packed", lambda t: t[:, :-1].contiguous(), "of [32, 64] needs 8 words a row at 4 bits, it has 7"),
        ("packed", lambda t: t[:-1].contiguous(), "of [32, 64] has words for 31 rows"),
    ],
    ids=["zero scale", "nan scale", "too few scales", "too few words", "too few rows"],
)
def test_packed_parts_that_do_not_go_together_are_named(part, value, said, tiny_model, tmp_path):
    chain = quantized(opened(tiny_model("qwen3_moe", dtype="bfloat16")), tmp_path / "quantized")
    export(chain, tmp_path / "model")
    assert results(verify_folder(tmp_path / "model", free_bytes=NO_MEMORY))["packing"] == "passed"
    change(tmp_path / "model", f"{PACKED}_{part}", value(chain.get(f"{PACKED}_{part}")))
    found = verify_folder(tmp_path / "model", free_bytes=NO_MEMORY)
    assert results(found)["packing"] == "failed"
    assert found.problems == (f"`{PACKED}{'_scale' if 'values' in said else ''}` {said}",)


def test_a_mix_that_stock_transformers_misreads_does_not_verify(tiny_model, tmp_path):
    """However it came to be written."""
    from moecli.io.writer import export_folder

    chain = quantized(opened(tiny_model("qwen3_moe")), tmp_path / "quantized", 4, per_layer={1: 8})
    export_folder(chain, tmp_path / "stock")
    (problem,) = verify_folder(tmp_path / "stock", free_bytes=NO_MEMORY).problems
    assert problem == (
        "experts are packed to 4 and 8 bits in groups of 16, which differ by layer, and transformers reads one packing "
        "for all experts and says so only where shapes disagree"
    )
    export(chain, tmp_path / "compact", "compact")
    assert verify_folder(tmp_path / "compact", free_bytes=NO_MEMORY).problems == ()
