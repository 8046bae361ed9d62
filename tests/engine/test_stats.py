"""Putting statistics together: halves make the whole, topping up leaves well-fed experts alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, LayerStats
from moecli.core.errors import UsageError
from moecli.engine.collectors import CATALOGUE, collectors
from moecli.engine.data import Batch
from moecli.engine.stats import (
    collector_of,
    compared,
    is_per_expert,
    merged,
    names_in,
    starved_in,
    topped_up,
)
from moecli.engine.sweep import sweep
from tests.engine.memory import open_folder
from tests.engine.texts import random_batches

NAMES = ["ean_sum", "gean_sq", "absmax", "easy", "prob_sum", "y_mean", "logit_gram"]
E, D = 6, 3


def layer_stats(seed: int, tokens: int = 40, most: int = 30) -> LayerStats:
    """Made-up statistics of one layer."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    extra = {
        "ean_sum": rand(E), "absmax": rand(E).float(), "prob_sum": rand(E), "y_mean": rand(E, D),
        "logit_gram": rand(E, E),
    }  # fmt: skip
    return LayerStats(tokens, torch.randint(0, most, (E,), generator=rng), rand(E), extra)


def toy(seed: int, **source: object) -> CalibrationStats:
    about = {"model": "m" * 64, "model_type": "toy", "dtype": "bfloat16", "digest": f"text {seed}", "samples": 4}
    return CalibrationStats({layer: layer_stats(10 * seed + layer) for layer in (1, 3)}, about | source)


def test_merging_halves_gives_the_whole(tiny_model: Callable[..., Path]) -> None:
    model = open_folder(tiny_model("qwen3_moe"))

    def observed(batches: list[Batch], text: str) -> CalibrationStats:
        found = {layer.index: layer.observe(collectors(NAMES)) for layer in sweep(model, batches)}
        return CalibrationStats(found, {"digest": text})

    batches = random_batches((3, 2, 4))
    whole = observed(batches, "all")
    both = merged(observed(batches[:1], "first"), observed(batches[1:], "second"))
    assert list(both) == list(whole)
    for layer, expected in whole.items():
        assert both[layer].tokens == expected.tokens
        assert set(names_in(both[layer])) == {"count", "gate_sum", *NAMES}
        for name in names_in(expected):
            exact = name in ("count", "absmax")
            torch.testing.assert_close(
                both[layer][name], expected[name], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-9
            )


@given(st.integers(0, 999), st.integers(1000, 1999))
def test_merging_adds_sums_and_takes_maxima(one: int, two: int) -> None:
    a, b = toy(one), toy(two)
    both, other = merged(a, b), merged(b, a)
    for layer in (1, 3):
        assert both[layer].tokens == a[layer].tokens + b[layer].tokens
        for name in names_in(a[layer]):
            x, y = a[layer][name], b[layer][name]
            expected = torch.maximum(x, y) if name == "absmax" else x + y
            assert torch.equal(both[layer][name], expected)
            assert both[layer][name].dtype == x.dtype
            assert torch.equal(other[layer][name], expected), "the order does not matter"
    assert both.source["digest"] == other.source["digest"] not in (a.source["digest"], b.source["digest"])
    assert (both.source["samples"], both.source["model"]) == (8, a.source["model"])


def test_merging_goes_on() -> None:
    three = merged(merged(toy(1), toy(2)), toy(3))
    assert [part["digest"] for part in three.source["merged"]] == ["text 1", "text 2", "text 3"]
    assert three.source["samples"] == 12
    with pytest.raises(UsageError, match=r"both hold the same text \(digest text 2\)"):
        merged(three, toy(2))


def with_easy(seed: int) -> CalibrationStats:
    """As `toy`, with scores whose size differs from domain to domain."""
    stats, scale = toy(seed), 10.0 ** (seed % 7)
    for layer, found in stats.items():
        rng = torch.Generator().manual_seed(100 * seed + layer)
        found.extra["easy"] = scale * torch.rand(E, generator=rng, dtype=torch.float64)  # type: ignore[index]
    return stats


@given(st.permutations([1, 2, 3]))
def test_domains_count_alike(order: list[int]) -> None:
    """The mean over domains of I / sum I (EASY-EP), up to a factor, in whatever order they are put together."""
    a, b, c = (with_easy(seed) for seed in order)
    mixed = merged(merged(a, b, domains=True), c, domains=True)
    assert mixed.source["domains"] == 3
    for layer in (1, 3):
        scores = [[float(x) for x in with_easy(seed)[layer]["easy"]] for seed in (1, 2, 3)]
        expected = [sum(s[e] / sum(s) for s in scores) for e in range(E)]
        assert mixed[layer]["easy"].tolist() == pytest.approx(expected, rel=1e-12)
        assert torch.equal(mixed[layer].count_E, sum(d[layer].count_E for d in (a, b, c)))
    summed = merged(merged(a, b), c)
    assert "domains" not in summed.source
    assert summed[1]["easy"].tolist() == pytest.approx(sum(d[1]["easy"] for d in (a, b, c)).tolist())
    assert float(a[1]["easy"].sum()) != pytest.approx(1), "the parts stay as they are"


