"""Bits for experts: plans against trying everything, what readers demand, and a recipe from text to a report."""

import itertools
import json
from collections import Counter

import pytest
import torch

from moecli.core.artifacts import CalibrationStats
from moecli.core.errors import MoecliError, RecipeError, StageFailed
from moecli.engine.backward import backward_sweep
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of
from moecli.engine.rounding import RoundingErrors, SlopedRoundingErrors, compensated, rounded_experts
from moecli.engine.sweep import sweep
from moecli.families import adapter, family_of
from moecli.methods.allocate import gemq as gemq_module
from moecli.methods.allocate import pmq as pmq_module
from moecli.methods.allocate import to_nearest
from moecli.methods.allocate.gemq import Gemq, gemq
from moecli.methods.allocate.pmq import Pmq, pmq
from moecli.methods.allocate.quantmoe_bench import QuantMoeBench, quantmoe_bench
from moecli.methods.quantize.gptq import Gptq, gptq
from moecli.ops.precision import outlier_score
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe, sketch_of
from tests.methods.test_gptq import text_for


def stats_of(model, text):
    layers = {}
    for layer in sweep(model, batches_of(text, 2)):
        if layer.is_moe:
            layers[layer.index] = layer.observe(collectors(["prob_routed"]))
    return CalibrationStats(layers, {}, text)


def by_pmq(model, ctx, text=None, **options):
    text = text or text_for(model)
    opt = Pmq(**({"average": 2.5, "group_size": 16, "batch_size": 2} | options))
    return pmq(opt, stats_of(model, text), text, model, ctx)


def by_gemq(model, ctx, text=None, **options):
    opt = Gemq(**({"average": 2.5, "group_size": 16, "batch_size": 2} | options))
    return gemq(opt, text or text_for(model), model, ctx)


def norms(model, text, levels, shrink=False):
    """{layer: [E, levels]}: sum over batches of two of the error's norm"""
    batches, found = batches_of(text, 2), {}
    for batch in batches:
        for layer in sweep(model, [batch]):
            ends = torch.tensor([batch.input_ids.numel()])
            collector = RoundingErrors(layer.parts.experts, levels, to_nearest(16, shrink), ends)
            norm = layer.observe([collector])["rounding_errors"][0].sqrt()
            found[layer.index] = found.get(layer.index, 0) + norm
    return found


@pytest.mark.parametrize(
    ("levels", "average", "exponents", "shrink"),
    [
        ((2, 3, 4), 2.5, (1, 1.5, 1), False), ((2, 3, 4), 3.2, (1, 1.5, 1), False),
        ((2, 3, 4), 2.75, (0, 2, 0.5), False), ((2, 3, 4), 2.75, (0, 2, 0.5), True),
        ((1, 2, 3), 1.5, (1, 1.5, 1), False), ((1, 2, 3), 2.0, (1, 1.5, 1), True),
    ],
)  # fmt: skip
def test_pmq_is_the_best_of_all_plans_by_its_formula(levels, average, exponents, shrink, checkpoint, context):
    model = checkpoint()
    text = text_for(model)
    exponent = dict(zip(("alpha", "beta", "gamma"), exponents, strict=True))
    alpha, beta, gamma = exponents
    plan = by_pmq(model, context(), text, average=average, bits=levels, shrink=shrink, **exponent)
    stats, eps = stats_of(model, text), norms(model, text, levels, shrink)
    for layer in model.facts.moe_layers:
        phi = stats[layer].count_E / stats[layer].count_E.sum()
        weight = stats[layer]["prob_routed"] / stats[layer]["prob_routed"].sum()
        cost = (1000 * phi**alpha * weight**beta)[:, None] * eps[layer] ** gamma
        best = min(
            (sum(cost[e, b].item() for e, b in enumerate(choice)), choice)
            for choice in itertools.product(range(3), repeat=8)
            if sum(levels[b] for b in choice) <= average * 8 and {1, 2} <= set(choice)
        )
        assert [[levels[b]] * 2 for b in best[1]] == plan[layer].tolist()


