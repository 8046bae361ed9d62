"""Statistics of earlier runs in a recipe: taken as they are, and refused where they do not belong."""

from __future__ import annotations

import json

import pytest
import torch

from moecli.core.errors import RecipeError, StageFailed, SurroundingsError
from moecli.engine.stats import merged, names_in
from moecli.io.store import save_artifact
from moecli.methods.calibrate import statistics as collecting
from moecli.methods.calibrate.stored import Stored, stored
from moecli.runner.open import open_recipe


@pytest.fixture
def made(checkpoint, context, tmp_path):
    """`made(text, **options)`: statistics of the toy model on a text of some letters."""

    def make(letters, **options):
        path = tmp_path / f"{letters}.jsonl"
        path.write_text("".join(json.dumps({"text": letters * i}) + "\n" for i in range(8, 40)))
        values = {"dataset": str(path), "samples": 3, "tokens_per_sample": 16, "statistics": ["gean_sum", "absmax"]}
        opt = collecting.Statistics.model_validate_json(json.dumps(values | options))
        return collecting.statistics(opt, checkpoint(), context(letters))

    return make


def kept(stats, folder):
    save_artifact(folder, "stats", stats)
    return str(folder / "stats.safetensors")


def test_merged_statistics_feed_a_recipe(made, tmp_path, checkpoint, context):
    both = merged(made("abc"), made("xyz"))
    ctx = context("stored")
    found = stored(Stored(file=kept(both, tmp_path), statistics=["gean_sum"]), checkpoint(), ctx)
    assert found.source == both.source
    for layer, expected in both.items():
        assert found[layer].tokens == expected.tokens == 96
        assert all(torch.equal(found[layer][name], expected[name]) for name in names_in(expected))
    assert ctx.records["load"]["0"] == both[0].count_E.tolist()


def test_another_model_is_refused(made, tmp_path, checkpoint, context):
    file, ctx = kept(made("abc"), tmp_path), context("stored")
    ctx.input_keys = {"model": "fedcba9876543210"}
    with pytest.raises(StageFailed, match=r"of another model or tokenizer \(0123456789ab, the model here is fedcba98"):
        stored(Stored(file=file, statistics=[]), checkpoint(), ctx)


def test_another_precision_is_refused_unless_named(made, tmp_path, checkpoint, context):
    file = kept(made("abc", dtype="bfloat16"), tmp_path)
    with pytest.raises(StageFailed, match="were computed in bfloat16, expected float32") as caught:
        stored(Stored(file=file, statistics=[]), checkpoint(), context("auto"))
    assert caught.value.hint == "write `dtype: bfloat16`"
    stored(Stored(file=file, dtype="bfloat16", statistics=[]), checkpoint(), context("named"))


def test_what_is_missing_is_named(made, tmp_path, checkpoint, context):
    with pytest.raises(SurroundingsError, match=r"does not hold `x_cov`, `easy` \(layer 0\)"):
        opt = Stored(file=kept(made("abc"), tmp_path), statistics=["x_cov", "gean_sum", "easy"])
        stored(opt, checkpoint(), context("stored"))


def problem_of(tmp_path, model, file):
    path = tmp_path / "r.yaml"
    stages = [{"run": "calibrate/stored", "with": {"file": str(file)}}]
    path.write_text(json.dumps({"recipe": 1, "model": str(model), "stages": stages}))
    with pytest.raises(RecipeError) as caught:
        open_recipe(path)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic.message


def test_files_that_cannot_be_are_refused_before_anything_runs(made, tmp_path, tiny_model):
    file = kept(made("abc"), tmp_path)
    model = tiny_model("qwen3_moe")
    assert "must name a .safetensors file" in problem_of(tmp_path, model, tmp_path / "stats.json")
    assert "does not exist" in problem_of(tmp_path, model, tmp_path / "none.safetensors")
    said = problem_of(tmp_path, tiny_model("mixtral"), file)
    assert said == "the statistics are of a qwen3_moe model with 2 MoE layers, the model here is mixtral with 2"
    (tmp_path / "stats.json").write_text("{}")
    assert "has no statistics' .json beside it" in problem_of(tmp_path, model, file)
