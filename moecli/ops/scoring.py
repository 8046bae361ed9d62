"""Token log-likelihoods and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """lm-eval's rolling windows with context_len = 1: (input ids, targets of the last positions).

    Every token is scored exactly once; the first one is conditioned on `prefix` (BOS, or EOS without BOS); later
    windows are filled with as much left context as fits into `length`.
    """
    if not ids:
        return
    first = min(length, len(ids))
    yield [prefix, *ids[: first - 1]], list(ids[:first])
    scored = first
    while scored < len(ids):
        count = min(len(ids) - scored, length)
        end = scored + count
        yield list(ids[end - length - 1 : end - 1]), list(ids[scored:end])
        scored = end


def block_windows(ids: Sequence[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """The windows of compression papers: consecutive blocks of `length` tokens, no prefix, the rest dropped.

    The first token of each block has no context and is not scored: `length - 1` targets a block.
    """
    for start in range(0, len(ids) - length + 1, length):
        block = list(ids[start : start + length])
        yield block[:-1], block[1:]


def target_logprobs(logits_TV: Tensor, targets: Sequence[int]) -> Tensor:
    """Natural-log probabilities of `targets` under the last len(targets) rows of logits, float32 [len(targets)]."""
    rows = logits_TV[-len(targets) :].float().log_softmax(-1)
    return rows.gather(-1, torch.tensor(targets, device=rows.device).unsqueeze(-1)).squeeze(-1)


def divergence(logp_RV: Tensor, logq_RV: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, from log-probabilities of one dtype; where p is 0 nothing is added. [R]

    In float32 differences of about 1e-7 are rounding.
    """
    terms_RV = logp_RV.exp() * (logp_RV - logq_RV)
    return terms_RV.masked_fill(logp_RV == float("-inf"), 0.0).sum(-1)


def ratio(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """sum(values)/sum(weights) and its standard error over units (documents or windows), by linearisation.

    The error is None for fewer than two units.
    """
    total = math.fsum(weights)
    estimate = math.fsum(values) / total
    count = len(values)
    if count < 2:
        return estimate, None
    residual = math.fsum((v - estimate * w) ** 2 for v, w in zip(values, weights, strict=True))
    return estimate, math.sqrt(count / (count - 1) * residual) / total