def test_batches_count_in_pmq_and_not_in_gemq(checkpoint, context):
    """Norms are added, squares would not notice."""
    model, ctx = checkpoint(), context()
    text = text_for(model)
    for batch_size in (2, 6):
        by_pmq(model, ctx, text, batch_size=batch_size)
        by_gemq(model, ctx, text, batch_size=batch_size)
    assert len(list(ctx.parts.path.glob("errors-*.json"))) == 3


def test_gemq_is_the_best_of_all_plans_over_both_layers(checkpoint, context):
    model, ctx = checkpoint(), context()
    text = text_for(model)
    plan = by_gemq(model, ctx, text, average=2.75, bits=[2, 4])
    cost = {}
    for layer in backward_sweep(model, batches_of(text, 3)).back():
        collector = SlopedRoundingErrors(layer.parts.experts, (2, 4), to_nearest(16), torch.tensor([text.ids.numel()]))
        cost[layer.index] = layer.observe([collector])["rounding_errors"][0]
    both = torch.cat([cost[0], cost[1]])
    choices = torch.tensor(list(itertools.product((0, 1), repeat=16)))
    errors = both[torch.arange(16), choices].sum(-1)
    errors[(2 + 2 * choices).sum(-1) > 2.75 * 16] = torch.inf
    best = 2 + 2 * choices[errors.argmin()]
    assert torch.cat([plan[0][:, 0], plan[1][:, 0]]).tolist() == best.tolist()
    assert sum(Counter(best.tolist()).values()) == 16 and len(set(best[:8].tolist()) | set(best[8:].tolist())) == 2


@pytest.mark.parametrize("solver", ["dp", "milp"])
def test_exact_solvers_agree_and_greedy_says_how_far_it_may_be(solver, checkpoint, context):
    model, ctx = checkpoint(), context()
    text = text_for(model)
    exact = by_gemq(model, ctx, text, solver=solver, average=2.6)
    assert exact.pairs() == by_gemq(model, ctx, text, average=2.6).pairs()
    assert ctx.notes[-2].endswith(", the least possible")
    near = by_gemq(model, ctx, text, solver="greedy", average=2.6)
    assert sum(int(bits.sum()) for bits in near.values()) <= 2.6 * 32
    assert "above the least possible" in ctx.notes[-2] or near.pairs() == exact.pairs()


def test_another_average_measures_nothing_again(checkpoint, context, monkeypatch):
    model, ctx = checkpoint(), context()
    text = text_for(model)
    by_gemq(model, ctx, text)
    by_pmq(model, ctx, text)

    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(gemq_module, "backward_sweep", never)
    monkeypatch.setattr(pmq_module, "sweep", never)
    assert sum(int(b.sum()) for b in by_gemq(model, ctx, text, average=3.5).values()) == 3.5 * 32
    by_pmq(model, ctx, text, average=3.5)
    for change in ({"group_size": 8}, {"bits": [2, 4]}, {"grid": "asymmetric"}, {"shrink": True}, {"rounding": "gptq"}):
        with pytest.raises(AssertionError, match="measured again"):
            by_gemq(model, ctx, text, **change)


@pytest.mark.parametrize("method", [by_gemq, by_pmq])
def test_errors_of_gptq_are_smaller_and_make_another_cost(method, checkpoint, context):
    model, costs = checkpoint(), []
    for how in ("nearest", "gptq"):
        ctx = context(how)
        method(model, ctx, average=2.5, rounding=how)
        (note,) = [note for note in ctx.notes if note.startswith("cost ")]
        costs.append(float(note.split()[1].rstrip(",")))
    assert 0 < costs[1] < 0.9 * costs[0]


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_compensated_experts_are_those_that_gptq_writes(family, shrink, checkpoint, context):
    """Of the first layer, before which nothing is quantized, forwards and backwards."""
    source, ctx = checkpoint(family), context("gptq")
    text, first = text_for(source), source.facts.moe_layers[0]
    gptq(Gptq(bits=3, group_size=16, attention_bits=16, shrink=shrink), text, source, None, ctx)
    model = adapter.load_model(ctx.finish(source))
    wanted = adapter.moe_parts(adapter.decoder_layers(model)[1][first]).experts
    for layers in (sweep(source, batches_of(text, 2)), backward_sweep(source, batches_of(text, 2)).back()):
        for layer in layers:
            if layer.index == first:
                found = rounded_experts(layer.parts.experts, 3, compensated(layer, 16, shrink))
                for name in ("gate_up_proj", "down_proj"):
                    torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)
                    assert not torch.equal(getattr(found, name), getattr(layer.parts.experts, name))


