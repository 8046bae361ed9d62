"""Paired statistics against SciPy, against power by simulation, and intervals that cover at the stated rate."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from moecli.ops.paired import (
    Stratum,
    detectable,
    difference,
    interval,
    mcnemar,
    no_flip_bound,
    standard_error,
    stratum,
)

RUNS = 1000


def changes(rng, documents, lost, gained):
    """b - a of right and wrong: planted shares of documents lost and gained."""
    return stratum(rng.choice([-1.0, 0.0, 1.0], size=documents, p=[lost, 1 - lost - gained, gained]))


def covers(ends, truth):
    return ends is not None and ends[0] - 1e-12 <= truth <= ends[1] + 1e-12


def test_p_is_scipys_binomial_test():
    for lost, gained in [(0, 0), (1, 0), (0, 6), (7, 3), (40, 61), (500, 431), (3, 3)]:
        ours = mcnemar(lost, gained)
        theirs = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert ours == pytest.approx(theirs, rel=1e-9)
        assert ours == mcnemar(gained, lost)


def test_p_is_the_share_of_coins_that_fell_as_unevenly():
    """By hand: 8 flips, 7 of them one way: 2 (1 + 8) / 256."""
    assert mcnemar(7, 1) == 18 / 256


def test_difference_and_error_of_means_are_the_t_tests():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=50), rng.normal(0.3, size=50)
    ours = [stratum(b - a)]
    theirs = stats.ttest_rel(b, a)
    assert difference(ours) / standard_error(ours) == pytest.approx(theirs.statistic, rel=1e-12)


def test_error_of_a_ratio_is_the_spread_of_the_bootstrap():
    rng = np.random.default_rng(4)
    weights = rng.integers(50, 500, size=400).astype(float)
    one = stratum(weights * 0.05 + rng.normal(0, 3, size=400), weights)
    theirs = stats.bootstrap(
        (one.num_N, one.den_N), lambda n, d, axis: n.sum(axis) / d.sum(axis), paired=True, n_resamples=4000, rng=rng
    )
    assert standard_error([one]) == pytest.approx(theirs.standard_error, rel=0.05)


@pytest.mark.parametrize("weighted", [False, True])
def test_interval_is_scipys_percentile_interval_with_wider_tails(weighted):
    rng = np.random.default_rng(5)
    count = 8
    weights = rng.integers(50, 500, size=count).astype(float) if weighted else np.ones(count)
    one = stratum(weights * rng.exponential(0.1, size=count), weights)
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.025, count - 1))
    theirs = stats.bootstrap(
        (one.num_N, one.den_N), lambda n, d, axis: n.sum(axis) / d.sum(axis), paired=True, n_resamples=40_000,
        confidence_level=1 - 2 * tail, method="percentile", rng=rng,
    )  # fmt: skip
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert interval([one], resamples=40_000) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02 * width)


def test_an_interval_of_several_tasks_weighs_tasks_the_same():
    """Wide by the small task alone: var = (var_1 + var_2) / 4, whatever the sizes."""
    rng = np.random.default_rng(6)
    tasks = [stratum(rng.normal(0.5, 1, size=100)), stratum(rng.normal(0.1, 0.01, size=5000))]
    assert difference(tasks) == pytest.approx((tasks[0].num_N.mean() + tasks[1].num_N.mean()) / 2)
    low, high = interval(tasks)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error(tasks), rel=0.05)
    assert standard_error(tasks) == pytest.approx(tasks[0].num_N.std(ddof=1) / 10 / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("documents", "lost", "gained"), [(100, 0.08, 0.04), (200, 0.06, 0.03), (500, 0.1, 0.1), (500, 0.02, 0.01)]
)
def test_95_percent_intervals_of_planted_flips_cover_95_times_in_100(documents, lost, gained):
    rng = np.random.default_rng(documents)
    found = [interval([changes(rng, documents, lost, gained)], resamples=1500, seed=i) for i in range(RUNS)]
    covered = sum(covers(ends, gained - lost) for ends in found)
    assert 930 <= covered <= 975  # 950 +- 3 standard errors of 1,000 runs, and the steps of whole documents


def test_intervals_of_a_mean_over_tasks_cover():
    rng = np.random.default_rng(9)
    covered = 0
    for i in range(RUNS):
        tasks = [changes(rng, 100, 0.1, 0.05), changes(rng, 300, 0.04, 0.06), changes(rng, 50, 0.15, 0.1)]
        covered += covers(interval(tasks, resamples=1000, seed=i), (-0.05 + 0.02 - 0.05) / 3)
    assert 930 <= covered <= 970


def test_intervals_of_a_perplexity_ratio_cover():
    """62 documents of planted length and planted loss of 0.1 nats a word, both noisy."""
    rng = np.random.default_rng(10)
    covered = 0
    for i in range(RUNS):
        words = rng.gamma(2.0, 1500.0, size=62)
        lost = words * (0.1 + rng.normal(0, 0.05, size=62))
        ends = interval([stratum(lost, words)], resamples=500, seed=i)
        covered += math.exp(ends[0]) <= math.exp(0.1) <= math.exp(ends[1])
    assert 925 <= covered <= 970


def test_narrower_at_a_lower_level():
    one = [changes(np.random.default_rng(1), 300, 0.1, 0.05)]
    wide, narrow = interval(one), interval(one, level=0.8)
    assert wide[0] < narrow[0] < difference(one) < narrow[1] < wide[1]


def test_the_same_input_gives_the_same_interval():
    one = [changes(np.random.default_rng(1), 300, 0.1, 0.05)]
    assert interval(one) == interval(one)
    reversed_ = [Stratum(one[0].num_N[::-1].copy(), one[0].den_N)]
    assert interval(one) == interval(reversed_)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0, 0.0], [0.25, 0.25]])
def test_nothing_to_resample_is_no_interval(values):
    assert interval([stratum(values)]) is None


def test_documents_that_all_lose_the_same_per_word_are_no_interval():
    weights = [3.0, 10.0, 7.0]
    assert interval([stratum([0.1 * w for w in weights], weights)]) is None


@pytest.mark.parametrize("arguments", [([],), ([1.0], [0.0]), ([1.0, 2.0], [1.0])])
def test_documents_without_weight_are_refused(arguments):
    with pytest.raises(ValueError, match="expected documents with a positive sum of weights"):
        stratum(*arguments)


def test_no_flip_bound_is_clopper_pearsons():
    for documents in (1, 20, 500):
        theirs = stats.binomtest(0, documents).proportion_ci(0.95, method="exact").high
        assert no_flip_bound([documents]) == pytest.approx(theirs, rel=1e-9)


def test_no_flip_bound_of_several_tasks_is_never_too_small():
    """Any rates with a larger mean leave all documents unflipped less often than 2.5 times in 100."""
    rng = np.random.default_rng(2)
    sizes = np.array([20, 50, 80])
    bound = no_flip_bound(sizes.tolist())
    rates_R3 = rng.dirichlet([0.5, 0.5, 0.5], size=20_000) * 3 * bound
    assert np.all(np.prod((1 - np.clip(rates_R3, 0, 1)) ** sizes, axis=1) <= 0.025 + 1e-12)


@pytest.mark.parametrize(("documents", "flips"), [(400, 0.2), (1000, 0.1), (250, 0.5), (2000, 1.0)])
def test_a_detectable_difference_is_found_four_times_in_five(documents, flips):
    """Power of the exact test by simulation. It is a little below that of the formula, which has no steps."""
    size = detectable(documents, flips)
    rng = np.random.default_rng(8)
    lost, gained = (flips + size) / 2, (flips - size) / 2
    drawn_R3 = rng.multinomial(documents, [lost, 1 - flips, gained], size=4000)
    found = np.mean([mcnemar(int(a), int(b)) < 0.05 for a, _, b in drawn_R3])
    assert 0.75 <= found <= 0.82


def test_too_few_documents_resolve_nothing():
    assert detectable(10, 0.1) is None
    assert detectable(3) is None
    assert detectable(100, 0.0) is None
    assert detectable(100, 0.05) is None


@pytest.mark.parametrize(("documents", "flips"), [(100, 1.0), (1000, 0.1), (50, 0.4)])
def test_detectable_solves_its_equation(documents, flips):
    size, power = stats.norm.ppf(0.975), stats.norm.ppf(0.8)

    def off(d):
        return math.sqrt(documents) * d - size * math.sqrt(flips) - power * math.sqrt(flips - d * d)

    assert detectable(documents, flips) == pytest.approx(optimize.brentq(off, 1e-9, flips), rel=1e-9)
