"""Which K of E experts reproduce a layer's routed output best: exhaustive, greedy and beam search over an exact replay.

With G_t = Y_t Y_t^T, the Gram of all experts' outputs for token t, and d_t the change of their E weights, the squared
error of the layer's output is d_t^T G_t d_t: a subset costs no expert forward, and outputs need not be kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 256
"""Subsets that are looked at in one go."""

Loss = Callable[[Tensor], Tensor]
"""kept experts int64 [C, K], ascending -> loss float64 [C]"""


def replay_loss(gram_TEE: Tensor, change_CTE: Tensor) -> Tensor:
    """Sum over tokens of ||sum_e change_te y_te||^2, float64 [C]."""
    moved_CTE = torch.einsum("cte,tef->ctf", change_CTE.double(), gram_TEE.double())
    return (moved_CTE * change_CTE.double()).sum((1, 2))


def exhaustive(experts: int, keep: int, loss: Loss) -> list[int]:
    """The best of all C(E, K) subsets; ties keep the lexicographically first."""
    best, found = math.inf, list(range(keep))
    for some in _chunks(itertools.combinations(range(experts), keep)):
        loss_C = loss(torch.tensor(some))
        at = int(loss_C.argmin())
        if float(loss_C[at]) < best:
            best, found = float(loss_C[at]), list(some[at])
    return found


def beam(experts: int, keep: int, loss: Loss, width: int = 1) -> list[int]:
    """Backward elimination: one expert less a step, the `width` best subsets go on. Width 1 is the greedy search.

    E(E-K) evaluations times `width`, at most.
    """
    front = [tuple(range(experts))]
    for size in range(experts - 1, keep - 1, -1):
        tried = sorted({s[:i] + s[i + 1 :] for s in front for i in range(size + 1)})
        loss_C = torch.cat([loss(torch.tensor(some)) for some in _chunks(iter(tried))])
        order = torch.argsort(loss_C, stable=True)[:width].tolist()
        front = [tried[i] for i in order]
    return list(front[0])


def _chunks(items: Iterator[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    while some := list(itertools.islice(items, CHUNK)):
        yield some
