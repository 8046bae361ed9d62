"""Every registered stage keeps the same promises; a new method is tested by being there.

Options a method requires are taken from `VALUES` by name. A method with other required options adds its name here.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic_core import PydanticUndefined

from moecli.core.artifacts import CalibrationStats, CalibrationText, Checkpoint, ExpertPlan
from moecli.core.errors import RecipeError
from moecli.io.store import RunFolder
from moecli.runner import lookup
from moecli.runner.execute import Execution
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe

VALUES = {"keep": 4, "ratio": 0.5, "bits": 4, "tasks": ["tiny_choice"], "average": 3.0, "kept": 0.5}
OVERRIDES = {
    "allocate/pmq": {"group_size": 16},
    "allocate/gemq": {"group_size": 16},
    "allocate/evopress": {"group_size": 16, "generations": 2, "offspring": 2, "steps": [[1, 64]]},
    **{n: {"align": 8} for n in lookup.names() if n[:5] == "slim/" and "align" in lookup.find(n).options.model_fields},
    "calibrate/statistics": {"samples": 6, "tokens_per_sample": 32, "batch_size": 2},
    "calibrate/text": {"samples": 6, "tokens_per_sample": 32},
    "calibrate/balanced": {"samples": 3, "tokens_per_sample": 32, "pool": 2, "batch_size": 2},
    "quantize/gptq": {"group_size": 16},
    "slim/mc-smoe-second": {"rank": 6},
    "quantize/awq": {"group_size": 16},
    "quantize/camera-q": {"group_size": 16, "down_group_size": 8},
    "quantize/hqq": {"group_size": 16},
    "quantize/rtn": {"group_size": 16},
    **{name: {"rank": 4} for name in lookup.names() if name.startswith("compensate/")},
    "eval/lm-eval": {"limit": 4},
    "eval/perplexity": {"window": 32},
    "eval/fidelity": {"window": 32},
    "eval/bits-per-character": {"window": 64, "stride": 32},
    "eval/information-capacity": {"tokens": 64},
    "eval/routing": {"samples": 4, "tokens_per_sample": 32, "windows": [4, 16]},
    "eval/speed": {"batch_sizes": [1], "prompt": 8, "new_tokens": 2, "repeats": 2},
}
TIMED = ("eval/lm-eval", "eval/speed")
"""Stages whose artifacts hold times of day, or times that work took."""


@pytest.fixture(scope="module")
def material(tmp_path_factory, tiny_model):
    """Text, a task and stored statistics, of our own making."""
    folder = tmp_path_factory.mktemp("material")
    words = ["a", "be", "cat", "dog", "eel", "fox", "gnu", "hen"]
    rows = [" ".join(words[(i * j) % 8] for j in range(1, 60)) for i in range(1, 30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    choices = [{"q": row[:40], "choices": ["cat", "dog"], "answer": i % 2} for i, row in enumerate(rows)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (folder / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{answer}}'\ndoc_to_choice: '{{choices}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    calibrate = [{"run": "calibrate/statistics", "with": options("calibrate/statistics", folder)}]
    _, made = execute(write_recipe(folder / "stored", tiny_model("qwen3_moe"), calibrate), folder / "stored" / "run")
    for kind in ("json", "safetensors"):
        shutil.copy(made / f"artifact.{kind}", folder / f"stored.{kind}")
    return folder


def options(name, material):
    fields = lookup.find(name).options.model_fields
    given = {"dataset": str(material / "text.jsonl"), "include": str(material)}
    given["file"] = str(material / "stored.safetensors")
    chosen = {f: given[f] for f in fields if f in given}
    for field, info in fields.items():
        if info.is_required() and field not in chosen:
            assert field in VALUES, f"`{name}` requires `{field}`: add a value for it to VALUES"
            chosen[field] = VALUES[field]
        assert info.description, f"option `{field}` of `{name}` has no docstring"
        assert info.default is not PydanticUndefined or info.is_required()
    return chosen | OVERRIDES.get(name, {})


def ways_to(name, material):
    """The shortest recipe that ends in this stage."""
    stage = lookup.find(name)
    before = []
    kinds = [i.type for i in stage.inputs.values() if not i.optional]
    if stage.kind == "router":
        before = ["calibrate/statistics", "cluster/hc-smoe", "merge/weighted"]
    elif ExpertPlan in kinds:
        before = ["calibrate/statistics", "cluster/hc-smoe"]
    elif CalibrationStats in kinds:
        before = ["calibrate/statistics"]
    elif stage.kind == "compensate":
        before = ["calibrate/text", "quantize/rtn"]
    elif CalibrationText in kinds:
        before = ["calibrate/text"]
    return [{"run": n, "with": options(n, material)} for n in [*before, name]]


def write_recipe(folder, model, stages):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"recipe": 1, "model": str(model), "seed": 0, "stages": stages}))
    return path


def digest_of(folder: Path) -> dict[str, str]:
    """sha256 by file, without what may differ: times and peaks live in the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def execute(path, run_dir):
    """Run all steps of a recipe without export; the folder of the last one."""
    opened = open_recipe(path)
    run = RunFolder(run_dir)
    execution = Execution(opened, run, torch.device("cpu"))
    with run.lock():
        for index in range(len(opened.plan.steps)):
            execution.step(index)
    return execution, execution.folder(opened.plan.steps[-1]).path


