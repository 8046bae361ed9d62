"""From a recipe to steps: wiring, keys, forecasts. No stage runs, except where what was forecast is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moecli.core.artifacts import CalibrationStats, Checkpoint, Evaluation
from moecli.core.context import Context
from moecli.core.errors import RecipeError
from moecli.core.stage import Options, Stage, stage
from moecli.runner import lookup
from moecli.runner.estimate import estimate
from moecli.runner.execute import run
from moecli.runner.open import load_recipe, open_model, open_recipe, sketch_of
from moecli.runner.plan import SOURCE, Plan, make_plan
from tests.runner.small_runs import ROOT, furnish, write_rows

Planned = Callable[..., Plan]

CALIBRATE = "calibrate/statistics: {dataset: data/text.jsonl, samples: 6, tokens_per_sample: 32}"
PERPLEXITY = "eval/perplexity: {dataset: data/test.jsonl, window: 32}"
CLUSTER = "cluster/hc-smoe: {keep: 4}"
MERGE = "merge/weighted"
ROW_DROP = "router/row-drop"
RTN = "quantize/rtn: {group_size: 16}"


@pytest.fixture
def planned(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """`planned("prune/reap: {keep: 4}", ...)`; "&a stage" gives an id, "stage | {model: a}" says what to use."""
    furnish(tmp_path, tiny_model("qwen3_moe"))
    monkeypatch.chdir(tmp_path)

    def plan(*stages: str, seed: int = 0) -> Plan:
        write_recipe(*stages, seed=seed)
        origin, source = open_model("toy")
        return make_plan(load_recipe("r.yaml"), sketch_of(source), origin.digest)

    return plan


def write_recipe(*stages: str, seed: int = 0) -> None:
    lines = ["recipe: 1", "model: toy", f"seed: {seed}", "stages:"]
    for text in stages:
        text, _, use = text.partition(" | ")
        label, text = text[1:].split(" ", 1) if text.startswith("&") else ("", text)
        name, _, values = text.partition(": ")
        lines.append(f"  - run: {name}")
        lines += [f"    id: {label}"] if label else []
        lines += [f"    with: {values}"] if values else []
        lines += [f"    use: {use}"] if use else []
    Path("r.yaml").write_text("\n".join(lines) + "\n")


def wiring(plan: Plan) -> list[tuple[str, dict[str, str]]]:
    return [(step.label, {name: plan.label_of(i) for name, i in step.inputs.items()}) for step in plan.steps]


def refusals(planned: Planned, *stages: str) -> list[tuple[str, str | None]]:
    with pytest.raises(RecipeError) as caught:
        planned(*stages)
    return [(d.message, d.hint) for d in caught.value.diagnostics]


# -- wiring


def test_the_newest_artifact_of_the_type_is_taken(planned: Planned) -> None:
    plan = planned(f"&first {CALIBRATE}", f"&second {CALIBRATE}", "prune/reap: {keep: 4}", RTN)
    assert wiring(plan)[2:] == [
        ("prune/reap", {"stats": "second", "model": "source"}),
        ("quantize/rtn", {"model": "prune/reap"}),
    ]


def test_use_takes_another(planned: Planned) -> None:
    plan = planned(
        f"&first {CALIBRATE}", f"&second {CALIBRATE}", "&half prune/reap: {keep: 4} | {stats: first}",
        "&most prune/reap: {keep: 6} | {model: source}", f"{RTN} | {{model: half}}",
    )  # fmt: skip
    assert wiring(plan)[2:] == [
        ("half", {"stats": "first", "model": "source"}),
        ("most", {"stats": "second", "model": "source"}),
        ("quantize/rtn", {"model": "half"}),
    ]
    assert plan.steps[plan.final].sketch.facts.experts == 4


def test_an_evaluation_brings_its_baseline_once(planned: Planned) -> None:
    plan = planned(CALIBRATE, "prune/reap: {keep: 4}", PERPLEXITY, RTN, PERPLEXITY)
    assert wiring(plan)[2:] == [
        ("eval/perplexity (source)", {"model": "source"}),
        ("eval/perplexity", {"model": "prune/reap"}),
        ("quantize/rtn", {"model": "prune/reap"}),
        ("eval/perplexity", {"model": "quantize/rtn"}),
    ]
    assert [step.baseline for step in plan.steps] == [False, False, True, False, False, False]


def test_other_settings_need_another_baseline(planned: Planned) -> None:
    other = PERPLEXITY.replace("32", "16")
    plan = planned(CALIBRATE, "prune/reap: {keep: 4}", PERPLEXITY, other)
    assert [step.label for step in plan.steps if step.baseline] == ["eval/perplexity (source)"] * 2


def test_an_evaluation_of_the_source_is_the_baseline(planned: Planned) -> None:
    plan = planned(PERPLEXITY, CALIBRATE, "prune/reap: {keep: 4}", PERPLEXITY)
    assert [(step.label, step.baseline) for step in plan.steps if step.stage.kind == "eval"] == [
        ("eval/perplexity", False), ("eval/perplexity", False),
    ]  # fmt: skip
    assert plan.steps[0].inputs == {"model": SOURCE}


def test_nothing_above_that_fits(planned: Planned) -> None:
    assert refusals(planned, "prune/reap: {keep: 4}") == [
        ("`prune/reap` needs CalibrationStats", "add a `calibrate/...` stage above line 5")
    ]
    assert refusals(planned, CALIBRATE, MERGE) == [
        ("`merge/weighted` needs ExpertPlan", "add a `cluster/...` stage above line 7")
    ]


def test_use_of_what_does_not_fit(planned: Planned) -> None:
    assert refusals(
        planned, f"&text {CALIBRATE}", "prune/reap: {keep: 4} | {model: text, weights: text, stats: txt}"
    ) == [
        ("`text` makes CalibrationStats, but `model` must be Checkpoint", None),
        ("`prune/reap` has no input `weights`", "it takes `stats`, `model`"),
        ("no earlier stage has the id `txt`", "known here: `text`, `source`"),
    ]


class Nothing(Options):
    """No options."""


@stage("eval/coverage", version=1)
def coverage(opt: Nothing, model: Checkpoint, stats: CalibrationStats | None, ctx: Context) -> Evaluation:
    return Evaluation((), {"stats": None if stats is None else len(stats)})


@pytest.fixture
def with_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    find, names = lookup.find, lookup.names()
    monkeypatch.setattr(lookup, "names", lambda: (*names, "eval/coverage"))
    monkeypatch.setattr(lookup, "source_path", lambda name: Path(__file__))

    def found(name: str) -> Stage:
        return coverage if name == "eval/coverage" else find(name)

    monkeypatch.setattr(lookup, "find", found)


@pytest.mark.usefixtures("with_coverage")
def test_an_optional_input(planned: Planned, tmp_path: Path) -> None:
    """Left out where nothing makes it, and then the function gets None."""
    assert wiring(planned("eval/coverage")) == [("eval/coverage", {"model": "source"})]
    found = run(open_recipe("r.yaml"), tmp_path / "without").report
    assert found.stages[0].name == "eval/coverage"
    (artifact,) = (tmp_path / "without").glob("stages/eval-coverage/*/artifact.json")
    assert json.loads(artifact.read_text())["meta"]["settings"] == {"stats": None}
    plan = planned(CALIBRATE, "eval/coverage")
    assert wiring(plan)[1:] == [("eval/coverage", {"model": "source", "stats": "calibrate/statistics"})]


# -- what fits the model, from facts


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((CALIBRATE, "prune/reap: {keep: 6}", "prune/reap: {keep: 4}"),
         [("`stats` comes from a model with 8 experts, the model here has 6",
           "add a `calibrate/statistics` stage above line 9")]),
        ((CALIBRATE, CLUSTER, MERGE, ROW_DROP, "prune/frequency: {keep: 2}"),
         [("`stats` comes from a model with 8 experts, the model here has 4",
           "add a `calibrate/statistics` stage above line 11")]),
        ((CALIBRATE, CLUSTER, "prune/reap: {keep: 4}", MERGE),
         [("`plan` comes from a model with 8 experts, the model here has 4", "add a `cluster/...` stage above line 11"),
          ("`stats` comes from a model with 8 experts, the model here has 4",
           "add a `calibrate/statistics` stage above line 11")]),
    ],
)  # fmt: skip
def test_results_of_another_size_are_refused(
    stages: tuple[str, ...], said: list[tuple[str, str]], planned: Planned
) -> None:
    assert refusals(planned, *stages) == said
    planned(*stages[:-1])


def test_a_new_calibration_makes_them_fit(planned: Planned) -> None:
    plan = planned(CALIBRATE, "prune/reap: {keep: 6}", CALIBRATE, "prune/reap: {keep: 4}")
    assert [step.sketch.facts.experts for step in plan.steps] == [8, 6, 6, 4]
    assert plan.steps[0].key != plan.steps[2].key


def test_all_problems_and_no_consequences(planned: Planned) -> None:
    """A plan that cannot be made says nothing of the stages that carry it out; a wrong group size is its own fault."""
    assert [m for m, _ in refusals(planned, CALIBRATE, "cluster/hc-smoe: {keep: 100}", MERGE, ROW_DROP,
                                   "quantize/rtn: {group_size: 100}")] == [
        "`keep` must be at most the model's 8 experts, got 100",
        "`group_size` 100 does not divide the model width 64 and the expert width 32",
    ]  # fmt: skip


# -- keys


def keys(plan: Plan) -> list[str]:
    return [step.key for step in plan.steps]


def test_run_settings_are_not_in_the_key(planned: Planned) -> None:
    slow, fast = (planned(CALIBRATE.replace("}", f", batch_size: {n}}}"), "prune/reap: {keep: 4}") for n in (1, 4))
    assert keys(slow) == keys(fast)


def test_each_key_has_what_it_depends_on(planned: Planned) -> None:
    plain = keys(planned(CALIBRATE, "prune/reap: {keep: 4}", RTN))
    other = keys(planned(CALIBRATE, "prune/reap: {keep: 4}", RTN.replace("16", "32")))
    assert [a == b for a, b in zip(plain, other, strict=True)] == [True, True, False]
    other = keys(planned(CALIBRATE.replace("samples: 6", "samples: 5"), "prune/reap: {keep: 4}", RTN))
    assert set(plain).isdisjoint(other), "everything stands on the calibration"
    assert set(plain).isdisjoint(keys(planned(CALIBRATE, "prune/reap: {keep: 4}", RTN, seed=1)))


def test_a_default_that_is_written_out_is_the_same(planned: Planned) -> None:
    assert keys(planned("quantize/rtn: {group_size: 16}")) == keys(planned("quantize/rtn: {bits: 4, group_size: 16}"))


def test_ids_and_names_are_not_in_the_key(planned: Planned) -> None:
    assert keys(planned(CALIBRATE, "prune/reap: {keep: 4}")) == keys(
        planned(f"&text {CALIBRATE}", "&half prune/reap: {keep: 4} | {stats: text, model: source}")
    )


def test_data_enters_by_content(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = keys(planned(PERPLEXITY))
    Path("data/copy.jsonl").write_bytes(Path("data/test.jsonl").read_bytes())
    os.utime("data/copy.jsonl", (1, 1))
    assert keys(planned(PERPLEXITY.replace("test", "copy"))) == plain
    monkeypatch.setenv("HOME", str(Path("data").resolve()))
    assert keys(planned(PERPLEXITY.replace("data/test", "~/copy"))) == plain
    write_rows(Path("data/copy.jsonl"), [{"text": "other"}])
    assert keys(planned(PERPLEXITY.replace("test", "copy"))) != plain


def test_the_model_enters_by_content(planned: Planned) -> None:
    plain = keys(planned(PERPLEXITY))
    Path("toy/config.json").write_text(
        json.dumps(json.loads(Path("toy/config.json").read_text()) | {"eos_token_id": 1})
    )
    assert keys(planned(PERPLEXITY)) != plain


def test_what_later_stages_need_is_in_the_key(planned: Planned) -> None:
    """`statistics: auto` is written out before the key is made."""
    for_reap = planned(CALIBRATE, "prune/reap: {keep: 4}")
    for_count = planned(CALIBRATE, "prune/frequency: {keep: 4}")
    assert "gean_sum" in for_reap.options[0].statistics and "gean_sum" not in for_count.options[0].statistics
    assert for_reap.steps[0].key != for_count.steps[0].key


def test_keys_are_the_same_in_every_process(planned: Planned) -> None:
    here = keys(planned(CALIBRATE, CLUSTER, MERGE, ROW_DROP, RTN, PERPLEXITY))
    code = "from moecli.cli.show import planned\nprint(' '.join(step.key for step in planned('r.yaml', ()).steps))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == here


def test_the_resolved_recipe_has_the_same_keys(planned: Planned) -> None:
    plan = planned(f"&text {CALIBRATE}", "prune/reap: {keep: 4} | {stats: text}", PERPLEXITY)
    Path("again.yaml").write_text(plan.resolved_recipe())
    again = open_recipe("again.yaml").plan
    assert keys(again) == keys(plan)
    assert again.name == "r" and again.resolved_recipe() == plan.resolved_recipe()


# -- forecasts


@pytest.mark.parametrize(
    "stages",
    [
        (CALIBRATE, CLUSTER, MERGE, ROW_DROP, RTN),
        (CALIBRATE, CLUSTER, MERGE, "quantize/rtn: {group_size: 32, bits: 8}"),
        (CALIBRATE, "prune/frequency: {keep: 6}", CALIBRATE, "prune/reap: {keep: 5}", RTN),
    ],
)
def test_the_forecast_is_what_is_written(
    stages: tuple[str, ...], planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, dtypes, shapes and bytes, known before a weight was read."""
    from moecli.runner import verify

    monkeypatch.setattr(verify, "verify", lambda *args, **options: verify.Verification(()))
    plan = planned(*stages)
    expected = plan.steps[plan.final].sketch
    run(open_recipe("r.yaml"), tmp_path / "out")
    _, written = open_model(str(tmp_path / "out" / "model"))
    guard = (written.config.get("quantization_config") or {}).get("guard")
    specs = {name: written.spec(name) for name in written.names() if name != guard}
    assert specs == dict(expected.specs)
    assert sum(spec.bytes for spec in specs.values()) == expected.bytes == estimate(plan).output_bytes