def test_an_expert_without_tokens_gets_the_fewest_bits(checkpoint, context):
    model, ctx = checkpoint(), context()
    text = text_for(model, samples=1, tokens=2)
    stats = stats_of(model, text)
    plan = by_pmq(model, ctx, text, average=2.4)
    unused = 0
    for layer in model.facts.moe_layers:
        none = stats[layer].count_E == 0
        unused += int(none.sum())
        # one at 3 bits may have to be among them, for there must be one
        assert int((plan[layer][none, 0] > 2).sum()) <= max(0, 2 - int((~none).sum()))
    assert unused and f"{unused} experts saw no token: they cost nothing and get the fewest bits" in ctx.notes


def test_an_error_that_is_not_a_number_is_said_with_its_place(checkpoint, context, monkeypatch):
    model = checkpoint()
    broken = {layer: torch.zeros(8, 3, dtype=torch.float64) for layer in (0, 1)}
    broken[1][5, 2] = torch.nan
    monkeypatch.setattr(gemq_module, "_costs", lambda *args: broken)
    with pytest.raises(StageFailed, match="the error of rounding is not a number") as caught:
        by_gemq(model, context())
    assert caught.value.where == "layer 1, expert 5"


def test_readers_constrain_the_plan(checkpoint, context):
    model, ctx = checkpoint(), context()
    text = text_for(model)
    of_layers = by_gemq(model, ctx, text, average=6, bits=[2, 4, 8], servable="vllm").pairs()
    assert sorted(sorted(set(pairs)) for pairs in of_layers.values()) == [[(4, 4)], [(8, 8)]]
    whole = by_gemq(model, ctx, text, average=3.9, servable="hf").pairs()
    assert {pair for pairs in whole.values() for pair in pairs} == {(3, 3)}
    whole = by_gemq(model, ctx, text, average=2.9, bits=[1, 2, 3], servable="hf").pairs()
    assert {pair for pairs in whole.values() for pair in pairs} == {(2, 2)}


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_experts_in_one_tensor_share_their_bits(family, checkpoint, context):
    model, ctx = checkpoint(family), context()
    plan = by_gemq(model, ctx, average=3.0, bits=[2, 4])
    assert sorted(bits.unique().tolist() for bits in plan.values()) == [[2], [4]]
    assert "a layer's experts lie in one tensor: each layer has one number of bits" in ctx.notes
    with pytest.raises(MoecliError, match="share their bits, so `at_least` cannot be kept") as caught:
        by_pmq(model, context("pmq"))
    assert caught.value.hint == "write `at_least: none`"


