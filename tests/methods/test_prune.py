"""Pruning keeps the experts with the best scores, bit for bit, with their router rows."""

import pytest
import torch

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import StageFailed
from moecli.families import family_of
from moecli.methods.prune.frequency import Frequency, frequency
from moecli.methods.prune.reap import Reap, reap


def stats_of(model, count, gean):
    layers = model.facts.moe_layers
    values = torch.tensor(count), torch.tensor(gean, dtype=torch.float64)
    return CalibrationStats({i: LayerStats(40, values[0], values[0].double(), {"gean_sum": values[1]}) for i in layers})


COUNT = [10, 0, 5, 1, 20, 2, 4, 8]
GEAN = [10.0, 0.0, 20.0, 3.0, 10.0, 1.0, 16.0, 4.0]


def test_reap_ranks_by_the_mean_over_routed_tokens(checkpoint, context):
    model, ctx = checkpoint(), context()
    reap(Reap(keep=4), stats_of(model, COUNT, GEAN), model, ctx)
    mean = {e: g / c if c else 0 for e, (g, c) in enumerate(zip(GEAN, COUNT, strict=True))}
    expected = sorted(sorted(mean, key=mean.get, reverse=True)[:4])
    assert expected == [0, 2, 3, 6]
    assert ctx.records["kept"] == {str(layer): expected for layer in model.facts.moe_layers}


def test_an_expert_no_token_reached_goes_first(checkpoint, context):
    model, ctx = checkpoint(), context()
    reap(Reap(keep=7), stats_of(model, COUNT, GEAN), model, ctx)
    assert all(1 not in kept for kept in ctx.records["kept"].values())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "lfm2_moe"])
def test_kept_experts_and_rows_are_those_of_the_source(model_type, checkpoint, context):
    model, ctx = checkpoint(model_type), context()
    frequency(Frequency(keep=4), stats_of(model, COUNT, GEAN), model, ctx)
    pruned = ctx.finish(model)
    before, after = family_of(model.config), family_of(pruned.config)
    kept = [0, 2, 4, 7]
    assert pruned.facts.experts == pruned.facts.router_rows == 4
    for layer in model.facts.moe_layers:
        for new, old in enumerate(kept):
            mine, theirs = after.read_expert(pruned, layer, new), before.read_expert(model, layer, old)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        for name, axis in before.router_tensors(model, layer).items():
            assert torch.equal(pruned.get(name), model.get(name).index_select(axis, torch.tensor(kept)))


def test_groups_keep_their_own_best(checkpoint, context):
    model, ctx = checkpoint("deepseek_v3"), context()
    assert model.facts.groups == 2
    frequency(Frequency(keep=4), stats_of(model, [9, 8, 7, 6, 1, 2, 3, 4], GEAN), model, ctx)
    assert next(iter(ctx.records["kept"].values())) == [0, 1, 6, 7]


def test_scores_that_are_not_numbers_stop_the_stage(checkpoint, context):
    model = checkpoint()
    broken = stats_of(model, COUNT, [*GEAN[:7], float("nan")])
    with pytest.raises(StageFailed, match="score of expert 7 is NaN"):
        reap(Reap(keep=4), broken, model, context())


def test_merged_experts_cannot_be_pruned(checkpoint):
    from dataclasses import replace

    facts = replace(checkpoint().facts, experts=6)
    (problem,) = Reap(keep=4).problems(facts)
    assert "8 router rows share 6 merged experts" in problem.message
    assert "router/row-drop" in problem.hint
