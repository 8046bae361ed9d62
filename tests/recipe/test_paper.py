"""Recipes of published rows: they read, and what they expect is something they measure."""

from pathlib import Path

import pytest
import yaml

from moecli.methods.eval.lm_eval import expanded
from moecli.runner import sweep
from moecli.runner.table import ExpectedFile

FOLDER = Path(__file__).parents[2] / "recipes" / "paper"
SWEEPS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.endswith(".expected.yaml"))


def measured(recipe):
    """Tasks that a recipe's evaluations report."""
    for entry in recipe.stages:
        if entry.run == "eval/lm-eval":
            yield from expanded(entry.options.tasks, None)
        elif entry.run == "eval/perplexity":
            yield f"perplexity (windowed {entry.options.window})"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_expected_numbers_are_of_runs_and_tasks_of_the_sweep(path):
    points = {point.name: set(measured(point.recipe)) for point in sweep.load(path).points}
    points["source"] = set.union(*points.values())
    values = yaml.safe_load(path.with_suffix(".expected.yaml").read_text())
    expected = ExpectedFile.model_validate(values).expected
    for one in expected:
        assert (one.metric if one.task == "perplexity" else one.task) in points[one.run]
        assert one.tolerance > 0
        assert one.source.startswith("arXiv:")
    assert len({(one.run, one.task, one.metric) for one in expected}) == len(expected)


def test_every_file_of_expected_numbers_has_its_sweep():
    assert {p.name.removesuffix(".expected.yaml") for p in FOLDER.glob("*.expected.yaml")} == {p.stem for p in SWEEPS}