def test_what_a_model_takes_once_loaded(planned: Planned) -> None:
    """Packed weights are unpacked by transformers; zeros in the old shapes take what they took."""
    plain = planned("slim/random: {ratio: 0.25, align: 8}")
    packed = planned("slim/random: {ratio: 0.25, align: 8}", "quantize/rtn: {bits: 4, group_size: 8}")
    assert estimate(packed).loaded_bytes == estimate(plain).loaded_bytes == estimate(plain).output_bytes
    assert estimate(packed).output_bytes < estimate(packed).loaded_bytes  # type: ignore[operator]
    widths = {
        name: estimate(planned(f"slim/random: {{ratio: 0.5, align: 8, widths: {name}, scope: {scope}}}")).loaded_bytes
        for name, scope in (("uniform", "expert"), ("per_layer", "global"), ("ragged", "global"), ("pad", "global"))
    }
    assert widths["uniform"] == widths["per_layer"] == widths["ragged"] < widths["pad"]  # type: ignore[operator]
    assert widths["pad"] == plain.source.bytes
    assert estimate(planned(PERPLEXITY)).loaded_bytes is None


@pytest.mark.parametrize("stage", ["quantize/gptq: {group_size: 8}", "slim/random: {ratio: 0.5, align: 8}"])
def test_experts_of_different_widths_are_for_few_stages(stage: str, planned: Planned) -> None:
    """Those that say so; evaluations and calibrations take any model."""
    slim = "slim/random: {ratio: 0.5, align: 8, widths: ragged, scope: global}"
    fine = planned(slim, CALIBRATE, "quantize/rtn: {bits: 4, group_size: 8}", PERPLEXITY)
    assert fine.export == "compact"
    with pytest.raises(RecipeError) as caught:
        planned(slim, CALIBRATE, stage)
    (problem,) = caught.value.diagnostics
    assert problem.message == f"`{stage.partition(':')[0]}` takes experts of one width, here they differ"
    assert problem.hint == "write `widths: uniform` in the `slim/...` stage above"
    assert problem.place is not None
