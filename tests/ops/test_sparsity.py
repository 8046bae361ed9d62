"""Masks against plain loops; SparseGPT against one matrix, one column at a time, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.ops import sparsity
from moecli.ops.gptq import factor
from moecli.ops.sparsity import Pattern, dropped, has_pattern, kept, sparsegpt


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(experts, columns, seed=1):
    """H of inputs that are correlated, of different sizes."""
    x = random(experts, 3 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return x.mT @ x / x.shape[1]


# -- masks


def plain_mask(score_RC, part):
    """Sort each row, lowest first, ties from the right; a part of them goes."""
    rows = []
    for row in score_RC.tolist():
        order = sorted(range(len(row)), key=lambda j: (row[j], -j))
        gone = set(order[: int(len(row) * part + 1e-9)])
        rows.append([j not in gone for j in range(len(row))])
    return rows


@given(st.integers(1, 12), st.sampled_from([0.1, 0.29, 0.5, 0.75, 0.99]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_row_keeps_its_highest_scores(columns, part, seed):
    score = random(2, 3, columns, seed=seed).abs().mul(3).round()  # many ties
    found = kept(score, part)
    assert found.tolist() == [plain_mask(expert, part) for expert in score]
    assert (~found).sum(-1).eq(dropped(columns, part)).all()


def test_a_matrix_keeps_its_highest_scores():
    score = random(3, 5, 8).abs()
    found = kept(score, 0.4, "matrix")
    for expert, mask in zip(score, found, strict=True):
        threshold = sorted(expert.flatten().tolist())[16]
        assert torch.equal(mask, expert >= threshold)
    assert not torch.equal(found, kept(score, 0.4))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)])
def test_no_other_mask_of_a_group_keeps_more(pattern):
    """All choices of n of m, tried out."""
    score = random(2, 4, 16).abs()
    mask = kept(score, pattern)
    assert has_pattern(mask, pattern)
    groups, masks = (x.unflatten(-1, (-1, pattern.of)).flatten(0, -2) for x in (score, mask))
    assert masks.sum(-1).eq(pattern.keep).all()
    for group, chosen in zip(groups, masks, strict=True):
        best = max(sum(group[list(some)].tolist()) for some in itertools.combinations(range(pattern.of), pattern.keep))
        assert float(group[chosen].sum()) == pytest.approx(best)


def test_a_pattern_is_seen_and_missed():
    weight = torch.tensor([[1.0, 0, 0, 2, 3, 4, 0, 0]])
    assert has_pattern(weight, Pattern(2, 4))
    assert not has_pattern(weight, Pattern(1, 4))
    assert not has_pattern(weight.roll(2), Pattern(1, 4))


def test_groups_that_do_not_divide_the_inputs_are_refused():
    for work in (lambda: kept(random(1, 2, 6), Pattern(2, 4)),
                 lambda: sparsegpt(random(1, 2, 6), random(1, 6, 6), Pattern(2, 4))):  # fmt: skip
        with pytest.raises(ValueError, match="groups of 4 do not divide 6 inputs"):
            work()


def test_floating_point_does_not_lose_a_weight():
    assert [dropped(100, part) for part in (0.29, 0.57, 0.58)] == [29, 57, 58]


# -- SparseGPT


def plain_sparsegpt(weight_RC, inverse_CC, part, block):
    """Column after column. The inverse of what is left of H is found anew for each, by eliminating the column."""
    w, inverse = weight_RC.clone(), inverse_CC.clone()
    rows, columns = w.shape
    inverses = []
    for j in range(columns):  # diagonal and row of (H_jj..)^-1, as algorithm 1 has them
        inverses.append(inverse[j].clone())
        inverse = inverse - inverse[:, j, None] @ inverse[None, j] / inverse[j, j]
    for j in range(columns):
        if isinstance(part, Pattern):
            if j % part.of == 0:
                some = range(j, j + part.of)
                goes = {}
                for r in range(rows):
                    score = {c: float(w[r, c] ** 2 / inverses[c][c]) for c in some}
                    goes[r] = sorted(some, key=score.get)[: part.of - part.keep]
        elif j % block == 0:
            some = [(r, c) for r in range(rows) for c in range(j, min(j + block, columns))]
            score = {(r, c): float(w[r, c] ** 2 / inverses[c][c]) for r, c in some}
            order = sorted(some, key=score.get)[: int(len(some) * part)]
            goes = {r: [c for row, c in order if row == r] for r in range(rows)}
        for r in range(rows):
            if j in goes[r]:
                error = w[r, j] / inverses[j][j]
                w[r, j:] -= error * inverses[j][j:]
                w[r, j] = 0
    return w


@pytest.mark.parametrize("part", [0.5, 0.3, Pattern(2, 4), Pattern(1, 4)])
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_the_plain_column_loop(part, block, monkeypatch):
    monkeypatch.setattr(sparsity, "BLOCK", block)
    weight, moment, damp = random(3, 5, 24), inputs(3, 24), 0.01
    found = sparsegpt(weight, factor(moment, damp, act_order=False).upper_ECC, part)
    for w, h, got in zip(weight, moment, found, strict=True):
        damped = h + damp * h.diagonal().mean() * torch.eye(24, dtype=torch.float64)
        torch.testing.assert_close(got, plain_sparsegpt(w, torch.linalg.inv(damped), part, block))


@pytest.mark.parametrize("part", [0.5, Pattern(2, 4)])
def test_what_is_left_does_better_than_the_same_weights_unchanged(part):
    weight, moment = random(2, 16, 32), inputs(2, 32)
    found = sparsegpt(weight, factor(moment, act_order=False).upper_ECC, part)
    zeros = found == 0
    loss = [((w - weight) @ moment * (w - weight)).sum() for w in (found, weight.masked_fill(zeros, 0))]
    assert loss[0] < 0.8 * loss[1]
    goal = 0.5 if isinstance(part, float) else 1 - part.keep / part.of
    assert float(zeros.double().mean()) == goal
    if isinstance(part, Pattern):
        assert has_pattern(found, part)


def test_without_correlation_sparsegpt_changes_no_weight_that_stays():
    weight = random(2, 3, 8)
    found = sparsegpt(weight, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), Pattern(2, 4))
    assert torch.equal(found, weight * kept(weight.square(), Pattern(2, 4)))


def test_the_given_weights_stay_as_they_are():
    weight = random(1, 2, 8)
    before = weight.clone()
    sparsegpt(weight, factor(inputs(1, 8), act_order=False).upper_ECC, 0.5)
    assert torch.equal(weight, before)
