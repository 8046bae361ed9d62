"""Token log-likelihoods and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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


def strided_windows(ids: Sequence[int], length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Windows of `length` + 1 tokens, `stride` apart: (input ids, targets of the last positions).

    The first scores all its `length` targets, later ones their last `stride`; a last, shorter step scores what is left,
    with as much left context. Every token but the first is scored once. Nothing for `length` tokens or fewer.
    """
    if len(ids) <= length:
        return
    yield list(ids[:length]), list(ids[1 : length + 1])
    for end in range(length + 1 + stride, len(ids) + stride, stride):
        new, end = stride - max(0, end - len(ids)), min(end, len(ids))
        yield list(ids[end - length - 1 : end - 1]), list(ids[end - new : end])


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
