"""What became of each expert, told in the ids of the source model."""

from types import SimpleNamespace

import pytest

from moecli.runner import lookup
from moecli.runner.gather import _of_source, fates_of_experts
from moecli.runner.plan import SOURCE

SIX = SimpleNamespace(experts=6)


def test_a_second_pruning_counts_in_the_ids_of_the_first():
    records = [{"kept": {"0": [1, 2, 4, 5]}}, {}, {"kept": {"0": [0, 3]}}]
    kept, groups = fates_of_experts(SIX, records)
    assert kept == {0: (1, 5)}
    assert groups == {0: (-1, 0, -1, -1, -1, 1)}


def test_merging_what_pruning_left():
    records = [{"kept": {"0": [1, 2, 4, 5]}}, {"groups": {"0": [0, 1, 1, 0]}, "leads": {"0": [3, 1]}}]
    kept, groups = fates_of_experts(SIX, records)
    assert kept == {0: (5, 2)}
    assert groups == {0: (-1, 0, 1, -1, 1, 0)}


def test_pruning_what_merging_left():
    records = [{"groups": {"0": [0, 0, 1, 1, 2, 2]}, "leads": {"0": [0, 3, 4]}}, {"kept": {"0": [1, 2]}}]
    kept, groups = fates_of_experts(SIX, records)
    assert kept == {0: (3, 4)}
    assert groups == {0: (-1, -1, 0, 0, 1, 1)}


@pytest.mark.parametrize(
    ("inputs", "of_source"), [((SOURCE, SOURCE), True), ((SOURCE, 2), False), ((2, SOURCE), False)]
)
def test_an_evaluation_that_takes_the_source_too_is_of_the_model_it_evaluates(inputs, of_source):
    step = SimpleNamespace(
        inputs=dict(zip(("source", "model"), inputs, strict=True)), stage=lookup.find("eval/routing")
    )
    assert _of_source(SimpleNamespace(step=step)) is of_source