@pytest.mark.parametrize("name", lookup.names())
def test_a_stage_is_deterministic_and_documented(name, material, tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model("qwen3_moe"), ways_to(name, material))
    first = digest_of(execute(path, tmp_path / "a")[1])
    second = digest_of(execute(path, tmp_path / "b")[1])
    volatile = {f for f in first if "results" in f or (f == "artifact.json" and name in TIMED)}
    assert first.keys() == second.keys()
    assert {f: d for f, d in first.items() if f not in volatile} == {
        f: d for f, d in second.items() if f not in volatile
    }
    text = lookup.docstring(name)
    assert f"run: {name}" in text, "the module docstring ends with a recipe"
    assert lookup.summary(name).endswith(".")


class PulledPlugError(BaseException):
    """Stands for a crash: nothing may catch it."""


@pytest.mark.parametrize("name", [n for n in lookup.names() if lookup.find(n).kind != "eval"])
def test_a_stage_goes_on_after_a_crash(name, material, tiny_model, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, tiny_model("qwen3_moe"), ways_to(name, material))
    whole = digest_of(execute(path, tmp_path / "whole")[1])

    from moecli.io import store

    finish = store.StageFolder.finish
    stage_folder = name.replace("/", "-")

    def pull_the_plug(self, manifest):
        if self.path.parent.name == stage_folder:
            raise PulledPlugError
        finish(self, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(store.StageFolder, "finish", pull_the_plug)
        with pytest.raises(PulledPlugError):
            execute(path, tmp_path / "crashed")
    assert digest_of(execute(path, tmp_path / "crashed")[1]) == whole


@pytest.mark.parametrize("name", lookup.names())
def test_unknown_options_are_refused_with_a_place(name, material, tiny_model, tmp_path):
    stages = ways_to(name, material)
    stages[-1]["with"] = stages[-1]["with"] | {"no_such_option": 1}
    path = write_recipe(tmp_path, tiny_model("qwen3_moe"), stages)
    with pytest.raises(RecipeError) as caught:
        open_recipe(path)
    assert "no_such_option" in caught.value.diagnostics[0].message
    assert caught.value.diagnostics[0].place.line == 1


@pytest.mark.parametrize("name", [n for n in lookup.names() if issubclass(lookup.find(n).output, Checkpoint)])
def test_what_a_weight_stage_writes_is_what_plan_forecast(name, material, tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model("qwen3_moe"), ways_to(name, material))
    execution, _ = execute(path, tmp_path / "run")
    written = execution.checkpoint(execution.plan.final)
    assert {n: written.spec(n) for n in written.names()} == execution.plan.steps[-1].sketch.specs
    assert written.facts == execution.plan.steps[-1].sketch.facts


@pytest.mark.parametrize("name", [n for n in lookup.names() if issubclass(lookup.find(n).output, Checkpoint)])
def test_a_weight_stage_reloads_after_export(name, material, tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model("qwen3_moe"), ways_to(name, material))
    opened = open_recipe(path)
    result = run_plan(opened, tmp_path / "run")
    assert result.report.verification.status == "passed"
    shutil.rmtree(tmp_path / "run")
