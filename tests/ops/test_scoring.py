"""Windows and ratios against lm-eval and against simulation."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops.scoring import block_windows, ratio, rolling_windows, target_logprobs


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


def test_log_probabilities_belong_to_the_last_positions():
    logits = torch.tensor([[0.0, 9.0], [0.0, 0.0], [math.log(3), 0.0]])
    assert target_logprobs(logits, [1, 0]).tolist() == pytest.approx([math.log(1 / 2), math.log(3 / 4)])


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
