"""model/README.md: metadata the hub accepts, and nothing that differs between two runs of one recipe."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from moecli.runner.card import metadata, render_card, without_folders
from moecli.runner.report import Calibration, Check, Report, StageRecord, Verification
from tests.runner.reports import bare, small


def stages(*names: str) -> tuple[StageRecord, ...]:
    return tuple(StageRecord(name=name, id=name, key="k", cached=False, seconds=1.0) for name in names)


def calibrated_on(dataset: Any) -> Report:
    return small().model_copy(update={"calibration": Calibration(source={"dataset": dataset}, tokens=10)})


def test_the_hub_reads_the_metadata() -> None:
    card = ModelCard(render_card(small(), "org/Base-MoE", language=("en", "de"), license="apache-2.0"))
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("org/Base-MoE", "merge")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["en", "de"])
    assert (data.license, data.model_name) == ("apache-2.0", "half")
    assert data.tags[:3] == ["moe", "mixture-of-experts", "moecli"]
    assert data.eval_results == [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="arc",
            dataset_name="arc",
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
            metric_args=args,
        )
        for metric, value, args in (
            ("acc", 0.5, {"stderr": 0.04, "before": 0.75, "samples": 200}),
            ("acc_norm", 0.71, {"stderr": 0.03, "before": 0.7, "samples": 200}),
        )
    ]


def test_the_hub_writes_the_same_results_back() -> None:
    card = ModelCard(render_card(small(), "org/Base-MoE"))
    assert yaml.safe_load(card.data.to_yaml())["model-index"] == metadata(small(), "org/Base-MoE")["model-index"]


def test_nothing_of_one_run_or_machine() -> None:
    first = small()
    stage = first.stages[0].model_copy(update={"seconds": 9.9, "cached": False, "notes": ("took 3 s in /tmp/x",)})
    elsewhere = first.environment.model_copy(update={"device": "cuda (H100)", "python": "3.13.0"})
    again = first.model_copy(
        update={
            "created": None,
            "environment": elsewhere,
            "stages": (stage, *first.stages[1:]),
            "warnings": ("disk /mnt/a is nearly full",),
        }
    )
    assert render_card(again, "org/Base-MoE") == render_card(first, "org/Base-MoE")
    assert not re.search(r"/home|2026|cpu|\d s\b|\d min\b", render_card(first, "org/Base-MoE"))


def test_a_local_source_is_not_named_as_a_hub_model() -> None:
    text = render_card(bare())
    data = ModelCard(text).data
    assert (data.base_model, data.get("base_model_relation"), data.eval_results) == (None, None, None)
    assert "# tiny, bare" in text and "/data" not in text
    for absent in ("No evaluation in this run", "Sizes were not recorded", "No calibration data was used"):
        assert absent in text


@pytest.mark.parametrize(
    ("names", "relation", "tags"),
    [
        (("prune/reap",), "finetune", {"expert-pruning", "reap"}),
        (("merge/weighted",), "merge", {"expert-merging", "weighted"}),
        (("merge/weighted", "quantize/rtn"), "quantized", {"expert-merging", "quantized", "rtn"}),
        (("eval/lm-eval", "calibrate/statistics"), "finetune", set()),
    ],
)
def test_relation_and_tags_come_from_the_stages(names: tuple[str, ...], relation: str, tags: set[str]) -> None:
    data = metadata(small().model_copy(update={"stages": stages(*names)}), "org/Base-MoE")
    assert data["base_model_relation"] == relation
    assert set(data["tags"]) - {"moe", "mixture-of-experts", "moecli", "compression"} >= tags
    assert not {"lm-eval", "statistics"} & set(data["tags"])


@pytest.mark.parametrize(
    ("dataset", "hub", "words"),
    [
        ("Salesforce/wikitext[wikitext-2-raw-v1](train)", ["Salesforce/wikitext"], "`Salesforce/wikitext[wikitext-2"),
        ("allenai/c4.en", ["allenai/c4.en"], "`allenai/c4.en`"),
        ("/home/someone/c4/train.jsonl", None, "`train.jsonl`"),
        ("../texts/train.jsonl", None, "`../texts/train.jsonl`"),
        ("demo", None, "`demo`"),
        ([{"dataset": "a/b", "weight": 2}, "c/d", "a/b"], ["a/b", "c/d"], "`a/b`, `c/d`"),
        (None, None, "unnamed data"),
    ],
)
def test_calibration_data(dataset: Any, hub: list[str] | None, words: str) -> None:
    report = calibrated_on(dataset)
    assert metadata(report).get("datasets") == hub
    assert f"Calibrated on 10 tokens of {words}" in render_card(report)


@pytest.mark.parametrize(
    ("export", "line"),
    [("stock", "Plain transformers"), ("expanded", "Plain transformers"), ("compact", "trust_remote_code=True")],
)
def test_how_to_load(export: str, line: str) -> None:
    text = render_card(small().model_copy(update={"export": export}))
    assert line in text
    assert ("import moecli" in text) == (export == "compact")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("model: /data/models/tiny", "model: tiny"),
        ("model: ~/models/tiny", "model: tiny"),
        ('{a: "/x/y z/t.txt", b: /u/v, c: Org/name}', '{a: "t.txt", b: v, c: Org/name}'),
        ("file:///x/y.txt", "y.txt"),
        ("https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("../up/file ./here/file org/name", "../up/file ./here/file org/name"),
        ("tokens / second", "tokens / second"),
    ],
)
def test_absolute_paths_are_cut(text: str, left: str) -> None:
    assert without_folders(text) == left


def test_values_without_a_finite_number_stay_out_of_the_index() -> None:
    index = metadata(small())["model-index"][0]["results"]
    assert [entry["dataset"]["name"] for entry in index] == ["arc"]
    only_infinite = small().model_copy(update={"metrics": small().metrics[2:]})
    assert "model-index" not in metadata(only_infinite)


def test_a_model_with_corrections_says_what_its_figures_are_of() -> None:
    report = small()
    checks = (*(report.verification.checks if report.verification else ()), Check(name="adapter", passed=True))
    corrected = report.model_copy(update={"verification": Verification(status="passed", checks=checks)})
    assert "PeftModel" not in render_card(report)
    card = render_card(corrected)
    assert "packed model without its corrections, which the figures above are of" in card
    assert 'PeftModel.from_pretrained(model, FOLDER + "/adapter")' in card
