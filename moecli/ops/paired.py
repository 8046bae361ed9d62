"""Two models on the same documents: how large the difference is, how sure, and what was too small to see.

A difference is a ratio of sums over documents, D = sum_i num_i / sum_i den_i: with den = 1 the difference of two means
(num_i = b_i - a_i), with words or bytes as den the difference of two log-perplexities. Documents are the unit that is
resampled, both models' outcomes of a document staying together.

Intervals are percentile bootstrap intervals, expanded for small samples (Hesterberg 2015, sec. 5.2: the tails are
taken at Phi(-sqrt(n/(n-1)) t), t the quantile of Student's distribution, which is what the plain ones are short by).
They carry over to exp(D) unchanged. BCa intervals were tried and covered less: in 1,000 simulations 92.0 % against
93.2 % for plain and 94.3 % for expanded percentiles (50 documents, 15 % flips), 90.6 against 91.6 and 92.4 % (a
perplexity over 62 documents of very different length).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DRAWS_AT_ONCE = 4_000_000


class Stratum(NamedTuple):
    """The paired documents of one task: numerators and denominators of the difference, float64 [N] each."""

    num_N: Floats
    den_N: Floats

    @property
    def difference(self) -> float:
        return math.fsum(self.num_N) / math.fsum(self.den_N)


def stratum(num: Sequence[float], den: Sequence[float] = ()) -> Stratum:
    """`den` is 1 each when it is not given. ValueError without documents, or when the denominators sum to nothing."""
    num_N = np.asarray(num, dtype=np.float64)
    den_N = np.asarray(den, dtype=np.float64) if len(den) else np.ones_like(num_N)
    if not len(num_N) or num_N.shape != den_N.shape or not den_N.sum() > 0:
        raise ValueError(f"expected documents with a positive sum of weights, got {len(num_N)} and {den_N.sum()}")
    return Stratum(num_N, den_N)


def difference(strata: Sequence[Stratum]) -> float:
    """Mean over tasks of their differences, each task with the same weight."""
    return math.fsum(s.difference for s in strata) / len(strata)


def standard_error(strata: Sequence[Stratum]) -> float | None:
    """Of `difference`, documents independent; linearised for ratios. None when a task has fewer than two."""
    variances = [_variance(s) for s in strata]
    known = [v for v in variances if v is not None]
    return math.sqrt(math.fsum(known)) / len(strata) if len(known) == len(strata) else None


def _variance(s: Stratum) -> float | None:
    count = len(s.num_N)
    if count < 2:
        return None
    residual_N = s.num_N - s.difference * s.den_N
    return float(count / (count - 1) * (residual_N @ residual_N) / s.den_N.sum() ** 2)


def interval(
    strata: Sequence[Stratum], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of `difference`, documents resampled within each task.

    None when there is nothing to resample: a task with fewer than two documents, or every document with the same
    difference (see `no_flip_bound` for what can still be said then). Same input, same interval.
    """
    if any(len(s.num_N) < 2 for s in strata) or all(_unanimous(s) for s in strata):
        return None
    rng = np.random.default_rng(seed)
    draws_R = np.mean([_draws(_grouped(s), resamples, rng) for s in strata], axis=0)
    tail = _expanded_tail((1 - level) / 2, sum(len(s.num_N) - 1 for s in strata))
    low, high = np.quantile(draws_R, (tail, 1 - tail))
    return float(low), float(high)


def _expanded_tail(tail: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return statistics.NormalDist().cdf(math.sqrt((freedom + 1) / freedom) * float(stdtrit(freedom, tail)))


class _Grouped(NamedTuple):
    """Documents with the same outcome counted once: drawing counts is drawing documents."""

    num_U: Floats
    den_U: Floats
    count_U: NDArray[np.int64]


def _grouped(s: Stratum) -> _Grouped:
    pairs_2U, count_U = np.unique(np.stack([s.num_N, s.den_N]), axis=1, return_counts=True)
    return _Grouped(pairs_2U[0], pairs_2U[1], count_U)


def _draws(g: _Grouped, resamples: int, rng: np.random.Generator) -> Floats:
    """The difference in each of `resamples` bootstrap samples [R]."""
    count = int(g.count_U.sum())
    step = max(1, _DRAWS_AT_ONCE // len(g.count_U))
    found = []
    for start in range(0, resamples, step):
        drawn_RU = rng.multinomial(count, g.count_U / count, size=min(step, resamples - start)).astype(np.float64)
        found.append((drawn_RU @ g.num_U) / (drawn_RU @ g.den_U))
    return np.concatenate(found)


def _unanimous(s: Stratum) -> bool:
    """Whether any sample of the documents shows the same difference."""
    residual_N = s.num_N - s.difference * s.den_N
    return float(np.abs(residual_N).max()) <= 1e-12 * float(np.abs(s.num_N).max())


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: is a flipped document as likely to have gone either way?

    The sign test on the flips: min(1, 2 P(X <= min(lost, gained))), X binomial with one half. 1 without a flip.
    """
    flips = lost + gained
    term = total = 1
    for k in range(min(lost, gained)):
        term = term * (flips - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**flips)


def no_flip_bound(documents: Sequence[int], level: float = 0.95) -> float:
    """Largest rate of flips that still leaves all `documents` without one, with probability (1 - level)/2.

    Clopper and Pearson's bound for no event, 1 - ((1 - level)/2)^(1/N); the difference of accuracies lies within it.
    For the mean over several tasks, -ln((1 - level)/2) / (tasks * fewest documents), which is never too small.
    """
    surprise = -math.log((1 - level) / 2)
    if len(documents) == 1:
        return -math.expm1(-surprise / documents[0])
    return min(1.0, surprise / (len(documents) * min(documents)))


def detectable(documents: int, flips: float = 1.0, *, power: float = 0.8, level: float = 0.95) -> float | None:
    """Smallest true difference of accuracies that McNemar's test finds with probability `power`.

    `flips` is the share of documents whose outcome changes, in both directions together; 1 is the worst case. Solves
    sqrt(N) d = z_(1-alpha/2) sqrt(flips) + z_power sqrt(flips - d^2) for d (Connor 1987); an approximation, the exact
    test finds it 1 to 3 times in 100 less often (simulated for 250 to 2,000 documents). None when even flips that all
    go one way would be too few.
    """
    size, needed = _quantile((1 + level) / 2), _quantile(power)
    inside = documents + needed**2 - size**2
    if inside <= 0 or flips <= 0:
        return None
    found = math.sqrt(flips) * (math.sqrt(documents) * size + needed * math.sqrt(inside)) / (documents + needed**2)
    return found if found <= flips else None


def _quantile(probability: float) -> float:
    return statistics.NormalDist().inv_cdf(probability)
