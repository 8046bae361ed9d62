"""Subset search against brute force over the layer's real output."""

import itertools

import pytest
import torch

from moecli.ops.subset import beam, exhaustive, replay_loss


def layer(seed, experts=6, tokens=9, width=5):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=rng), torch.randn(tokens, experts, width, generator=rng).double()


def weights(logits_TE, kept):
    """Top-2 of the kept experts, softmax over the two; dense [T, E]."""
    masked = torch.full_like(logits_TE, float("-inf"))
    masked[:, kept] = logits_TE[:, kept]
    top, index = masked.topk(2, dim=-1)
    return torch.zeros_like(logits_TE, dtype=torch.float64).scatter_(-1, index, top.double().softmax(-1))


def plain_loss(logits_TE, y_TED, kept):
    whole = (weights(logits_TE, range(logits_TE.shape[1]))[..., None] * y_TED).sum(1)
    cut = (weights(logits_TE, list(kept))[..., None] * y_TED).sum(1)
    return float((whole - cut).square().sum())


def loss_of(logits_TE, y_TED):
    gram_TEE = y_TED @ y_TED.mT
    whole_TE = weights(logits_TE, range(logits_TE.shape[1]))
    return lambda kept_CK: replay_loss(
        gram_TEE, torch.stack([weights(logits_TE, kept) - whole_TE for kept in kept_CK.tolist()])
    )


@pytest.mark.parametrize("seed", range(4))
def test_exhaustive_is_brute_force_and_no_search_beats_it(seed):
    logits, y = layer(seed)
    every = {kept: plain_loss(logits, y, kept) for kept in itertools.combinations(range(6), 3)}
    loss = loss_of(logits, y)
    for kept, value in every.items():
        assert float(loss(torch.tensor([kept]))) == pytest.approx(value, rel=1e-9, abs=1e-9)
    best = exhaustive(6, 3, loss)
    assert tuple(best) == min(every, key=every.get)
    greedy, wide = beam(6, 3, loss), beam(6, 3, loss, width=4)
    assert every[tuple(best)] <= every[tuple(wide)] <= every[tuple(greedy)]
    assert beam(6, 3, loss, width=100) == best, "a beam that drops nothing is exhaustive"


def test_greedy_takes_the_best_step_each_time():
    logits, y = layer(7)
    loss, kept = loss_of(logits, y), tuple(range(6))
    while len(kept) > 2:
        kept = min((kept[:i] + kept[i + 1 :] for i in range(len(kept))), key=lambda k: plain_loss(logits, y, k))
    assert tuple(beam(6, 2, loss)) == kept


def test_keeping_all_changes_nothing():
    logits, y = layer(1)
    assert beam(6, 6, loss_of(logits, y)) == exhaustive(6, 6, loss_of(logits, y)) == list(range(6))
