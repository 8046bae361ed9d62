"""Input that pruning, clustering, merging and routers cannot work with: one message, its place, and what to type."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moecli.cli.main import run as command
from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import RecipeError, StageFailed
from moecli.io.store import load_artifact, save_artifact
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe

CALIBRATE = {"run": "calibrate/statistics", "with": {"samples": 3, "tokens_per_sample": 24}}


@pytest.fixture
def recipe(tmp_path):
    """`recipe(model, *stages)`: the path of a recipe, one line a stage from line 4 on."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "abcdef " * i}) + "\n" for i in range(8, 40)))

    def write(model, *stages):
        lines = ["recipe: 1", f"model: {json.dumps(str(model))}", "stages:"]
        for stage in stages:
            if stage is CALIBRATE:
                stage = {"run": stage["run"], "with": {"dataset": str(text), **stage["with"]}}
            lines.append(f"  - {json.dumps(stage)}")
        (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
        return tmp_path / "recipe.yaml"

    return write


def stage(name, **options):
    return {"run": name, "with": options}


GROUPED = ("cluster/hc-smoe", {"keep": 4}), ("merge/weighted", {})
AT_PLAN = {
    "fewer experts than the router picks": (
        "qwen3_moe", (stage("prune/reap", keep=1),), 5,
        "the router picks 2 experts per token, only 1 would be left", "use `keep: 2`",
    ),
    "fewer merged experts than the router picks": (
        "qwen3_moe", (stage("cluster/hc-smoe", keep=1), stage("merge/weighted"), stage("router/row-drop")), 7,
        "the router picks 2 experts per token, only 1 are left", "cluster with `keep: 2` or more",
    ),
    "groups that span routing groups": (
        "deepseek_v3", (stage("cluster/hc-smoe", keep=4), stage("merge/weighted"), stage("router/row-drop")), 7,
        "one row for each merged expert would move experts across the router's 2 groups",
        "write `routing_groups: keep` in the clustering, or leave this stage out",
    ),
    "experts that do not divide over routing groups": (
        "deepseek_v3", (stage("prune/reap", keep=5),), 5,
        "`keep` must be a multiple of the router's 2 groups (`n_group`), got 5", "use `keep: 4`",
    ),
    "counts that differ by layer under one row each": (
        "qwen3_moe", (stage("cluster/m-smoe", keep=4, uniform=False), stage("merge/weighted"),
                      stage("router/refit")), 7,
        "layers keep different numbers of experts, and one row for each needs one number",
        "write `alloc: uniform` or `uniform: true` in the clustering, or leave this stage out",
    ),
    "merging twice": (
        "qwen3_moe", (stage("cluster/hc-smoe", keep=6), stage("merge/weighted"), CALIBRATE,
                      stage("cluster/hc-smoe", keep=4), stage("merge/weighted")), 9,
        "the experts of this model are merged already",
        "put `- run: router/row-drop` between the two merges, or raise the first one's compression",
    ),
    "rows that have no bias to mask with": (
        "mixtral", (stage("prune/reap", keep=4, groups="mask"),), 5,
        "`mask` needs a router with a correction bias, `mixtral` has none", "leave `groups` out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AT_PLAN)
def test_the_plan_says_so_with_line_and_hint(case, recipe, tiny_model):
    family, stages, line, message, hint = AT_PLAN[case]
    with pytest.raises(RecipeError) as caught:
        open_recipe(recipe(tiny_model(family), CALIBRATE, *stages))
    (found,) = caught.value.diagnostics
    assert (found.message, found.hint, found.place.line) == (message, hint, line)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prune/reap", "`keep: 2` leaves no room for all protected Super Experts of this layer (expert 3 had to go)"),
        ("cluster/hc-smoe", "`keep: 2` leaves 0 groups for 5 experts beside 3 protected Super Experts"),
    ],
)
def test_more_protected_experts_than_places(name, message, recipe, tiny_model, tmp_path, monkeypatch):
    kind = name.partition("/")[0]
    monkeypatch.setattr(f"moecli.methods.{kind}.super_experts", lambda absmax, layers: {1: [1, 2, 3]})
    path = recipe(tiny_model("qwen3_moe"), CALIBRATE, stage(name, keep=2))
    with pytest.raises(StageFailed) as caught:
        run_plan(open_recipe(path), tmp_path / "run")
    assert caught.value.message == f"{name} stopped, layer 1: {message}"
    assert caught.value.hint.endswith("or write `protect: none`")


@pytest.fixture
def stored(recipe, tiny_model, tmp_path):
    """`stored(change)`: a file of statistics of the toy qwen3_moe, each layer changed."""

    def make(change=lambda layer: layer):
        asks = {"statistics": ["gean_sum", "absmax", "y_mean", "easy", "tok_reservoir"]}
        calibrate = {
            "run": CALIBRATE["run"],
            "with": {**CALIBRATE["with"], **asks, "dataset": str(tmp_path / "text.jsonl")},
        }
        run_plan(open_recipe(recipe(tiny_model("qwen3_moe"), calibrate)), tmp_path / "made", until=CALIBRATE["run"])
        (folder,) = (tmp_path / "made" / "stages" / "calibrate-statistics").iterdir()
        stats = load_artifact(folder, "artifact", CalibrationStats)
        save_artifact(tmp_path, "stats", CalibrationStats({i: change(s) for i, s in stats.items()}, stats.source))
        return str(tmp_path / "stats.safetensors")

    return make


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_statistics_of_another_model_or_tokenizer(what, stored, recipe, tiny_model, tmp_path):
    file = stored()
    other = tiny_model("qwen3_moe", rms_norm_eps=1e-5)
    if what == "tokenizer":
        other = shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "other")
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = (
            tokenizer["model"]["vocab"]["b"], tokenizer["model"]["vocab"]["a"],
        )  # fmt: skip
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = recipe(other, stage("calibrate/stored", file=file), stage("prune/reap", keep=4))
    with pytest.raises(StageFailed) as caught:
        run_plan(open_recipe(path), tmp_path / "run")
    assert caught.value.message.startswith(
        f"calibrate/stored stopped: the statistics in `{file}` are of another model or tokenizer ("
    )
    assert caught.value.hint == "calibrate with this model, or name the file of a run that did"


