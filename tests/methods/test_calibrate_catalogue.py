"""Every statistic of a forward sweep, from a recipe to the run folder and back, and merged with another run's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moecli.core.artifacts import CalibrationStats
from moecli.engine.collectors import FORWARD, collectors, token_dim
from moecli.engine.data import Batch
from moecli.engine.stats import compared, merged, names_in
from moecli.engine.sweep import sweep
from moecli.io.store import RunFolder
from moecli.runner.execute import Execution
from moecli.runner.open import open_recipe
from tests.engine.memory import open_folder

Maker = Callable[..., Path]


def calibrated(folder: Path, model: Path, **given: object) -> CalibrationStats:
    rows = [" ".join(chr(97 + (i * j) % 26) * (1 + j % 5) for j in range(40)) for i in range(1, 20)]
    folder.mkdir()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = {"dataset": str(folder / "text.jsonl"), "samples": 3, "tokens_per_sample": 16, **given}
    stages = [{"run": "calibrate/statistics", "with": {"statistics": list(FORWARD), **options}}]
    (folder / "recipe.yaml").write_text(json.dumps({"recipe": 1, "model": str(model), "stages": stages}))
    run = RunFolder(folder / "run")
    execution = Execution(open_recipe(folder / "recipe.yaml"), run, torch.device("cpu"))
    with run.lock():
        execution.step(0)
    return Execution(open_recipe(folder / "recipe.yaml"), run, torch.device("cpu")).artifact(0, CalibrationStats)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_run_folder_holds_what_a_sweep_finds(family: str, tiny_model: Maker, tmp_path: Path) -> None:
    stats = calibrated(tmp_path / "a", tiny_model(family))
    batch = Batch(stats.text.ids, stats.text.mask)
    for layer in sweep(open_folder(tiny_model(family)), [batch]):
        found = layer.observe(collectors(FORWARD))
        kept = stats[layer.index]
        assert set(names_in(kept)) == set(names_in(found))
        for name in names_in(found):
            assert torch.equal(kept[name], found[name]), name


def test_two_runs_merge(tiny_model: Maker, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    one = calibrated(tmp_path / "a", model)
    two = calibrated(tmp_path / "b", model, samples=2, tokens_per_sample=12, packing="truncate")
    both = merged(one, two)
    batches = [Batch(text.ids, text.mask) for text in (one.text, two.text)]
    for layer in sweep(open_folder(model), batches):
        found, kept = layer.observe(collectors(FORWARD)), both[layer.index]
        assert kept.tokens == found.tokens
        for name in names_in(found):
            if FORWARD.get(name) is None or FORWARD[name].reduce == "sample":
                continue  # token numbers begin anew in each run, so the sample is another one of both texts
            torch.testing.assert_close(kept[name], found[name], rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for name in ("tok_reservoir", "act_sample"):
            dim, key = token_dim(name, FORWARD[name]), kept[f"{name}_key"]
            assert kept[name].shape[dim] == len(key) == kept.tokens
            assert torch.equal(key, key.sort().values)
    changes = {(c.layer, c.name) for c in compared(both, merged(one, two)) if not c.equal}
    assert changes == set()
