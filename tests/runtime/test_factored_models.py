"""Compact checkpoints of factors load through stock classes and compute what their expanded form computes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from moecli.core.artifacts import sketch_of
from moecli.families import facts_of
from moecli.families.adapter import load_model
from moecli.families.count import count_of
from moecli.io.factors import unfactored
from moecli.io.formats import DenseView
from moecli.io.reader import FolderCheckpoint
from moecli.runner import verify as verification
from moecli.runner.export import choose, export
from moecli.runner.verify import verify, verify_folder
from tests.io.test_factors import factored
from tests.runner.chains import merged

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 100
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "ernie4_5_moe", "lfm2_moe"]


def logits(folder, **options):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("base", "rows"), [(False, 0), (True, 2)])
def test_factors_are_run_and_compute_their_product(family, base, rows, tiny_model, tmp_path):
    source = FolderCheckpoint(tiny_model(family), facts_of)
    chain, _ = factored(source, tmp_path / "chain", base, rows)
    assert choose(chain) == "compact"
    export(chain, tmp_path / "compact")
    export(chain, tmp_path / "expanded", "expanded")
    compact, expanded = logits(tmp_path / "compact"), logits(tmp_path / "expanded")
    assert (compact - expanded).abs().max() < 1e-5 * expanded.abs().max()
    with torch.no_grad():
        here = [load_model(some)(TOKENS).logits for some in (chain, DenseView(chain), unfactored(chain))]
    for found in here:
        assert torch.equal(found, compact)
    assert {n: t.shape for n, t in load_file(tmp_path / "expanded" / "model.safetensors").items()} == {
        n: t.shape for n, t in load_file(tiny_model(family) / "model.safetensors").items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_passes_both_forms(dtype, tiny_model, tmp_path):
    source = FolderCheckpoint(tiny_model("qwen3_moe", dtype=dtype), facts_of)
    chain, _ = factored(source, tmp_path / "chain", dtype=getattr(torch, dtype))
    for kind in ("compact", "expanded"):
        export(chain, tmp_path / kind, kind)
        found = verify(tmp_path / kind, chain, source, kind=kind)
        assert (found.status, found.problems) == ("passed", ())
        assert found.checks[-1].detail == "largest difference 0, allowed 0"
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        assert found.accounting[name] == "dropped: stored as factors of rank 3"
    alone = verify_folder(tmp_path / "compact", source)
    assert alone.status == "passed"
    assert alone.accounting[name] == "dropped: stored as factors"


def test_a_changed_factor_does_not_verify(tiny_model, tmp_path):
    from safetensors.torch import save_file

    chain, _ = factored(FolderCheckpoint(tiny_model("qwen3_moe"), facts_of), tmp_path / "chain")
    export(chain, tmp_path / "compact")
    file = tmp_path / "compact" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.base.up_proj"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert verify(tmp_path / "compact", chain).status == "failed"


def test_merged_experts_may_be_factors(tiny_model, tmp_path):
    source = FolderCheckpoint(tiny_model("mixtral"), facts_of)
    small = merged(source, tmp_path / "merged", {0: 3, 1: 5})
    chain, _ = factored(small, tmp_path / "chain")
    export(chain, tmp_path / "compact")
    export(chain, tmp_path / "expanded", "expanded")
    expanded = logits(tmp_path / "expanded")
    assert (logits(tmp_path / "compact") - expanded).abs().max() < 1e-5 * expanded.abs().max()
    assert verify(tmp_path / "compact", chain).status == "passed"


def test_a_loaded_model_saves_and_loads_again(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    chain, _ = factored(FolderCheckpoint(tiny_model("mixtral"), facts_of), tmp_path / "chain")
    export(chain, tmp_path / "compact")
    AutoModelForCausalLM.from_pretrained(tmp_path / "compact").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "compact"))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_runs_the_factors(implementation, tiny_model, tmp_path):
    chain, _ = factored(FolderCheckpoint(tiny_model("qwen3_moe"), facts_of), tmp_path / "chain")
    export(chain, tmp_path / "compact")
    found = logits(tmp_path / "compact", experts_implementation=implementation)
    assert torch.equal(found, logits(tmp_path / "compact"))


def test_a_reader_who_does_not_know_the_form_is_stopped(tiny_model, tmp_path):
    """Without `moecli` and its file: stock transformers would make up the experts that it misses."""
    chain, _ = factored(FolderCheckpoint(tiny_model("qwen3_moe"), facts_of), tmp_path / "chain")
    export(chain, tmp_path / "compact")
    script = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'compact')!r})"
    done = verification.run_python(script, [], tmp_path, os.environ)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


def test_a_layer_without_experts_in_the_config_is_named(tiny_model, tmp_path):
    chain, _ = factored(FolderCheckpoint(tiny_model("qwen3_moe"), facts_of), tmp_path / "chain")
    export(chain, tmp_path / "compact")
    config = json.loads((tmp_path / "compact" / "config.json").read_text())
    config["quantization_config"]["factors"]["7"] = config["quantization_config"]["factors"]["1"]
    (tmp_path / "compact" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names layers without experts: 7"):
        logits(tmp_path / "compact")


@pytest.mark.parametrize("exported", [False, True])
def test_speed_is_estimated_from_the_factors(exported, tiny_model, tmp_path):
    """Two thin products and the rows for each expert that a token goes to; the shared matrices once."""
    source = FolderCheckpoint(tiny_model("mixtral"), facts_of)
    chain, _ = factored(source, tmp_path / "chain")
    if exported:
        export(chain, tmp_path / "compact")
        chain = FolderCheckpoint(tmp_path / "compact", facts_of)
    count, plain = count_of(sketch_of(chain)), count_of(sketch_of(source))
    f, d, r, n = 32, 64, 3, 2
    each = {
        ("left", "right", "rows"): [(r, f), (d, r), (d, n), (r, f), (d, r), (d, n), (r, d), (f, r), (f, n)],
        ("base",): [(d, f), (d, f), (f, d)],
    }
    for layer, before in zip(count.layers, plain.layers, strict=True):
        assert [(m.inputs, m.outputs) for m in layer.expert] == each["left", "right", "rows"]
        assert [m.bytes for m in layer.expert] == [4 * a * b for a, b in each["left", "right", "rows"]]
        assert layer.linears[: len(before.linears)] == before.linears
        assert [(m.inputs, m.outputs) for m in layer.linears[len(before.linears) :]] == each["base",]
        assert layer.small_bytes == before.small_bytes + 3 * 8 * n * 8  # which rows
    assert count.head == plain.head
