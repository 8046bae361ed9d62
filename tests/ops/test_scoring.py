"""Windows and ratios against lm-eval and against simulation."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.scoring import block_windows, divergence, ratio, rolling_windows, strided_windows


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12))
def test_rolling_windows_are_lm_evals(count, length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + count))
    theirs = []
    for context, targets in map(make_disjoint_window, get_rolling_token_windows(ids, 7, length, 1)):
        theirs.append(((context + targets)[:-1][-length:], targets))
    assert list(rolling_windows(ids, 7, length)) == theirs


def test_blocks_drop_the_rest():
    assert list(block_windows([1, 2, 3, 4, 5, 6, 7], 3)) == [([1, 2], [2, 3]), ([4, 5], [5, 6])]


@settings(max_examples=60)
@given(count=st.integers(0, 60), length=st.integers(1, 20), stride=st.integers(1, 20))
def test_strided_windows_score_every_token_but_the_first_once(count, length, stride):
    stride, ids = min(stride, length), list(range(count))
    windows = list(strided_windows(ids, length, stride))
    assert [t for _, targets in windows for t in targets] == (ids[1:] if count > length else [])
    for number, (inputs, targets) in enumerate(windows):
        assert len(inputs) == length
        assert inputs == list(range(targets[-1] - length, targets[-1])), "the context right before the last target"
        assert len(targets) == (stride if 0 < number < len(windows) - 1 else len(targets))
    for start in range(0, count - length, stride):  # whole windows of length + 1, as published
        number = start // stride
        assert windows[number][0] == ids[start : start + length]
        assert windows[number][1] == ids[start + 1 : start + length + 1][-(stride if number else length) :]


def test_divergence_is_a_sum_over_words():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    assert divergence(p.log(), q.log()).tolist() == pytest.approx([0.5 * math.log(2), math.log(2)])


def test_the_error_of_a_ratio_covers_the_truth():
    generator = random.Random(0)
    covered = 0
    for _ in range(300):
        weights = [generator.uniform(5, 15) for _ in range(60)]
        values = [w * 2 + generator.gauss(0, 3) for w in weights]
        estimate, error = ratio(values, weights)
        covered += abs(estimate - 2) < 1.96 * error
    assert 270 <= covered <= 297


def test_one_unit_has_no_error():
    assert ratio([3.0], [2.0]) == (1.5, None)
