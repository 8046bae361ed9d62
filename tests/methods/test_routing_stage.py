"""eval/routing: the analysis in a few numbers, caches compared at equal bytes."""

from __future__ import annotations

import json

import pytest

from moecli.engine.analysis import Settings, analyse, expert_bytes
from moecli.engine.data import tokenise
from moecli.methods.eval.routing import Routing, routing
from tests.runner.chains import pruned, quantized


@pytest.fixture
def options(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": " ".join(f"w{i * j % 37}" for j in range(40))}) + "\n" for i in range(40))
    )
    return Routing(dataset=str(path), samples=6, tokens_per_sample=24, windows=(4, 16), cache_samples=6)


def values(evaluation):
    return {m.metric: m.value for m in evaluation.metrics}


def test_numbers_are_those_of_the_analysis(checkpoint, context, options):
    source = checkpoint()
    ctx = context()
    found = values(routing(options, source, source, ctx))
    text = tokenise(options.dataset, source, samples=6, tokens_per_sample=24)
    whole = analyse(source, {"t": text}, Settings(windows=(4, 16), cache_samples=6)).document
    layers = list(whole["layers"].values())
    assert found["load entropy"] == pytest.approx(sum(layer["entropy"] for layer in layers) / len(layers))
    assert found["SRP 16"] == whole["locality"]["srp"]["model"]["16"]["srp"]
    twice = 2 * source.facts.top_k
    assert found["hit rate LRU"] == whole["locality"]["cache"]["model"]["lru"]["rate"][twice - 1]
    assert found["hit rate SCH 4"] == whole["locality"]["cache"]["model"]["4"]["rate"][twice - 1]
    [chart] = ctx.records["charts"]
    assert [line["name"] for line in chart["series"]] == ["result, LRU", "result, SCH 16"]
    assert len(chart["series"][0]["x"]) == len(chart["series"][0]["y"]) == source.facts.experts
    assert ctx.records["cache"]["curves"]["4"] == whole["locality"]["cache"]["model"]["4"]["rate"]


def test_caches_are_compared_at_equal_bytes(checkpoint, context, options, tmp_path):
    source = checkpoint()
    small = quantized(source, tmp_path / "q", bits=8)
    one, packed = (next(iter(expert_bytes(m).values())) for m in (source, small))
    ctx = context()
    found = routing(options, source, small, ctx)
    budget = 2 * source.facts.top_k * one
    assert found.settings["cache_bytes_per_layer"] == budget
    held = min(int(budget / packed), source.facts.experts)
    assert held > 2 * source.facts.top_k
    assert values(found)["hit rate LRU"] == ctx.records["cache"]["curves"]["lru"][held - 1]


def test_a_pruned_model_uses_what_is_left(checkpoint, context, options, tmp_path):
    source = checkpoint()
    found = routing(options, source, pruned(source, tmp_path / "p", [0, 2, 3, 5]), context())
    assert values(found)["hit rate LRU"] == 1  # the cache holds all four
    assert values(found)["load imbalance"] <= 4
    assert all(m.samples in (6, 144) for m in found.metrics)


def test_samples_longer_than_the_positions_are_refused(checkpoint):
    facts = checkpoint().facts
    [problem] = Routing(dataset="x", tokens_per_sample=facts.max_positions + 1).problems(facts)
    assert problem.hint == f"write `tokens_per_sample: {facts.max_positions}`"
