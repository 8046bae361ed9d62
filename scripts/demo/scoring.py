"""Loss and four-choice accuracy computed directly, for a quick look during training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from scripts.demo.corpus import DOMAINS, END, documents, exercises, stream
from scripts.demo.scenes import Exercise

PROBE_DOCUMENTS = 128


def heldout_losses(model: torch.nn.Module, tokenizer: Tokenizer) -> dict[str, float]:
    """Mean loss in nats per token, by domain."""
    losses = {}
    for domain in DOMAINS:
        texts = list(islice(documents(stream("heldout", domain), domain), PROBE_DOCUMENTS))
        rows = [tokenizer.encode(END + text).ids for text in texts]
        scores = token_scores(model, rows)
        losses[domain] = -sum(float(row.sum()) for row in scores) / sum(len(row) for row in scores)
    return losses


def accuracies(model: torch.nn.Module, tokenizer: Tokenizer, per_domain: int) -> dict[str, dict[str, float]]:
    """Accuracy by domain and kind of question; the key `all` is the domain's mean."""
    table = {}
    for domain in DOMAINS:
        asked = list(islice(exercises(stream("heldout exercises", domain), domain), per_domain))
        table[domain] = _by_kind(asked, _right(model, tokenizer, asked))
    return table


def _by_kind(asked: Sequence[Exercise], right: Sequence[bool]) -> dict[str, float]:
    hits = defaultdict(list)
    for one, hit in zip(asked, right, strict=True):
        hits[one.kind].append(hit)
        hits["all"].append(hit)
    return {kind: sum(marks) / len(marks) for kind, marks in sorted(hits.items())}


def _right(model: torch.nn.Module, tokenizer: Tokenizer, asked: Sequence[Exercise]) -> list[bool]:
    rows, tails = [], []
    for one in asked:
        prompt = tokenizer.encode(one.prompt).ids
        for choice in one.choices:
            tail = tokenizer.encode(" " + choice).ids
            rows.append(prompt + tail)
            tails.append(len(tail))
    scores = token_scores(model, rows)
    sums = [float(row[-tail:].sum()) for row, tail in zip(scores, tails, strict=True)]
    picks = [max(range(4), key=sums[i : i + 4].__getitem__) for i in range(0, len(sums), 4)]
    return [pick == one.label for pick, one in zip(picks, asked, strict=True)]


@torch.no_grad()
def token_scores(model: torch.nn.Module, rows: Sequence[Sequence[int]], batch: int = 256) -> list[Tensor]:
    """Log-probability of every token after the first, row by row."""
    device = next(model.parameters()).device
    scores = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(row) for row in part)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part], device=device)
        logits = model(input_ids=padded).logits[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0].cpu()
        scores += [line[: len(row) - 1] for line, row in zip(picked, part, strict=True)]
    return scores
