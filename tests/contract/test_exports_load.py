"""Every result loads as its export says: the folder, loaded by transformers, computes what was in memory.

One recipe for each way that experts go, on one family for each kind of router and layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moecli  # noqa: F401  the loader of compact models registers itself
from moecli.families.adapter import load_model
from moecli.io.store import RunFolder
from moecli.runner.execute import Execution
from moecli.runner.export import export
from moecli.runner.open import open_recipe

KEEP, EXPERTS = 4, 8
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "phimoe", "gpt_oss")
GROUPED = ("deepseek_v3",)
"""Group-limited routing with a correction bias."""
WITHIN = {"keep": KEEP, "protect": "none", "routing_groups": "keep"}
RECIPES: dict[str, tuple[str, dict[str, dict]]] = {
    "prune": ("stock", {"prune/reap": {"keep": KEEP, "protect": "none"}}),
    "merge, alias": ("compact", {"cluster/hc-smoe": {"keep": KEEP}, "merge/weighted": {}}),
    "merge, other counts by layer": ("compact", {
        "cluster/m-smoe": {"keep": KEEP, "uniform": False, "protect": "none"}, "merge/weighted": {},
    }),
    "merge, rows dropped": ("stock", {"cluster/ream": WITHIN, "merge/ream": {}, "router/row-drop": {}}),
    "merge, rows averaged": ("stock", {"cluster/m-smoe": WITHIN, "merge/weighted": {}, "router/row-mean": {}}),
    "merge, refitted": ("stock", {"cluster/sub-moe": {**WITHIN, "alloc": "uniform"}, "merge/merge-moe": {},
                                  "router/refit": {}}),
    "merge, layer by layer": ("stock", {"merge/ream-sequential": {"keep": KEEP}}),
    "merge, copies": ("expanded", {"cluster/hc-smoe": {"keep": KEEP}, "merge/weighted": {}}),
}  # fmt: skip
OF_GROUPS: dict[str, tuple[str, dict[str, dict]]] = {
    "prune, groups ended": ("stock", {"prune/reap": {"keep": 3, "protect": "none", "groups": "flatten"}}),
    "prune, rows masked": ("compact", {"prune/easy-ep": {"keep": 5, "protect": "none", "groups": "mask"}}),
}
CASES = [(f, r) for f in FAMILIES for r in RECIPES] + [(f, r) for f in GROUPED for r in OF_GROUPS]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    words = ["a", "be", "cat", "dog", "eel", "fox", "gnu", "hen"]
    rows = [" ".join(words[(i * j) % 8] for j in range(1, 60)) for i in range(1, 20)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_every_kind_of_change_is_here():
    """A new way to drop, merge or route belongs into `RECIPES`."""
    kinds = {name.partition("/")[0] for _, stages in (RECIPES | OF_GROUPS).values() for name in stages}
    assert kinds == {"prune", "cluster", "merge", "router"}


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_what_is_loaded_computes_what_was_in_memory(family, recipe, text, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    kind, stages = (RECIPES | OF_GROUPS)[recipe]
    calibrate = {"dataset": str(text), "samples": 6, "tokens_per_sample": 32, "batch_size": 2}
    entries = [{"run": n, "with": o} for n, o in ({"calibrate/statistics": calibrate} | stages).items()]
    content = {"recipe": 1, "model": str(tiny_model(family)), "seed": 0, "stages": entries}
    (tmp_path / "r.yaml").write_text(json.dumps(content | ({"export": kind} if kind == "expanded" else {})))
    opened = open_recipe(tmp_path / "r.yaml")
    assert opened.plan.export == kind
    execution = Execution(opened, RunFolder(tmp_path / "run"), torch.device("cpu"))
    with execution.run.lock():
        for index in range(len(opened.plan.steps)):
            execution.step(index)
    checkpoint = execution.checkpoint(opened.plan.final)
    export(checkpoint, tmp_path / "model", kind)
    here = load_model(checkpoint)
    there, said = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ids = torch.randint(4, 100, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, theirs, source = (model.eval()(ids).logits for model in (here, there, load_model(execution.source)))
    assert torch.isfinite(mine).all()
    assert (mine - source).abs().max() > 1e-4
    assert (mine - theirs).abs().max() <= (1e-5 if kind == "expanded" else 0)
    assert (checkpoint.facts.router_rows == EXPERTS) == (kind != "stock")
