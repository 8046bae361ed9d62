"""Local routing consistency: how well a few experts held in fast memory serve a stretch of text.

Source: arXiv 2505.16056 (SRP: section 3.1, SCH: section 3.2) and, where the paper is silent, the rules of its published
code as the specification restates them. Letters: N samples, T tokens of a sample, k experts per token, E experts,
m tokens of a window, F tokens of look-ahead, C experts that a cache holds. In traces -1 is no visit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


# -- SRP: a segment router that sees the future


def window_histogram(index_NTk: NDArray[np.integer], experts: int, window: int) -> Ints:
    """int64 [N, E, m+1]: how many windows of m tokens (stride 1) of a sample route c of them to an expert, c = 0..m.

    All zero where samples are shorter than the window.
    """
    samples, tokens, _ = index_NTk.shape
    found = np.zeros((samples, experts, window + 1), np.int64)
    if tokens < window:
        return found
    offset_E = np.arange(experts) * (window + 1)
    for n in range(samples):
        used_TE = _used(index_NTk[n], experts)
        sums_TE = np.concatenate([np.zeros((1, experts), np.int64), used_TE.cumsum(0, dtype=np.int64)])
        count_WE = sums_TE[window:] - sums_TE[:-window]
        found[n] = np.bincount((count_WE + offset_E).ravel(), minlength=experts * (window + 1)).reshape(experts, -1)
    return found


def _used(index_Tk: NDArray[np.integer], experts: int) -> NDArray[np.bool_]:
    used = np.zeros((len(index_Tk), experts + 1), bool)
    used[np.arange(len(index_Tk))[:, None], np.where(index_Tk < 0, experts, index_Tk)] = True
    return used[:, :experts]


@dataclass(frozen=True, slots=True)
class SegmentRouting:
    """SRP of some experts with one common threshold: a window's expert is on when it is used at least t times."""

    srp: float
    """max over t of F1(t) = 2 M(t) / max(P(t) + A, 1): M uses served, P uses there is room for, A all uses"""
    threshold: int
    """The smallest t that reaches it"""
    active: float
    """A / P(0), the share of (token, expert) pairs that are uses"""
    rho: float
    """P(t) / A: expert-tokens that are resident for each one that is used"""
    baseline: float
    """SRP of independent routing at the same `active`"""


def segment_routing(histogram: NDArray[np.integer]) -> SegmentRouting | None:
    """From `window_histogram` summed over whatever is taken together, [m+1]; None without windows."""
    if not histogram.sum():
        return None
    f1, room, uses = _f1(histogram.astype(np.float64))
    best = int(f1.argmax())
    active = float(uses / room[0])
    return SegmentRouting(
        float(f1[best]), best, active, float(room[best] / uses) if uses else 0.0,
        independent_srp(active, len(histogram) - 1),
    )  # fmt: skip


def _f1(histogram: Floats) -> tuple[Floats, Floats, Floats]:
    """F1(t) and P(t) for t = 0..m in the last dimension, and A."""
    count = np.arange(histogram.shape[-1])
    served = np.flip(np.flip(histogram * count, -1).cumsum(-1), -1)
    room = np.flip(np.flip(histogram, -1).cumsum(-1), -1) * (histogram.shape[-1] - 1)
    uses = served[..., 0]
    return 2 * served / np.maximum(room + uses[..., None], 1), room, uses


def independent_srp(active: float, window: int) -> float:
    """SRP when each token uses an expert with probability `active`, whatever the others do: the best threshold of a
    binomial distribution; t = 0 gives 2r / (1 + r).
    """
    from scipy.stats import binom

    return float(_f1(binom.pmf(np.arange(window + 1), window, active) * 1e12)[0].max())


def srp_interval(histogram_Nm: NDArray[np.integer], draws: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Basic bootstrap interval of SRP, samples resampled: [2 est - q_hi, 2 est - q_lo]. [N, m+1]."""
    weight_BN = _resampled(len(histogram_Nm), draws, seed)
    estimate = _f1(histogram_Nm.sum(0).astype(np.float64))[0].max()
    drawn = _f1(weight_BN @ histogram_Nm.astype(np.float64))[0].max(-1)
    return _basic(float(estimate), drawn, level)


def mean_interval(value_N: NDArray[np.floating], draws: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Basic bootstrap interval of a mean over samples."""
    drawn = _resampled(len(value_N), draws, seed) @ value_N / len(value_N)
    return _basic(float(value_N.mean()), drawn, level)


def _resampled(samples: int, draws: int, seed: int) -> Floats:
    """How often each draw takes each sample."""
    return np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), draws).astype(np.float64)


