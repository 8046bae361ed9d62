"""Token batches of data sets, by the model's own tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.engine.data.reading import Render, documents
from moecli.engine.data.rules import PRESETS, RULES, Encoder, TokenizerEncoder
from moecli.engine.data.sources import TextSource, sources_of
from moecli.families.adapter import load_tokenizer


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and mask of some sequences, both int64 [B, S]; the mask is 0 on padding."""

    input_ids: Tensor
    attention_mask: Tensor
    left_out: Tensor | None = None
    """bool [B, S], True for tokens that run as all others do and that no statistic counts; None when there are none."""

    @property
    def counted(self) -> Tensor:
        """bool [B, S], True for tokens that statistics count."""
        valid = self.attention_mask != 0
        return valid if self.left_out is None else valid & ~self.left_out

    def part(self, start: int, stop: int) -> Batch:
        """Some consecutive sequences."""
        left_out = None if self.left_out is None else self.left_out[start:stop]
        return Batch(self.input_ids[start:stop], self.attention_mask[start:stop], left_out)


def batches_of(text: CalibrationText, batch_size: int, leave_out: Collection[int] = ()) -> list[Batch]:
    """Consecutive samples, `batch_size` at a time; no statistic counts tokens with an id of `leave_out`."""
    ids = torch.tensor(sorted(leave_out), dtype=torch.int64)
    whole = Batch(text.ids, text.mask, torch.isin(text.ids, ids) if leave_out else None)
    return [whole.part(start, start + batch_size) for start in range(0, len(text.ids), batch_size)]


def tokenise(
    dataset: str | Sequence[TextSource],
    model: Checkpoint,
    *,
    samples: int,
    tokens_per_sample: int,
    field: str = "text",
    packing: str = "pack",
    seed: int = 0,
    draw: int = 0,
) -> CalibrationText:
    """`samples` sequences of `tokens_per_sample` tokens of data sets, by the model's own tokenizer.

    `packing` names one of `RULES`. Several data sets give their `shares`, in the order they are named. The same
    arguments give the same tokens. Draw 1 goes on where draw 0 stopped, by the same rule, and so on; a later
    draw is shorter where the text is used up.

    SurroundingsError when data, tokenizer or chat template are missing, when the text is too short, or when a
    sample is longer than the model's positions.
    """
    limit = model.facts.max_positions
    if tokens_per_sample > limit:
        raise SurroundingsError(
            f"`tokens_per_sample` must be at most the model's {limit} positions, got {tokens_per_sample}",
            hint=f"write `tokens_per_sample: {limit}`",
        )
    tokenizer = load_tokenizer(model)
    encoder, render = TokenizerEncoder(tokenizer), _renderer(tokenizer)
    sources = sources_of(dataset)
    rows: list[list[int]] = []
    for source, count in zip(sources, shares(sources, samples), strict=True):
        texts = documents(source, field, keep_empty=packing in PRESETS, render=render) if count else []
        found = _drawn(encoder, texts, packing, count, tokens_per_sample, seed, draw)
        if draw == 0:
            _refuse_short(found, count, tokens_per_sample, source.dataset if len(sources) > 1 else "the text")
        rows += found
    ids, mask = _padded(rows, tokens_per_sample, tokenizer)
    return CalibrationText(ids, mask, digest_of(ids, mask))


def _drawn(
    encoder: Encoder, texts: Sequence[str], packing: str, count: int, length: int, seed: int, draw: int
) -> list[list[int]]:
    own = PRESETS[packing].seed if packing in PRESETS else 0
    return list(islice(RULES[packing](encoder, texts, count, length, own + seed), draw * count, (draw + 1) * count))


def shares(sources: Sequence[TextSource], samples: int) -> list[int]:
    """Samples of each data set: what it asks for, else its share by weight of what is left (largest remainders,
    ties to the earlier one).
    """
    left = samples - sum(source.samples or 0 for source in sources)
    weights = [0.0 if source.samples else source.weight for source in sources]
    total = sum(weights) or 1.0
    exact = [max(left, 0) * weight / total for weight in weights]
    counts = [int(value) for value in exact]
    order = sorted(range(len(sources)), key=lambda i: counts[i] - exact[i])
    for i in order[: max(left, 0) - sum(counts) if any(weights) else 0]:
        counts[i] += 1
    return [source.samples or count for source, count in zip(sources, counts, strict=True)]


def _renderer(tokenizer: Any) -> Render:
    def render(messages: list[Any]) -> str:
        if not tokenizer.chat_template:
            raise SurroundingsError(
                "the data set holds conversations, and the model's tokenizer has no chat template",
                hint="name a column of plain text as `field`",
            )
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return render


def _padded(rows: Sequence[Sequence[int]], length: int, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """int64 [N, S] ids and mask, padded on the right."""
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    ids = torch.full((len(rows), length), next(i for i in fillers if i is not None), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def digest_of(ids: Tensor, mask: Tensor) -> str:
    """sha256 of a text's ids and mask: `CalibrationText.digest`."""
    total = hashlib.sha256(f"{list(ids.shape)}".encode())
    for tensor in (ids, mask):
        total.update(tensor.contiguous().numpy().astype("<i8").tobytes())
    return total.hexdigest()


def _refuse_short(found: Sequence[Any], samples: int, length: int, source: str) -> None:
    have = len(found)
    if have < samples:
        name = source if source == "the text" else f"`{source}`"
        raise SurroundingsError(
            f"asked for {samples} samples of {length} tokens, {name} gives {have}",
            hint=f"write `samples: {have}`, or name more text"
            if have
            else "lower `tokens_per_sample`, or name more text",
        )
