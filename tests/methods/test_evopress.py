"""The search for bits: it gets better on a fixed text, starts where it is told, and goes on where it was stopped."""

from __future__ import annotations

import pytest
import torch

from moecli.core.artifacts import BitPlan
from moecli.core.errors import MoecliError, RecipeError
from moecli.engine.data import batches_of
from moecli.engine.mixes import divergences
from moecli.methods.allocate import evopress as module
from moecli.methods.allocate import to_nearest
from moecli.methods.allocate.evopress import EvoPress, evopress
from moecli.runner.open import open_recipe
from tests.methods.test_gptq import text_for

ALL = 10**6
"""Tokens: more than there are."""


def searched(model, ctx, plan=None, text=None, **options):
    given = {"average": 3, "generations": 3, "offspring": 6, "steps": [[2, 24], [1, ALL]], "group_size": 16}
    return evopress(EvoPress(**(given | options)), text or text_for(model), model, plan, ctx)


def uniform(model, bits):
    size = (model.facts.experts, 2)
    return BitPlan({layer: torch.full(size, bits) for layer in model.facts.moe_layers})


def distance(model, plan, shrink=False):
    mix = {layer: bits_E2[:, 0].tolist() for layer, bits_E2 in plan.items()}
    return divergences(model, batches_of(text_for(model), 8), [mix], rounding=to_nearest(16, shrink))[0]


def mean(plan):
    return torch.cat([bits_E2.flatten() for bits_E2 in plan.values()]).double().mean().item()


@pytest.mark.parametrize("shrink", [False, True])
def test_the_plan_is_nearer_to_the_source_than_the_same_bits_for_all(shrink, checkpoint, context):
    model, ctx = checkpoint(), context()
    plan = searched(model, ctx, shrink=shrink)
    assert mean(plan) == 3.0
    assert distance(model, plan, shrink) < distance(model, uniform(model, 3), shrink)
    best, parent = ctx.records["charts"][1]["series"]
    assert all(new <= old for new, old in zip(best["y"], parent["y"], strict=True))
    assert best["y"][-1] == pytest.approx(distance(model, plan, shrink), rel=1e-4)
    assert "3 generations changed the bits of" in ctx.notes[0]


def test_an_average_between_two_levels_starts_from_random_plans(checkpoint, context):
    model = checkpoint()
    plan = searched(model, context(), average=2.4)
    experts = sum(len(bits_E2) for bits_E2 in plan.values())
    assert mean(plan) == int(2.4 * experts) / experts
    assert {2, 3} <= {int(bits) for bits_E2 in plan.values() for bits in bits_E2.flatten()}


def test_it_starts_from_the_plan_above(checkpoint, context, monkeypatch):
    model = checkpoint()
    start = uniform(model, 3)
    first = model.facts.moe_layers[0]
    start[first][0], start[first][1] = 2, 4
    asked = []
    monkeypatch.setattr(
        module, "divergences", lambda model, some, mixes, **_: asked.append(mixes) or [0.0] * len(mixes)
    )
    plan = searched(model, context(), plan=start, generations=1)
    assert asked[-1][0] == {layer: bits_E2[:, 0].tolist() for layer, bits_E2 in start.items()}
    assert plan.pairs() == start.pairs()  # nothing was nearer, so the parent stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bits: bits.fill_(4), "not one that these options allow"),
        (lambda bits: bits.copy_(torch.tensor([3, 2])), "other bits for down projections"),
        (lambda bits: bits.fill_(8), "not one that these options allow"),
    ],
)
def test_a_plan_that_the_options_forbid_is_no_start(change, message, checkpoint, context):
    model = checkpoint()
    plan = uniform(model, 3)
    for bits_E2 in plan.values():
        change(bits_E2)
    with pytest.raises(MoecliError, match=message):
        searched(model, context(), plan=plan)


def test_a_plan_for_other_experts_is_no_start(checkpoint, context):
    model = checkpoint()
    plan = BitPlan({layer: bits_E2[:-1] for layer, bits_E2 in uniform(model, 3).items()})
    with pytest.raises(MoecliError, match="other layers or experts"):
        searched(model, context(), plan=plan)


def test_a_longer_search_goes_on_where_a_shorter_one_ended(checkpoint, context, monkeypatch):
    model, ctx = checkpoint(), context()
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return divergences(*args, **kwargs)

    monkeypatch.setattr(module, "divergences", counted)
    searched(model, ctx, generations=2)
    assert len(calls) == 4  # two steps each
    longer = searched(model, ctx, generations=3)
    assert len(calls) == 6
    assert longer.pairs() == searched(model, context(), generations=3).pairs()


def test_experts_that_share_a_tensor_move_together(checkpoint, context):
    model = checkpoint("gpt_oss")
    for bits_E2 in searched(model, context(), group_size=8, average=2.5, generations=1).values():
        assert (bits_E2 == bits_E2[0]).all()


def test_options_that_leave_nothing_to_search(tiny_model, tmp_path):
    def problems(**options):
        lines = ", ".join(f"{k}: {v}" for k, v in options.items())
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"recipe: 1\nmodel: {tiny_model('qwen3_moe')}\nstages:\n"
            "  - {run: calibrate/text, with: {dataset: demo, samples: 2, tokens_per_sample: 16}}\n"
            f"  - {{run: allocate/evopress, with: {{{lines}}}}}\n  - run: quantize/rtn\n    with: {{group_size: 16}}\n"
        )
        with pytest.raises(RecipeError) as caught:
            open_recipe(path)
        return [diagnostic.message for diagnostic in caught.value.diagnostics]

    assert "the last step must leave one survivor, got 4" in problems(average=3, steps="[[4, 128]]")[0]
    assert "leaves nothing to search" in problems(average=3, servable="hf")[0]