def test_a_domain_without_scores_or_without_the_flag_is_refused() -> None:
    with pytest.raises(UsageError, match="these statistics hold no `easy`") as caught:
        merged(toy(1), toy(2), domains=True)
    assert caught.value.hint == "calibrate with `statistics: [easy, absmax]`"
    both = merged(with_easy(1), with_easy(2), domains=True)
    with pytest.raises(UsageError, match="`easy` of one of them is put together of domains") as caught:
        merged(with_easy(3), both)
    assert caught.value.hint == "add `--domains`"


def test_what_keeps_statistics_apart() -> None:
    first, second = toy(1), toy(2, model="n" * 64, dtype="float32", model_type="qwen3_moe")
    wide = layer_stats(7)
    odd = LayerStats(
        wide.tokens, torch.zeros(8, dtype=torch.int64), wide.gate_sum_E.float(), {"ean_sum": wide["ean_sum"]}
    )
    second = CalibrationStats({1: odd, 4: second[3]}, second.source)
    with pytest.raises(UsageError) as caught:
        merged(first, second)
    assert caught.value.message == (
        "these statistics cannot be merged: families differ (toy and qwen3_moe); "
        "dtypes of the model differ (bfloat16 and float32); models differ (mmmmmmmmmmmm... and nnnnnnnnnnnn...); "
        "layers differ (1 3 and 1 4); layer 1: only one of them has `absmax`, `logit_gram`, `prob_sum`, `y_mean`; "
        "layer 1: `count` is int64 [6] in one, int64 [8] in the other; "
        "layer 1: `gate_sum` is float64 [6] in one, float32 [6] in the other"
    )


def test_a_statistic_of_another_version_is_not_merged() -> None:
    layers = LayerStats(1, torch.ones(2, dtype=torch.int64), torch.ones(2), {"from_the_future": torch.ones(2)})
    with pytest.raises(UsageError, match="`from_the_future` is nothing that this version knows how to merge"):
        merged(CalibrationStats({0: layers}), CalibrationStats({0: layers}))


@given(st.integers(0, 999), st.integers(1000, 1999), st.integers(1, 40))
def test_topping_up_feeds_starved_experts_only(one: int, two: int, least: int) -> None:
    before, more = toy(one), toy(two)
    starved = starved_in(before, least)
    after = topped_up(before, more, starved)
    for layer, old in before.items():
        hungry = starved.get(layer, [])
        fed = [e for e in range(E) if e not in hungry]
        assert hungry == [e for e in range(E) if old.count_E[e] < least]
        new = after[layer]
        assert bool((new.count_E >= old.count_E).all())
        assert new.tokens == old.tokens
        for name in ("prob_sum", "y_mean", "logit_gram"):
            assert torch.equal(new[name], old[name])
        for name in ("count", "gate_sum", "ean_sum", "absmax"):
            assert torch.equal(new[name][fed], old[name][fed])
            x, y = old[name][hungry], more[layer][name][hungry]
            assert torch.equal(new[name][hungry], torch.maximum(x, y) if name == "absmax" else x + y)
    assert all(torch.equal(before[i].count_E, toy(one)[i].count_E) for i in before), "the input stays as it was"


def test_which_statistics_are_per_expert() -> None:
    told = {name: is_per_expert(name) for name in ("count", "gate_sum", *NAMES, "ean_sq", "gean_sum")}
    assert {name for name, answer in told.items() if answer is False} == {"prob_sum", "y_mean", "logit_gram"}
    assert set(told.values()) == {True, False}
    assert is_per_expert("from_the_future") is None


def test_tensors_find_their_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    assert collector_of("ean_sum") is CATALOGUE["ean_sum"]
    assert collector_of("y_mean_of_something") is CATALOGUE["y_mean"]
    assert collector_of("y_meaning") is None
    monkeypatch.setattr(CATALOGUE["y_mean"], "routed", True, raising=False)
    assert is_per_expert("y_mean") is True, "a collector that says it is believed"


def test_comparing() -> None:
    first, same = toy(1), toy(1)
    assert all((c.relative, c.equal, c.expert) == (0, True, None) for c in compared(first, same))
    assert len(compared(first, same)) == 2 * len(names_in(first[1]))
    other = LayerStats(
        80, first[1].count_E * 2, first[1].gate_sum_E * 2, {**first[1].extra, "ean_sum": first[1]["ean_sum"].clone()}
    )
    other.extra["ean_sum"][4] += 100
    found = {c.name: c for c in compared(first, CalibrationStats({1: other, 3: first[3]})) if c.layer == 1}
    assert (found["count"].relative, found["count"].equal) == (0, False), "per token they agree"
    assert (found["absmax"].relative, found["absmax"].equal) == (0, True), "a maximum is not divided"
    assert found["ean_sum"].expert == 4
    a, b = first[1]["ean_sum"] / 40, other["ean_sum"] / 80
    assert found["ean_sum"].relative == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())))
    with pytest.raises(UsageError, match=r"cannot be compared: layers differ \(1 3 and 1\)"):
        compared(first, CalibrationStats({1: other}))
