"""Measure what is left. Each stage runs on the source model too, so that every number has its baseline.

Here: what the stages share that score text of one's own. Their documents are scored as lm-eval's rolling
log-likelihood does it: every token once, the first after BOS (EOS without BOS), later windows filled with as much left
context as fits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import PositiveInt

from moecli.core.artifacts import Checkpoint, Column, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, RunSetting
from moecli.engine.data import identity, parse, pinned, read_rows, spec_text
from moecli.engine.scorer import Window, score, score_whole
from moecli.families.adapter import load_model
from moecli.ops.scoring import ratio, rolling_windows

_SHOWN = 40
"""Characters of a document that a message shows."""


class OnText(Options):
    """Options of an evaluation on text of one's own."""

    dataset: str
    """A local json, jsonl, parquet or txt file (also .gz), `demo`, or a hub data set `org/name[config](split)`."""
    field: str = "text"
    """Column that holds the text."""
    documents: PositiveInt | None = None
    """First documents only."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's. Many CPUs are much faster in `float32`."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Windows per forward pass."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        """A hub data set gets the commit its revision stands for."""
        return self.model_copy(update={"dataset": spec_text(pinned(parse(self.dataset)))})

    def identity(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        return {"dataset": identity(parse(self.dataset), digest)}

    def ready(self) -> None:
        read_rows(self.dataset, self.field)

    def texts(self) -> list[str]:
        """The documents that hold anything. StageFailed when none does."""
        found = [text for text in read_rows(self.dataset, self.field)[: self.documents] if text]
        if not found:
            raise StageFailed(f"`{self.dataset}` has no text in its column `{self.field}`")
        return found

    def dtype_of(self, model: Checkpoint) -> str:
        """Name of the precision to compute in."""
        return model.facts.dtype if self.dtype == "auto" else self.dtype


class Scoring(OnText):
    """Options of an evaluation of one model on text of one's own."""

    backend: Annotated[Literal["memory", "streamed"], RunSetting()] = "memory"
    """`streamed` runs the model layer by layer: for models larger than the device. The numbers are the same up to
    rounding."""


def window_problem(window: int | None, model: ModelFacts, least: int = 2) -> Iterator[Problem]:
    """The option `window` against the model's positions."""
    if window is not None and not least <= window <= model.max_positions:
        yield Problem(
            "window",
            f"`window` must be between {least} and the model's {model.max_positions} positions, got {window}",
            hint=f"write `window: {model.max_positions}`",
        )


@dataclass(frozen=True)
class Documents:
    """Texts as rolling windows, `owner` says which document each is part of."""

    texts: Sequence[str]
    windows: Sequence[Window]
    owner: Sequence[int]

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Any, length: int) -> Documents:
        """As lm-eval encodes them: with the special tokens that the tokenizer adds by itself."""
        return cls.encoded(texts, [tokenizer.encode(text) for text in texts], prefix_of(tokenizer), length)

    @classmethod
    def encoded(cls, texts: Sequence[str], ids: Sequence[Sequence[int]], prefix: int, length: int) -> Documents:
        found = [(i, Window(*some)) for i, tokens in enumerate(ids) for some in rolling_windows(tokens, prefix, length)]
        return cls(texts, [window for _, window in found], [i for i, _ in found])

    def sums(self, values: Iterable[torch.Tensor]) -> list[float]:
        """Sum of one value per target over each document, from one tensor per window."""
        totals: list[list[float]] = [[] for _ in self.texts]
        for owner, value in zip(self.owner, values, strict=True):
            totals[owner].append(float(value.double().sum()))
        return [math.fsum(some) for some in totals]

    def loglikelihoods(self, values: Iterable[torch.Tensor], of: str = "the model") -> list[float]:
        """`sums` of log-probabilities. StageFailed names the first document where they are NaN."""
        sums = self.sums(values)
        refuse_nan(sums, self.texts, of)
        return sums

    @property
    def tokens(self) -> list[int]:
        """Targets of each document."""
        counts = [0] * len(self.texts)
        for owner, window in zip(self.owner, self.windows, strict=True):
            counts[owner] += len(window.targets)
        return counts

    @property
    def bytes(self) -> list[int]:
        """UTF-8 bytes of each document."""
        return [len(text.encode()) for text in self.texts]

    @property
    def names(self) -> tuple[str, ...]:
        """`number:digest` of each document."""
        return tuple(f"{i}:{hashlib.sha256(t.encode()).hexdigest()[:16]}" for i, t in enumerate(self.texts))


def log_probabilities(
    opt: Scoring, model: Checkpoint, windows: Sequence[Window], ctx: Context, vocab: int | None = None
) -> list[torch.Tensor]:
    """Natural-log probabilities of each window's targets, float32, by the backend that the options name."""
    dtype = getattr(torch, opt.dtype_of(model))
    if opt.backend == "memory":
        network = load_model(model, ctx.device, dtype)
        found = score_whole(
            network, windows, batch_size=opt.batch_size, device=ctx.device, vocab=vocab, track=ctx.track
        )
    else:
        found = score(
            model, windows, batch_size=opt.batch_size, device=ctx.device, dtype=dtype, vocab=vocab,
            track=ctx.track, note=ctx.note,
        )  # fmt: skip
    return [scores.logprob_T for scores in found]


def prefix_of(tokenizer: Any) -> int:
    """What the first token of a document is conditioned on."""
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)


def refuse_nan(values: Sequence[float], texts: Sequence[str], of: str = "the model") -> None:
    """StageFailed names the first document whose value is NaN."""
    for number, (value, text) in enumerate(zip(values, texts, strict=True)):
        if math.isnan(value):
            raise StageFailed(
                f"{of}'s logits are NaN in document {number}, which begins `{text[:_SHOWN]}`",
                hint="`moecli verify MODEL` checks the weights; a wider `dtype` helps where they overflow",
            )


def metric_of(task: str, name: str, column: Column, better: bool | None = False) -> Metric:
    """A column's total and its standard error over documents (by linearisation)."""
    sign = 1 if column.form == "mean" else -1
    value, error = ratio([sign * v for v in column.values], column.weights or [1.0] * len(column.values))
    if column.form == "bits":
        value, error = value / math.log(2), None if error is None else error / math.log(2)
    elif column.form == "perplexity":
        value = math.exp(value)
        error = None if error is None else error * value
    return Metric(task, name, value, error, len(column.values), better)
