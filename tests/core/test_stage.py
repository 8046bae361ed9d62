"""A stage is checked when it is registered, not when it runs."""

import pytest
import torch

from moecli.core.artifacts import (
    CalibrationStats,
    CalibrationText,
    Checkpoint,
    Evaluation,
    ExpertPlan,
    LayerPlan,
    LayerStats,
    Metric,
    Packed,
)
from moecli.core.context import Context
from moecli.core.errors import MoecliError
from moecli.core.stage import Options, stage


class Nothing(Options):
    """No options."""


def test_inputs_and_output_come_from_the_annotations():
    @stage("cluster/example", version=3, needs=("y_mean",))
    def example(opt: Nothing, stats: CalibrationStats, model: Checkpoint | None, ctx: Context) -> ExpertPlan:
        return ExpertPlan({})

    assert {name: (i.type, i.optional) for name, i in example.inputs.items()} == {
        "stats": (CalibrationStats, False),
        "model": (Checkpoint, True),
    }
    assert example.output is ExpertPlan
    assert example.needs(Nothing()) == ("y_mean",)


def no_context(opt: Nothing, model: Checkpoint) -> Checkpoint: ...


def no_options(opt: int, ctx: Context) -> Checkpoint: ...


def no_artifact(opt: Nothing, ctx: Context) -> int: ...


def loose_input(opt: Nothing, model: int, ctx: Context) -> Checkpoint: ...


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("shrink/example", no_options, "the kind must be one of calibrate"),
        ("prune/example", no_context, "expected .opt, <artifacts>, ctx: Context."),
        ("prune/example", no_options, "`opt` must be annotated with an Options class"),
        ("prune/example", no_artifact, "annotated to return an Artifact"),
        ("prune/example", loose_input, "`model` must be annotated with an Artifact class"),
    ],
)
def test_a_signature_the_runner_cannot_serve_is_refused(name, function, message):
    with pytest.raises(TypeError, match=message):
        stage(name, version=1)(function)


def round_trip(artifact):
    packed = artifact.pack()
    return type(artifact).unpack(Packed(dict(packed.tensors), packed.meta))


def test_artifacts_survive_packing():
    stats = LayerStats(7, torch.tensor([3, 4]), torch.tensor([1.5, 2.5]), {"y_mean": torch.ones(2, 3)})
    back = round_trip(CalibrationStats({5: stats}, {"dataset": "demo"}))
    assert (list(back), back[5].tokens, back.source) == ([5], 7, {"dataset": "demo"})
    assert torch.equal(back[5]["y_mean"], torch.ones(2, 3))

    plan = LayerPlan(
        torch.tensor([0, 0, 1]),
        torch.tensor([0.25, 0.75, 1]),
        torch.tensor([1, 2]),
        {"linkage": torch.eye(2)},
    )
    again = round_trip(ExpertPlan({3: plan}))[3]
    assert again.group_E.tolist() == [0, 0, 1]
    assert torch.equal(again.extra["linkage"], torch.eye(2))

    evaluation = Evaluation((Metric("t", "acc", 0.5, None, 10, True),), {"limit": 3}, {"results.json": "{}"})
    assert round_trip(evaluation) == evaluation


def test_statistics_carry_their_text_and_stand_in_for_it():
    text = CalibrationText(torch.tensor([[1, 2]]), torch.tensor([[1, 0]]), "sha")
    stats = LayerStats(1, torch.tensor([1]), torch.tensor([1.0]))
    packed = CalibrationStats({0: stats}, {}, text).pack()
    back = CalibrationStats.unpack(packed)
    assert issubclass(CalibrationStats, CalibrationText)
    for found in (back, back.text, CalibrationText.unpack(packed)):
        assert (found.ids.tolist(), found.mask.tolist(), found.digest) == ([[1, 2]], [[1, 0]], "sha")
    with pytest.raises(MoecliError, match="stored without their text"):
        CalibrationText.unpack(CalibrationStats({0: stats}).pack())


def test_a_statistic_that_was_not_collected_says_how_to_get_it():
    with pytest.raises(MoecliError, match="statistic `gean_sum` was not collected") as caught:
        LayerStats(1, torch.ones(1), torch.ones(1))["gean_sum"]
    assert "add `gean_sum` to `statistics`" in caught.value.hint
