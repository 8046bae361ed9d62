"""What became of each expert, told in the ids of the source model."""

from types import SimpleNamespace

from moecli.runner.gather import fates_of_experts

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
