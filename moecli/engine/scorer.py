"""Log-probabilities of many token windows in one sweep over the layers, for models larger than the device.

    found = score(checkpoint, [Window(context + continuation[:-1], continuation)], batch_size=16, device=device)

Windows with the same inputs share one sequence; sequences are sorted by length, longest first, and padded on the
right, where a causal model does not look. All of them advance layer by layer; where their hidden states wait,
`engine.memory` decides. The head sees only rows that are scored, some at a time: the logits of all are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.engine.data import Batch
from moecli.engine.sweep import Sweep, Track, sweep

HEAD_BYTES = 256 << 20
"""Largest piece of logits held at a time, counted in fp32 ..."""
HEAD_ROWS = 4096
"""... and in rows."""


class Window(NamedTuple):
    """Some tokens; the last len(targets) positions predict `targets`."""

    inputs: Sequence[int]
    targets: Sequence[int]


class Scores(NamedTuple):
    """Of one window."""

    logprob_T: Tensor
    """natural logarithm of the probability of each target, on the CPU"""
    greedy: bool
    """Every target is the most likely token."""


@dataclass
class Sequences:
    """Different inputs of windows, longest first, and which windows each one answers."""

    inputs: list[tuple[int, ...]]
    windows: list[list[int]] = field(repr=False)
    """Indices of windows, by sequence"""
    scored: list[int]
    """Positions at the end of each sequence that some window scores"""

    @classmethod
    def of(cls, windows: Sequence[Window], share: bool = True) -> Sequences:
        """`share` False gives each window a sequence of its own. ValueError for a window without targets, or with more
        of them than inputs.
        """
        found: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, window in enumerate(windows):
            if not 0 < len(window.targets) <= len(window.inputs):
                raise ValueError(f"window {index} has {len(window.inputs)} inputs and {len(window.targets)} targets")
            found.setdefault((tuple(window.inputs), 0 if share else index), []).append(index)
        order = sorted(found, key=lambda key: (-len(key[0]), key))
        asked = [found[key] for key in order]
        return cls([ids for ids, _ in order], asked, [max(len(windows[i].targets) for i in some) for some in asked])

    def batches(self, batch_size: int) -> list[Batch]:
        """Consecutive sequences, padded on the right with token 0. The mask is 1 everywhere: positions after the end
        change nothing before it, and without padding the model needs no mask of its own.
        """
        made = []
        for start in range(0, len(self.inputs), batch_size):
            some = self.inputs[start : start + batch_size]
            ids = torch.zeros(len(some), len(some[0]), dtype=torch.int64)
            for row, sequence in enumerate(some):
                ids[row, : len(sequence)] = torch.tensor(sequence)
            made.append(Batch(ids, torch.ones_like(ids)))
        return made

    def rows(self, start: int, stop: int, width: int) -> Tensor:
        """Rows of [B*width] that are scored, of the sequences start..stop, in order."""
        spans = [(len(self.inputs[i]), self.scored[i], (i - start) * width) for i in range(start, stop)]
        return torch.cat([torch.arange(end - count, end) + offset for end, count, offset in spans])


@torch.no_grad()
def score(
    checkpoint: Checkpoint,
    windows: Sequence[Window],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    softmax: torch.dtype | None = torch.float32,
    vocab: int | None = None,
    track: Track | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[Scores]:
    """Scores of each window, in the order given.

    `dtype` is what the model computes in (the checkpoint's by default), `softmax` what log-probabilities are computed
    in (None: what the logits are in). `vocab` leaves out logits beyond the first so many. `note` gets lines for a
    report. Errors as of `sweep`.
    """
    if not windows:
        return []
    sequences = Sequences.of(windows)
    swept = sweep(checkpoint, sequences.batches(batch_size), device=device, dtype=dtype, track=track)
    for _ in swept:
        pass
    for line in swept.report():
        note(line)
    answers = _Answers(windows, sequences, rows_per_piece(checkpoint.facts.vocab))
    with swept.head() as head:
        for start, stop, hidden_BSD in parts(swept):
            answers.add(start, stop, hidden_BSD, lambda rows: head(rows)[:, :vocab].log_softmax(-1, dtype=softmax))
    swept.flow.shelf.close()
    return answers.found()


@torch.no_grad()
def score_whole(
    network: nn.Module,
    windows: Sequence[Window],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    softmax: torch.dtype | None = torch.float32,
    vocab: int | None = None,
    track: Callable[[Sequence[Batch], str], Iterable[Batch]] = lambda items, label: items,
) -> list[Scores]:
    """As `score`, of a model in memory and in the same batches: the same numbers up to rounding."""
    if not windows:
        return []
    sequences = Sequences.of(windows)
    answers, start = _Answers(windows, sequences, HEAD_ROWS), 0
    for batch in track(sequences.batches(batch_size), "scoring"):
        logits_BSV = network(input_ids=batch.input_ids.to(device), use_cache=False).logits
        stop = start + len(batch.input_ids)
        answers.add(start, stop, logits_BSV, lambda rows: rows[:, :vocab].log_softmax(-1, dtype=softmax))
        start = stop
    return answers.found()


def parts(swept: Sweep) -> Iterator[tuple[int, int, Tensor]]:
    """(first sequence, end, hidden state [B, S, D] on the device) of each micro-batch."""
    start = 0
    swept.flow.shelf.settle()
    for index, batch in enumerate(swept.flow.batches):
        stop = start + len(batch.input_ids)
        yield start, stop, swept.flow.here(index)
        start = stop


def rows_per_piece(vocabulary: int) -> int:
    """Rows of logits held at a time."""
    return max(1, min(HEAD_ROWS, HEAD_BYTES // (4 * vocabulary)))


def pieces(rows: Tensor, size: int) -> Iterable[tuple[int, Tensor]]:
    """(first, rows) of `size` rows at a time."""
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


class _Answers:
    """Gathers what the head says, on the device until the end."""

    def __init__(self, windows: Sequence[Window], sequences: Sequences, piece: int) -> None:
        self._windows, self._sequences, self._piece = windows, sequences, piece
        self._order: list[int] = []
        self._pairs: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._greedy: list[Tensor] = []
        self._seen = 0

    def add(self, start: int, stop: int, hidden_BSD: Tensor, logprobs: Callable[[Tensor], Tensor]) -> None:
        """Score what sequences start..stop are asked for; `logprobs` is [N, ...] -> [N, vocabulary]."""
        row_R = self._sequences.rows(start, stop, hidden_BSD.shape[1])
        pair_P, target_P = self._asked(start, stop)
        sorted_P, order_P = torch.sort(pair_P, stable=True)
        target_P = target_P[order_P].to(hidden_BSD.device, non_blocking=True)
        flat = hidden_BSD.flatten(0, 1)
        for first, rows in pieces(row_R.to(flat.device, non_blocking=True), self._piece):
            here = slice(*torch.searchsorted(sorted_P, torch.tensor([first, first + len(rows)])).tolist())
            local_P = (sorted_P[here] - first).to(flat.device, non_blocking=True)
            logprob_RV = logprobs(flat[rows])
            self._logprobs.append(logprob_RV[local_P, target_P[here]])
            self._greedy.append(logprob_RV.argmax(-1)[local_P] == target_P[here])
        self._pairs.append(order_P + self._seen)
        self._seen += len(order_P)

    def _asked(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """For each target its place among the scored rows, and itself."""
        places, targets, base = [], [], 0
        for sequence in range(start, stop):
            count = self._sequences.scored[sequence]
            for index in self._sequences.windows[sequence]:
                wanted = self._windows[index].targets
                self._order.append(index)
                places.append(torch.arange(base + count - len(wanted), base + count))
                targets.append(torch.tensor(wanted))
            base += count
        return torch.cat(places), torch.cat(targets)

    def found(self) -> list[Scores]:
        place = torch.cat(self._pairs)
        logprob, greedy = (torch.cat(some).cpu() for some in (self._logprobs, self._greedy))
        logprob, greedy = (torch.empty_like(some).index_copy_(0, place, some) for some in (logprob, greedy))
        lengths = [len(self._windows[index].targets) for index in self._order]
        split = zip(logprob.split(lengths), greedy.split(lengths), strict=True)
        by_window = {index: Scores(p, bool(g.all())) for index, (p, g) in zip(self._order, split, strict=True)}
        return [by_window[index] for index in range(len(self._windows))]