@pytest.mark.parametrize(
    "name", ["prune/frequency", "prune/reap", "prune/easy-ep", "prune/naee", "cluster/hc-smoe", "cluster/m-smoe"]
)
def test_frequencies_that_are_all_zero(name, stored, recipe, tiny_model, tmp_path):
    def silent(layer):
        return LayerStats(layer.tokens, torch.zeros_like(layer.count_E), layer.gate_sum_E, layer.extra)

    file = stored(silent)
    options = {"metric": "weight_cos"} if name == "cluster/m-smoe" else {}
    path = recipe(tiny_model("qwen3_moe"), stage("calibrate/stored", file=file), stage(name, keep=4, **options))
    with pytest.raises(StageFailed) as caught:
        run_plan(open_recipe(path), tmp_path / "run")
    assert caught.value.message == f"{name} stopped, layer 0: no calibration token was routed to any expert"
    assert caught.value.hint == "calibrate with text, and with more `samples`"


def test_scores_that_are_not_numbers(stored, recipe, tiny_model, tmp_path, capsys):
    def broken(layer):
        extra = dict(layer.extra) | {"gean_sum": layer["gean_sum"].index_fill(0, torch.tensor(2), float("nan"))}
        return LayerStats(layer.tokens, layer.count_E.clamp(min=1), layer.gate_sum_E, extra)

    path = recipe(tiny_model("qwen3_moe"), stage("calibrate/stored", file=stored(broken)), stage("prune/reap", keep=4))
    assert command(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "error: prune/reap stopped, layer 0: score of expert 2 is NaN" in said
    assert "hint: calibrate again: statistics must be finite numbers" in said