BAD = [
    ("pmq", {"average": 1.9}, "average", "`average` must be at least 2.375 with `at_least`, got 1.9"),
    ("pmq", {"average": 2.3}, "average", "`average` must be at least 2.375 with `at_least`, got 2.3"),
    ("gemq", {"average": 1.9}, "average", "`average` must be at least 2.0, got 1.9"),
    ("gemq", {"average": 4.5}, "average", "`average` must be at most the largest number of bits allowed, 4, got 4.5"),
    ("gemq", {"average": 3, "servable": "vllm", "bits": [2, 4, 8]}, "average",
     "`average` must be at least 4.0, got 3.0"),
    ("gemq", {"average": 2.5, "servable": "vllm", "bits": [2, 3]}, "bits",
     "vLLM takes experts of 4 or 8 bits, `bits` has none of them"),
    ("gemq", {"average": 1, "servable": "hf", "bits": [1]}, "bits",
     "transformers takes experts of 2, 3, 4 or 8 bits, `bits` has none of them"),
    ("gemq", {"average": 1.9, "servable": "hf", "bits": [1, 2]}, "average", "`average` must be at least 2.0, got 1.9"),
    ("pmq", {"average": 1.3, "bits": [1, 2, 3]}, "average",
     "`average` must be at least 1.375 with `at_least`, got 1.3"),
    ("pmq", {"average": 4, "servable": "vllm", "bits": [4, 8]}, "at_least",
     "experts that share their bits cannot have one at each of the upper two"),
    ("pmq", {"average": 3, "servable": "hf", "at_least": "none"}, "scope",
     "one number of bits for the whole model cannot be chosen layer by layer"),
    ("gemq", {"average": 3, "grid": "asymmetric", "shrink": True}, "shrink",
     "the grid of published code is here for rounding to the nearest alone"),
    ("pmq", {"average": 3, "grid": "asymmetric", "rounding": "gptq"}, "rounding",
     "the grid of published code is here for rounding to the nearest alone"),
    ("gemq", {"average": 3, "group_size": 128}, "group_size",
     "`group_size` 128 does not divide the model width 64 and the expert width 32"),
    ("pmq", {"average": 3, "solver": "greedy"}, "solver", "`greedy` knows no `at_least`"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "option", "message"), BAD)
def test_what_cannot_work_is_said_before_anything_runs(name, options, option, message, checkpoint):
    kind = {"pmq": Pmq, "gemq": Gemq}[name]
    opt = kind.model_validate({"group_size": 16} | options | {"average": float(options["average"])})
    (problem,) = opt.problems(checkpoint().facts)
    assert (problem.option, problem.message) == (option, message)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
@pytest.mark.parametrize(
    "options",
    [
        {"average": 2.0}, {"average": 2.6}, {"average": 3.3}, {"average": 4.0}, {"average": 2.6, "scope": "layer"},
        {"average": 3.3, "servable": "hf"}, {"average": 6.5, "servable": "vllm", "bits": [4, 8]},
    ],
)  # fmt: skip
def test_a_forecast_is_as_large_as_the_plan(family, options, checkpoint, context):
    model = checkpoint(family)
    opt = Gemq(group_size=16, **options)
    forecast = opt.forecast(sketch_of(model)).planned_bits
    plan = by_gemq(model, context(), **options).pairs()
    assert forecast.keys() == plan.keys() and {len(p) for p in forecast.values()} == {8}
    assert sum(sum(map(sum, pairs)) for pairs in forecast.values()) == sum(sum(map(sum, p)) for p in plan.values())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    words = ["a", "be", "cat", "dog", "eel", "fox", "gnu", "hen"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [" ".join(words[(i * j) % 8] for j in range(1, 60)) for i in range(1, 30)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def recipe_of(tmp_path, model, text_file, allocate, more=(), **top):
    stages = [
        {"run": "calibrate/statistics", "with": {"dataset": text_file, "samples": 6, "tokens_per_sample": 32}},
        allocate,
        *more,
        {"run": "quantize/gptq", "with": {"group_size": 16, "attention_bits": 8}},
        {"run": "eval/perplexity", "with": {"dataset": text_file, "window": 32}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"recipe": 1, "model": str(model), "seed": 0, "stages": stages, **top}))
    return path


@pytest.mark.parametrize(
    ("family", "allocate"),
    [
        ("qwen3_moe", {"run": "allocate/pmq", "with": {"average": 2.5, "group_size": 16}}),
        ("qwen3_moe", {"run": "allocate/pmq", "with": {"average": 2.0, "bits": [1, 2, 3], "group_size": 16}}),
        ("mixtral", {"run": "allocate/gemq", "with": {"average": 1.5, "bits": [1, 2, 3], "group_size": 16}}),
        ("gpt_oss", {"run": "allocate/gemq", "with": {"average": 2.0, "bits": [1, 3], "group_size": 16}}),
        ("mixtral", {"run": "allocate/gemq", "with": {"average": 2.75, "group_size": 16}}),
        ("gpt_oss", {"run": "allocate/gemq", "with": {"average": 3.0, "bits": [2, 4], "group_size": 16}}),
        ("deepseek_v3", {"run": "allocate/pmq", "with": {"average": 3.5, "bits": [2, 3, 4, 8], "group_size": 16}}),
    ],
)
def test_a_recipe_from_text_to_a_verified_mix(family, allocate, tiny_model, text_file, tmp_path):
    opened = open_recipe(recipe_of(tmp_path, tiny_model(family), text_file, allocate))
    assert opened.plan.export == "compact"
    result = run_plan(opened, tmp_path / "run")
    report = result.report
    assert report.verification.status == "passed" and report.export == "compact"
    assert report.size.after.bytes == opened.plan.sketch_of(opened.plan.final).bytes
    (plan_notes,) = [stage.notes for stage in report.stages if stage.name == allocate["run"]]
    (notes,) = [stage.notes for stage in report.stages if stage.name == "quantize/gptq"]
    assert any("bits of" in note and "on average" in note for note in plan_notes)
    assert any("as stored with their scales" in note for note in notes)
    assert [chart.title for chart in report.figures_data.charts] == ["Bits of experts"]


@pytest.mark.parametrize("name", ["allocate/pmq", "allocate/gemq"])
def test_merged_experts_get_bits_and_load(name, tiny_model, text_file, tmp_path):
    """Router rows that share experts: four of them are stored, and four get bits."""
    calibrate = {"run": "calibrate/statistics", "with": {"dataset": text_file, "samples": 4, "tokens_per_sample": 32}}
    stages = [
        calibrate, {"run": "cluster/hc-smoe", "with": {"keep": 4}}, {"run": "merge/weighted"}, calibrate,
        {"run": name, "with": {"average": 2.75, "group_size": 16}},
        {"run": "quantize/rtn", "with": {"group_size": 16}},
    ]  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"recipe": 1, "model": str(tiny_model("qwen3_moe")), "seed": 0, "stages": stages}))
    result = run_plan(open_recipe(path), tmp_path / "run")
    assert result.report.verification.status == "passed" and result.report.export == "compact"
    (notes,) = [stage.notes for stage in result.report.stages if stage.name == name]
    assert any(note.startswith("bits of 8 routed experts") for note in notes)


