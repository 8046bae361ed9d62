"""Comparison of evaluations by hand: what is paired, what is refused, and what is read from disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moecli.core.artifacts import Column, Evaluation, Items, Metric
from moecli.core.errors import MoecliError, SurroundingsError, UsageError
from moecli.io.store import save_artifact
from moecli.ops import paired
from moecli.runner.compare import Side, compare, load_side, load_sides, pair

SETTINGS = {
    "limit": 10, "seeds": {"torch": 0}, "tasks": {"t": {"version": 1}, "u": {"version": 3}},
    "environment": {"device": "cpu"},
}  # fmt: skip


def evaluation(*tasks: Items, settings: dict[str, Any] | None = None) -> Evaluation:
    """Metrics as the items have them."""
    metrics = tuple(
        Metric(task.task, name, column.total(), None, len(column.values), column.form == "mean")
        for task in tasks
        for name, column in task.columns.items()
    )
    return Evaluation(metrics, SETTINGS if settings is None else settings, {}, tasks)


def task(
    name: str, values: list[float], metric: str = "acc", form: Any = "mean", weights: tuple[float, ...] = ()
) -> Items:
    docs = tuple(f"{i}:d{i}" for i in range(len(values)))
    return Items(name, docs, tuple(f"p{i}" for i in range(len(values))), {metric: Column(form, tuple(values), weights)})


def compared(a: Evaluation, b: Evaluation) -> Any:
    return compare(Side("a", {"eval/x": a}), Side("b", {"eval/x": b}))


def with_settings(**changed: Any) -> Evaluation:
    return evaluation(task("t", [1.0, 0.0]), settings=SETTINGS | changed)


def test_flips_both_ways_p_and_interval():
    before, after = [1.0] * 6 + [0.0] * 4, [1.0] * 3 + [0.0] * 6 + [1.0]
    (row,) = compared(evaluation(task("t", before)), evaluation(task("t", after))).rows
    found = row.paired
    assert (found.lost, found.gained, found.p, found.items, found.scale) == (3, 1, 2 * 5 / 16, 10, "difference")
    assert found.estimate == pytest.approx(-0.2)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    assert (found.low, found.high) == paired.interval([paired.stratum(changes)])
    assert found.detectable is None  # ten documents
    assert row.reading == "no clear change"


def test_documents_are_matched_by_name_not_by_place():
    one = task("t", [1.0, 0.0, 0.0])
    other = dataclasses.replace(
        one, docs=one.docs[::-1], prompts=one.prompts[::-1], columns={"acc": Column("mean", (0.0, 0.0, 1.0))}
    )
    found = compared(evaluation(one), evaluation(other)).rows[0].paired
    assert (found.lost, found.gained) == (0, 0)


def test_a_perplexity_is_compared_as_a_ratio_weighted_by_words():
    weights = (10.0, 30.0, 20.0)
    before, after = [-20.0, -90.0, -30.0], [-22.0, -93.0, -36.0]
    rows = compared(
        evaluation(task("t", before, "word_perplexity", "perplexity", weights)),
        evaluation(task("t", after, "word_perplexity", "perplexity", weights)),
    ).rows
    found = rows[0].paired
    assert found.scale == "ratio"
    assert found.estimate == pytest.approx(math.exp(11 / 60)) == pytest.approx(rows[0].after / rows[0].before)
    assert found.low < found.estimate < found.high
    assert found.low >= math.exp(0.1) - 1e-9
    assert found.high <= math.exp(0.3) + 1e-9
    assert found.p is None
    assert rows[0].reading == "worse"


def test_bits_are_compared_as_a_difference_in_bits():
    weights = (8.0, 8.0)
    rows = compared(
        evaluation(task("t", [-8.0, -4.0], "bits_per_byte", "bits", weights)),
        evaluation(task("t", [-9.0, -8.0], "bits_per_byte", "bits", weights)),
    ).rows
    assert rows[0].paired.estimate == pytest.approx(5 / 16 / math.log(2)) == pytest.approx(rows[0].delta)


def test_without_a_flip_the_interval_is_what_so_many_documents_can_rule_out():
    same = evaluation(task("t", [1.0, 0.0] * 50))
    found = compared(same, same).rows[0].paired
    assert (found.low, found.high, found.p) == (-paired.no_flip_bound([100]), paired.no_flip_bound([100]), 1.0)


def test_scores_that_are_not_right_or_wrong_have_no_p():
    found = compared(evaluation(task("t", [0.2, 0.5])), evaluation(task("t", [0.3, 0.1]))).rows[0].paired
    assert (found.p, found.lost, found.detectable) == (None, None, None)
    assert found.low < found.estimate < found.high


def test_the_total_weighs_tasks_the_same_and_pools_flips():
    a = evaluation(task("t", [1.0] * 10), task("u", [1.0, 0.0] * 20))
    b = evaluation(task("t", [0.0] * 2 + [1.0] * 8), task("u", [0.0, 0.0] + [1.0, 0.0] * 18 + [1.0, 1.0]))
    (total,) = compared(a, b).totals
    assert (total.task, total.samples, total.paired.lost, total.paired.gained) == ("mean of 2 tasks", 50, 3, 1)
    assert total.paired.estimate == pytest.approx(-0.2 / 2)
    assert total.delta == pytest.approx(total.paired.estimate)


def test_a_group_pools_its_tasks_and_counts_once_in_the_total():
    parts = [[task("t", v), task("u", v * 2), task("w", v)] for v in ([1.0, 0.0], [0.0, 0.0])]
    sides = []
    for found in parts:
        group = Items("g", (), (), {}, ("t", "u"))
        whole = evaluation(*found)
        values = [*found[0].columns["acc"].values, *found[1].columns["acc"].values]
        pooled = Metric("g", "acc", sum(values) / len(values), None, len(values), True)
        sides.append(dataclasses.replace(whole, metrics=(*whole.metrics, pooled), items=(*found, group)))
    found = compared(*sides)
    row = next(row for row in found.rows if row.task == "g")
    assert (row.paired.items, row.paired.lost) == (6, 3)
    (total,) = found.totals
    assert (total.task, total.samples) == ("mean of 2 tasks", 8)  # g and w


def test_every_differing_setting_is_named_with_both_values():
    b = with_settings(limit=20, seeds={"torch": 1}, tasks={"t": {"version": 2}, "u": {"version": 4}}, tokenizer=None)
    with pytest.raises(UsageError) as caught:
        compared(with_settings(tokenizer="abc"), b)
    assert caught.value.message == (
        "the two sides were not measured the same way, 4 settings differ: `limit` is 10 in A and 20 in B; "
        "`seeds.torch` is 0 in A and 1 in B; `t.version` is 1 in A and 2 in B; "
        "`tokenizer` is abc in A and not set in B"
    )  # u was not measured: its version does not matter


@pytest.mark.parametrize(
    "name", ["harness", "batch_size", "dtype", "limit", "tokenizer", "template", "max_length", "backend"]
)
def test_one_differing_setting_is_enough(name):
    with pytest.raises(UsageError, match=f"a setting differs: `{name}` is 1 in A and 2 in B"):
        compared(with_settings(**{name: 1}), with_settings(**{name: 2}))


def test_another_environment_and_settings_one_side_does_not_know_are_notes():
    notes = compared(with_settings(tokenizer="x"), with_settings(environment={"device": "cuda"})).notes
    assert notes == (
        "`device` is cpu in A and cuda in B", "could not be checked, as B does not record it: `tokenizer`",
    )  # fmt: skip


def test_other_documents_are_refused():
    with pytest.raises(UsageError, match="`t` was measured on other documents: 1 only in A, 0 only in B"):
        compared(evaluation(task("t", [1.0, 0.0])), evaluation(task("t", [1.0])))


def test_another_prompt_is_refused_with_the_document():
    one = task("t", [1.0, 0.0, 1.0])
    other = dataclasses.replace(one, prompts=("p0", "x", "y"))
    with pytest.raises(UsageError, match="answer of document 1 and of 1 more is not the same"):
        compared(evaluation(one), evaluation(other))


def test_other_weights_are_refused():
    sides = [evaluation(task("t", [-1.0], "ppl", "perplexity", (w,))) for w in (3.0, 4.0)]
    with pytest.raises(UsageError, match="`t` weighs documents differently in `ppl`"):
        compared(*sides)


def test_nothing_shared():
    with pytest.raises(UsageError, match="no task was measured on both sides: `t` in A, `u` in B"):
        compared(evaluation(task("t", [1.0])), evaluation(task("u", [1.0])))


def test_a_task_of_one_side_and_a_metric_without_documents_are_notes():
    extra = Metric("t", "mcc", 0.5, None, 2, True)
    a = evaluation(task("t", [1.0, 0.0]), task("u", [1.0]))
    b = evaluation(task("t", [1.0, 0.0]))
    found = compared(*(dataclasses.replace(e, metrics=(*e.metrics, extra)) for e in (a, b)))
    assert found.notes == ("only A has `u`", "not compared document by document: `t mcc`")
    assert [row.paired is None for row in found.rows] == [False, True]


def test_within_a_run_a_difference_of_settings_is_a_warning():
    pairs, notes = pair(with_settings(batch_size=1), with_settings(batch_size=2))
    assert pairs == {}
    assert notes == [
        "evaluations are not compared document by document: the two sides were not measured the same way, "
        "a setting differs: `batch_size` is 1 in A and 2 in B"
    ]


# -- reading


def stored(folder: Path, found: Evaluation) -> Path:
    save_artifact(folder, "artifact", found)
    return folder


def test_an_evaluation_comes_back_from_its_folder(tmp_path):
    found = evaluation(task("t", [1.0, 0.0]), task("u", [-1.5], "ppl", "perplexity", (2.0,)))
    side = load_side(str(stored(tmp_path / "stages" / "eval-lm-eval" / "abc", found)))
    assert side.evaluations == {"eval/lm-eval": found}


def run_folder(folder: Path, **manifest: Any) -> Path:
    """A finished run: source and result evaluated."""
    stages = []
    for key, source, values in (("aa", "S", [1.0, 1.0]), ("bb", "M", [1.0, 0.0])):
        stage = stored(folder / "stages" / "eval-lm-eval" / key, evaluation(task("t", values)))
        (stage / "manifest.json").write_text(json.dumps({"identity": {"inputs": {"model": source}}}))
        label = "eval/lm-eval (source)" if source == "S" else "eval/lm-eval"
        stages.append({"label": label, "stage": "eval/lm-eval", "key": key})
    (folder / "recipe.yaml").write_text("recipe: 1\n")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source_key": "S", "stages": stages} | manifest))
    return folder


def test_a_run_alone_is_its_source_against_what_it_made(tmp_path):
    found = compare(*load_sides(str(run_folder(tmp_path / "r")), None))
    assert (found.a, found.rows[0].paired.lost) == (f"{tmp_path / 'r'} (source)", 1)


def test_two_runs_are_compared_by_what_they_made(tmp_path):
    names = [str(run_folder(tmp_path / name)) for name in "ab"]
    assert compare(*load_sides(*names)).rows[0].before == 0.5


def broken(folder: Path, how: str) -> Path:
    run = run_folder(folder)
    artifact = run / "stages/eval-lm-eval/bb/artifact.json"
    if how == "unfinished":
        (run / "manifest.json").unlink()
    elif how == "cleaned":
        artifact.unlink()
        (artifact.parent / "manifest.json").unlink()
    elif how == "cut":
        artifact.write_text(artifact.read_text()[:100])
    elif how == "newer evaluation":
        artifact.write_text(
            artifact.read_text().replace('"format": 2', '"format": 9').replace('"format":2', '"format":9')
        )
    elif how == "newer run":
        run_folder(folder, format=7)
    elif how == "no stages":
        (run / "manifest.json").write_text('{"format": 1}')
    return run


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unfinished", r"the run `.*r` did not finish: it has no manifest.json"),
        ("cleaned", r"bb/manifest.json` is missing"),
        ("cut", r"artifact.json` is not JSON"),
        ("newer evaluation", r"this evaluation has format 9, this moecli reads up to 2"),
        ("newer run", r"the run `.*r` has format 7, this moecli reads up to 1"),
        ("no stages", r"manifest.json` is damaged: no 'stages'"),
    ],
)
def test_a_run_that_is_half_there_damaged_or_newer(tmp_path, how, message):
    with pytest.raises(SurroundingsError, match=message):
        load_side(str(broken(tmp_path / "r", how)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no `.*x`"),
        (lambda p: p.mkdir(), "`.*x` holds no evaluation"),
        (lambda p: (p / "parts").mkdir(parents=True), "`.*x` is an evaluation that was not finished"),
        (lambda p: p.write_text("text"), "`.*x` holds no evaluation"),
    ],
)
def test_a_path_without_evaluation(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(MoecliError, match=message):
        load_side(str(tmp_path / "x"))


def test_another_artifact_is_refused(tmp_path):
    (tmp_path / "artifact.json").write_text('{"kind": "ExpertPlan", "tensor_bytes": null, "meta": {}}')
    with pytest.raises(UsageError, match="holds ExpertPlan, not an evaluation"):
        load_side(str(tmp_path))


def test_one_side_that_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="is not a run, so it needs a second side"):
        load_sides(str(stored(tmp_path, evaluation(task("t", [1.0])))), None)
