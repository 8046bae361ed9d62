"""One recipe means the same on every family: it runs to the end, and what it wrote loads and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moecli.core.errors import RecipeError
from moecli.io.reader import FolderCheckpoint
from moecli.runner.execute import RunResult
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_model, open_recipe
from tests import tiny

KEEP, EXPERTS = 4, 8
QUICK = {"qwen3_moe", "deepseek_v3", "gpt_oss"}
"""One of each kind of layout and router; the others are `slow`."""
FAMILIES = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in tiny.FAMILIES]
STACKED = {"gpt_oss", "granitemoe"}
"""Released checkpoints hold all experts of a layer in one tensor."""
NARROW = {"qwen2_moe", "qwen3_next"}
"""A shared expert of width 40."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    words = ["a", "be", "cat", "dog", "eel", "fox", "gnu", "hen"]
    rows = [" ".join(words[(i * j) % 8] for j in range(1, 60)) for i in range(1, 8)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def run(model: Path, stages: dict[str, dict], folder: Path) -> tuple[RunResult, FolderCheckpoint]:
    """The result and its model, which is tensor by tensor what the plan said."""
    entries = [{"run": name, "with": options} for name, options in stages.items()]
    recipe = {"recipe": 1, "model": str(model), "seed": 0, "stages": entries}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    opened = open_recipe(folder / "recipe.yaml")
    result = run_plan(opened, folder / "run")
    assert result.report.export == opened.plan.export
    written = open_model(str(result.model))[1]
    guard = (written.config.get("quantization_config") or {}).get("guard")
    specs = {name: written.spec(name) for name in written.names() if name != guard}
    assert specs == opened.plan.sketch_of(opened.plan.final).specs
    return result, written


def calibrate(text: Path) -> dict[str, dict]:
    options = {"dataset": str(text), "samples": 4, "tokens_per_sample": 32, "batch_size": 2}
    return {"calibrate/statistics": options}


def verification(result: RunResult) -> dict[str, tuple[bool, str]]:
    assert result.report.verification.status == "passed"
    return {check.name: check.detail for check in result.report.verification.checks}


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_and_packed(family, text, tiny_model, tmp_path):
    group_size = 8 if family in NARROW else 16
    stages = calibrate(text) | {
        "prune/reap": {"keep": KEEP},
        "quantize/rtn": {"bits": 4, "group_size": group_size},
        "eval/perplexity": {"dataset": str(text), "window": 32},
    }
    result, written = run(tiny_model(family, dtype="bfloat16"), stages, tmp_path)
    assert verification(result)["logits"].startswith("largest difference 0, ")
    report = result.report
    assert report.export == ("compact" if family in STACKED else "stock")
    assert written.facts.quantized == ("moecli" if family in STACKED else "compressed-tensors")
    assert (written.facts.experts, written.facts.router_rows) == (KEEP, KEEP)
    before, after = report.size.before.by_part["experts"], report.size.after.by_part["experts"]
    bits = 4 + 16 / group_size  # and the shapes: at most 32 bytes for each tensor
    layers = len(written.facts.moe_layers)
    assert 0 <= after - before / 2 * bits / 16 <= layers * KEEP * 3 * 32
    assert all(0 < row.after < float("inf") and row.after != row.before for row in report.metrics)
    assert {row.task for row in report.metrics} == {"perplexity"}


@pytest.mark.parametrize("family", sorted(STACKED))
def test_a_stock_form_of_packed_stacks_is_refused_by_the_plan(family, tiny_model, tmp_path):
    stages = [{"run": "quantize/rtn", "with": {"group_size": 16}}]
    recipe = {"recipe": 1, "model": str(tiny_model(family)), "export": "stock", "stages": stages}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError) as caught:
        open_recipe(tmp_path / "recipe.yaml")
    (problem,) = caught.value.diagnostics
    assert "transformers has no packed form for experts that one tensor a layer holds" in problem.message
    assert problem.hint == "write `export: compact`"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_behind_an_alias_map(family, text, tiny_model, tmp_path):
    stages = calibrate(text) | {"cluster/hc-smoe": {"keep": KEEP}, "merge/weighted": {}}
    result, written = run(tiny_model(family, dtype="bfloat16"), stages, tmp_path)
    assert verification(result)["logits"] == "largest difference 0, allowed 0"
    assert result.report.export == "compact"
    assert (written.facts.experts, written.facts.router_rows) == (KEEP, EXPERTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_by_fitted_experts_and_a_fitted_router(family, text, tiny_model, tmp_path):
    """Loads everywhere, under group-limited routing too when no cluster spans routing groups."""
    cluster = {"keep": KEEP, "protect": "none", "routing_groups": "keep"}
    stages = calibrate(text) | {"cluster/m-smoe": cluster, "merge/merge-moe": {}, "router/refit": {}}
    result, written = run(tiny_model(family, dtype="bfloat16"), stages, tmp_path)
    assert verification(result)["logits"] == "largest difference 0, allowed 0"
    assert result.report.export == "stock"
    assert (written.facts.experts, written.facts.router_rows) == (KEEP, KEEP)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_dropped_by_layer_or_expert(family, text, tiny_model, tmp_path):
    """Widths of their own: the plan knows the bytes, evaluations run, and a fresh process computes the same bits."""
    widths = "per_layer" if family in STACKED else "ragged"
    options = {"ratio": 0.5, "scope": "global", "widths": widths, "align": 8, "repair": "least_squares"}
    stages = calibrate(text) | {"slim/camera-p": options, "eval/perplexity": {"dataset": str(text), "window": 32}}
    entries = [{"run": name, "with": options} for name, options in stages.items()]
    recipe = {"recipe": 1, "model": str(tiny_model(family, dtype="bfloat16")), "seed": 0, "stages": entries}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    opened = open_recipe(tmp_path / "recipe.yaml")
    result = run_plan(opened, tmp_path / "run")
    assert verification(result)["logits"] == "largest difference 0, allowed 0"
    assert result.report.export == opened.plan.export == "compact"
    size = result.report.size
    assert size.after.by_part["experts"] == size.before.by_part["experts"] / 2
    assert size.after.bytes == opened.plan.sketch_of(opened.plan.final).bytes
    assert all(0 < row.after < float("inf") and row.after != row.before for row in result.report.metrics)