def problems_in(path):
    with pytest.raises(RecipeError) as caught:
        open_recipe(path)
    return [(d.message, d.hint) for d in caught.value.diagnostics]


def test_a_plan_of_another_model_is_refused_before_anything_runs(tiny_model, text_file, tmp_path):
    prune = [{"run": "prune/frequency", "with": {"keep": 4}}]
    allocate = {"run": "allocate/gemq", "with": {"average": 2.5, "group_size": 16}}
    ((message, hint),) = problems_in(recipe_of(tmp_path, tiny_model("qwen3_moe"), text_file, allocate, prune))
    assert message == "`plan` comes from a model with 8 experts, the model here has 4"
    assert hint.startswith("add a `allocate/...` stage above line")


def test_a_mix_has_no_stock_form_and_the_recipe_hears_it(tiny_model, text_file, tmp_path):
    allocate = {"run": "allocate/gemq", "with": {"average": 2.5, "group_size": 16}}
    ((message, _),) = problems_in(recipe_of(tmp_path, tiny_model("qwen3_moe"), text_file, allocate, export="stock"))
    assert "there is no stock form of this model" in message and "one packing for all experts" in message


@pytest.mark.parametrize(("name", "average", "levels"), [("pmq", 2.0, [1, 2, 3]), ("gemq", 3.0, [2, 3, 4])])
def test_a_mean_that_is_one_of_the_numbers_is_planned_as_a_mix(name, average, levels, tiny_model, text_file, tmp_path):
    allocate = {"run": f"allocate/{name}", "with": {"average": average, "bits": levels, "group_size": 16}}
    ((message, _),) = problems_in(recipe_of(tmp_path, tiny_model("qwen3_moe"), text_file, allocate, export="stock"))
    assert f"packed to {levels[0]} and {levels[1]} and {levels[2]} bits" in message


