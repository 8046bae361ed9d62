"""SRP and SCH against their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest

from moecli.ops.locality import (
    cache_hits,
    independent_srp,
    mean_interval,
    pooled,
    segment_routing,
    srp_interval,
    window_histogram,
)


def trace(tokens, experts, slots, seed=0, samples=3, holes=False):
    rng = np.random.default_rng(seed)
    skew = np.arange(experts) ** 1.5
    drift_T1 = np.sin(np.arange(tokens)[:, None] / 9 + np.arange(experts))
    score = rng.gumbel(size=(samples, tokens, experts)) * 3 + skew / 4 + 3 * drift_T1
    found = np.argsort(-score, -1)[..., :slots]
    if holes:
        found[rng.random(found.shape) < 0.2] = -1
    return found.astype(np.int16)


def cached_by_hand(tokens, capacity, look_ahead):
    """Hits of one cache on one sample, as the definition says it."""
    uses = [[e for e in token if e >= 0] for token in tokens.tolist()]
    cache, last, hits, clock = set(), {}, 0, 0
    for i, token in enumerate(uses):
        hits += sum(e in cache for e in token)
        ahead = {}
        for later in uses[i : i + look_ahead]:
            for e in later:
                ahead[e] = ahead.get(e, 0) + 1
        for e in token:
            if look_ahead:
                ahead[e] -= 1
            last[e] = clock = clock + 1
            cache.add(e)
            if len(cache) > capacity:
                cache.remove(min(cache - {e}, key=lambda x: (ahead.get(x, 0), last[x])) if capacity else e)
    return hits


@pytest.mark.parametrize("look_ahead", [0, 1, 4, 16, 100])
@pytest.mark.parametrize("holes", [False, True])
def test_every_capacity_at_once_is_each_capacity_by_itself(look_ahead, holes):
    runs = trace(60, 8, 2, samples=4, holes=holes)
    found = cache_hits(runs, 8, look_ahead)
    for n, run in enumerate(runs):
        assert found.hit_NE[n].tolist() == [cached_by_hand(run, c, look_ahead) for c in range(1, 9)]
        used = run[run >= 0]
        assert found.distinct_N[n] == len(set(used.tolist()))
        warm = [(found.hit_NE[n, c - 1] + min(c, len(set(used.tolist())))) / len(used) for c in range(1, 9)]
        assert found.rate_NE[n].tolist() == warm


def test_a_cache_of_all_experts_always_hits_and_more_never_hurts():
    found = cache_hits(trace(50, 12, 3, seed=1), 12, 16)
    assert (found.rate_NE[:, -1] == 1).all()
    assert (np.diff(found.rate_NE, axis=1) >= 0).all()


def test_layers_in_one_cache_are_told_apart():
    layers = np.stack([trace(20, 5, 2, seed=s, samples=2) for s in (1, 2)])
    one = pooled(layers, 5)
    assert one.shape == (2, 20, 4)
    assert one[1, 7].tolist() == [*layers[0, 1, 7].tolist(), *(layers[1, 1, 7] + 5).tolist()]
    assert (pooled(np.full((2, 1, 1, 1), -1), 5) == -1).all()
    hits = cache_hits(one, 10, 4)
    assert [int(h) for h in hits.hit_NE[0]] == [cached_by_hand(one[0], c, 4) for c in range(1, 11)]


def srp_by_hand(windows, experts, window):
    """max over t of F1, over all windows and experts: uses of those that are on against room and uses."""
    counts = [sum(e in token for token in w) for w in windows for e in range(experts)]
    total, best = sum(counts), (-1.0, 0)
    for t in range(window + 1):
        served, room = sum(c for c in counts if c >= t), window * sum(c >= t for c in counts)
        best = max(best, (2 * served / max(room + total, 1), -t))
    return best[0], -best[1]


@pytest.mark.parametrize("window", [1, 4, 7])
def test_srp_is_its_definition(window):
    runs = trace(30, 6, 2, seed=3, holes=True)
    histogram = window_histogram(runs, 6, window)
    windows = [run[i : i + window].tolist() for run in runs for i in range(30 - window + 1)]
    found = segment_routing(histogram.sum((0, 1)))
    wanted, threshold = srp_by_hand(windows, 6, window)
    assert found.srp == pytest.approx(wanted, abs=1e-12)
    assert found.threshold == threshold
    uses = sum(e >= 0 for w in windows for token in w for e in token)
    assert found.active == pytest.approx(uses / (len(windows) * window * 6))
    assert histogram.sum() == len(windows) * 6


def test_experts_that_are_constant_in_every_window_are_perfect():
    assert segment_routing(window_histogram(np.tile([[[1, 4]]], (2, 40, 1)), 8, 16).sum((0, 1))).srp == 1
    by_expert = window_histogram(np.tile([[[1, 4]]], (2, 40, 1)), 8, 16).sum(0)
    assert segment_routing(by_expert[1]).srp == 1


def test_samples_shorter_than_the_window_have_no_srp():
    assert segment_routing(window_histogram(trace(5, 4, 1), 4, 6).sum((0, 1))) is None


@pytest.mark.parametrize(("rate", "window"), [(0.1, 4), (0.5, 16)])
def test_independent_routing_scores_as_the_best_binomial_threshold(rate, window):
    uses = np.random.default_rng(0).random((200, 400, 1)) < rate
    found = segment_routing(window_histogram(np.where(uses, 0, -1), 1, window).sum((0, 1)))
    assert found.srp == pytest.approx(independent_srp(rate, window), abs=0.01)
    assert found.baseline == pytest.approx(found.srp, abs=0.01)
    assert independent_srp(rate, window) >= 2 * rate / (1 + rate) - 1e-9


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    inside = 0
    for number in range(300):
        low, high = mean_interval(rng.normal(size=60), draws=200, seed=number)
        inside += low <= 0 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_the_srp_interval_holds_its_estimate_and_narrows_with_samples():
    def width(samples):
        histogram = window_histogram(trace(40, 6, 2, samples=samples), 6, 4).sum(1)
        low, high = srp_interval(histogram, 300, 0)
        assert low < segment_routing(histogram.sum(0)).srp < high
        return high - low

    assert width(64) < width(4) / 1.5
