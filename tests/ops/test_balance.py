"""Even samples: the measure in plain numbers, the choice against a slow loop and against all choices."""

from itertools import combinations
from statistics import fmean, pstdev

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.balance import balanced, unevenness


def spread(counts):
    """counts[layer][expert]"""
    return fmean(pstdev([c / (sum(layer) or 1) for c in layer]) for layer in counts)


def summed(samples, chosen):
    layers, experts = len(samples[0]), len(samples[0][0])
    return [[sum(samples[n][i][e] for n in chosen) for e in range(experts)] for i in range(layers)]


def test_unevenness_is_the_standard_deviation_of_shares():
    assert unevenness(torch.tensor([[3, 1], [2, 2]])) == (0.25 + 0) / 2
    assert unevenness(torch.zeros(2, 4)) == 0


def test_samples_that_make_up_for_one_another_are_chosen():
    only_first, only_second, even = [[4, 0]], [[0, 4]], [[2, 2]]
    assert balanced(torch.tensor([only_first, only_first, only_second]), 2).tolist() == [0, 2]
    assert balanced(torch.tensor([only_first, even, only_second, even]), 2).tolist() == [1, 3]


counts = st.lists(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=2), min_size=2, max_size=6
)


@given(counts, st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_the_choice_is_that_of_the_slow_loop_and_never_less_even_than_the_first(samples, keep):
    found = balanced(torch.tensor(samples), keep).tolist()
    kept = min(keep, len(samples))
    assert len(set(found)) == kept and found == sorted(found)
    chosen = []
    for _ in range(kept):
        costs = {}
        for n in range(len(samples)):
            if n not in chosen:
                total = summed(samples, [*chosen, n])
                costs[n] = sum(sum(c * c for c in layer) / max(sum(layer), 1) ** 2 for layer in total)
        least = min(costs.values())
        chosen.append(next(n for n, cost in costs.items() if cost <= least + 1e-12))
    slow, first = spread(summed(samples, chosen)), spread(summed(samples, range(kept)))
    assert abs(spread(summed(samples, found)) - min(slow, first)) < 1e-9
    assert spread(summed(samples, found)) >= min(
        spread(summed(samples, some)) for some in combinations(range(len(samples)), kept)
    ) - 1e-9  # fmt: skip