def _basic(estimate: float, drawn: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return 2 * estimate - float(high), 2 * estimate - float(low)


# -- SCH: a cache that sees the next F tokens


@dataclass(frozen=True, slots=True, eq=False)
class CacheHits:
    """What caches of every size C = 1..E would have served, each of N runs by itself."""

    hit_NE: Ints
    """Hits of a cache of C = index + 1 experts that starts empty"""
    distinct_N: Ints
    visits_N: Ints

    @property
    def rate_NE(self) -> Floats:
        """Hits per visit, with cold fills counted as hits: the cache is taken to be warm."""
        capacity_E = np.arange(1, self.hit_NE.shape[1] + 1)
        warm = np.minimum(capacity_E, self.distinct_N[:, None])
        return (self.hit_NE + warm) / np.maximum(self.visits_N, 1)[:, None]


def cache_hits(index_NTk: NDArray[np.integer], experts: int, look_ahead: int) -> CacheHits:
    """Hits of a cache at all capacities at once, for N runs side by side.

    Token by token: first every expert of the token is looked for, then each is brought in, in the order of the slots;
    when there are too many, out goes the one with the fewest uses in the next `look_ahead` tokens (this one included
    until its turn), of several the one used longest ago. `look_ahead` 0 is plain LRU.

    Which expert goes does not depend on the capacity, so a cache of C experts holds what one of C - 1 holds (Mattson's
    stack): one ordered list of experts serves all capacities. O(T k E) for each run, in T k vector steps.
    """
    runs, tokens, slots = index_NTk.shape
    row = np.arange(runs)
    index = np.where(index_NTk < 0, experts, index_NTk).astype(np.int64)
    # A key orders experts: uses ahead, then time of last use, then the expert itself, so that the list can be kept
    # as keys. "Expert E" stands for an empty place and is smaller than all that were ever used.
    key_NE = np.broadcast_to(np.arange(experts + 1, dtype=np.int64), (runs, experts + 1)).copy()
    stack_NE = np.full((runs, experts), experts, np.int64)
    found = np.zeros((runs, experts + 1), np.int64)
    seen = np.zeros((runs, experts + 1), bool)
    for t in range(min(look_ahead, tokens)):
        _tally(key_NE, index[:, t], row)
    for t in range(tokens):
        for j in range(slots):
            found[row, _depth(stack_NE, index[:, t, j], row)] += 1
        for j in range(slots):
            wanted = index[:, t, j]
            ahead = (key_NE[row, wanted] >> _AHEAD) - (look_ahead > 0)
            key_NE[row, wanted] = (ahead << _AHEAD) | ((t * slots + j + 1) << _CLOCK) | wanted
            seen[row, wanted] = True
            _bring_up(stack_NE, key_NE, wanted, row)
        if look_ahead and t + look_ahead < tokens:
            _tally(key_NE, index[:, t + look_ahead], row)
    return CacheHits(found[:, :experts].cumsum(1), seen[:, :experts].sum(1), (index_NTk >= 0).sum((1, 2)))


_CLOCK, _AHEAD = 16, 40
"""Bits of a key below the time of last use, and below the uses ahead: 65,535 experts, 16 million visits."""


def _tally(key_NE: Ints, wanted_Nk: Ints, row: Ints) -> None:
    """One use more ahead of each of these."""
    for wanted in wanted_Nk.T:
        key_NE[row, wanted] += 1 << _AHEAD


def _depth(stack_NE: Ints, wanted: Ints, row: Ints) -> Ints:
    """Where each run's list has this expert; E when it has not."""
    same = stack_NE == wanted[:, None]
    depth = same.argmax(1)
    return np.where(same[row, depth] & (wanted < stack_NE.shape[1]), depth, stack_NE.shape[1])


def _bring_up(stack_NE: Ints, key_NE: Ints, wanted: Ints, row: Ints) -> None:
    """Put the expert on top. Each place below, as far as its old one, keeps the larger of what it had and of what the
    place above gave away.
    """
    experts = stack_NE.shape[1]
    key_NE[:, experts] = experts
    depth = _depth(stack_NE, wanted, row)
    nothing = wanted == experts
    old = np.take_along_axis(key_NE, stack_NE, 1)
    top = np.where(nothing, old[:, 0], wanted)
    gone = np.where(nothing, 0, depth)
    there = gone < experts
    old[row[there], gone[there]] = -1  # below it nothing is given away
    new = np.maximum(np.minimum.accumulate(old, 1)[:, :-1], old[:, 1:])
    stack_NE[:, 1:] = new & ((1 << _CLOCK) - 1)
    stack_NE[:, 0] = top & ((1 << _CLOCK) - 1)


def pooled(index_LNTk: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """[N, T, L k]: the traces of all layers as one, for one cache of L E experts; layers in order within a token."""
    offset = np.arange(len(index_LNTk))[:, None, None, None] * experts
    moved = np.where(index_LNTk < 0, -1, index_LNTk.astype(np.int64) + offset)
    return np.moveaxis(moved, 0, 2).reshape(*moved.shape[1:3], -1)