def test_a_tie_that_no_average_can_keep_is_refused(tiny_model, text_file, tmp_path):
    allocate = {"run": "allocate/gemq", "with": {"average": 3.0, "bits": [4, 8], "servable": "vllm", "group_size": 16}}
    ((message, _),) = problems_in(recipe_of(tmp_path, tiny_model("qwen3_moe"), text_file, allocate))
    assert message == "`average` must be at least 4.0, got 3.0"


def bench(model, ctx, **options):
    opt = QuantMoeBench(**({"average": 2.5, "bits": [2, 4]} | options))
    layers = {}
    for layer in sweep(model, batches_of(text_for(model), 2)):
        if layer.is_moe:
            layers[layer.index] = layer.observe(collectors(quantmoe_bench.needs(opt)))
    stats = CalibrationStats(layers, {}, text_for(model))
    return quantmoe_bench(opt, stats, model, ctx), stats


def plain_score(weight):
    """One matrix, channel by channel."""
    return max(
        max(abs(w) for w in column) / (sum(abs(w) for w in column) / len(column)) for column in weight.T.tolist()
    )


def test_outliers_get_the_most_bits(checkpoint, context):
    model = checkpoint()
    allocated, _ = bench(model, context(), average=2.7)
    family, scored = family_of(model.config), []
    for layer, pairs in allocated.pairs().items():
        for expert, (inward, outward) in enumerate(pairs):
            gate, up, down = family.read_expert(model, layer, expert)[:3]
            scored += [(max(plain_score(gate), plain_score(up)), inward, 2), (plain_score(down), outward, 1)]
    assert 2.7 * 48 - 2 < sum(bits * size for _, bits, size in scored) <= 2.7 * 48
    left, plain = 2.7 * 48 - 2 * 48, 0.0
    for score, _, size in sorted(scored, reverse=True):
        if 2 * size <= left:
            left, plain = left - 2 * size, plain + 2 * size * score
    found = sum((bits - 2) * size * score for score, bits, size in scored)
    assert plain <= found * (1 + 1e-9) and found < 1.05 * plain, "the highest scores, but for what is left over"
    assert {pair for pairs in allocated.pairs().values() for pair in pairs} >= {(2, 2), (2, 4), (4, 2)}


def test_frequent_experts_and_layers_that_turn_their_input_get_more(checkpoint, context):
    model = checkpoint()
    plan, stats = bench(model, context("f"), by="frequency", average=3.0)
    counts = torch.cat([stats[layer].count_E for layer in (0, 1)])
    bits = torch.cat([plan[layer][:, 0] for layer in (0, 1)])
    assert int(counts[bits == 4].min()) >= int(counts[bits == 2].max()) and int((bits == 4).sum()) == 8
    plan, stats = bench(model, context("b"), by="block", average=3.0)
    cosine = [float(stats[layer]["block_cos"]) / stats[layer].tokens for layer in (0, 1)]
    assert all(-1 <= c <= 1 for c in cosine) and cosine[0] != cosine[1]
    more = cosine.index(min(cosine))
    assert plan[more].unique().tolist() == [4] and plan[1 - more].unique().tolist() == [2]


@pytest.mark.parametrize(("servable", "average"), [("vllm", 6.0), ("hf", 8.0), ("research", 6.0)])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_scores_keep_what_readers_demand(family, servable, average, checkpoint, context):
    plan, _ = bench(checkpoint(family), context(), bits=[4, 8], average=average, servable=servable)
    rows = [bits.unique(dim=0) for bits in plan.values()]
    assert all(len(row) == 1 for row in rows) or (family, servable) == ("qwen3_moe", "research")
    if servable != "research":
        assert all(int(row[0, 0]) == int(row[0, 1]) for row in rows)
    if servable == "hf":
        assert {tuple(row[0].tolist()) for row in rows} == {(8, 8)}


def test_a_score_by_hand():
    weight = torch.tensor([[1.0, 0.0, -3.0], [1.0, 0.0, 1.0]])
    assert float(outlier_score(weight)) == 1.5
    assert outlier_score(torch.stack([weight, 0 * weight])).tolist() == [1.5, 0.0]
