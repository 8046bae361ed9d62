"""Text a model predicts for the arithmetic it costs: Information Capacity, and two variants of ours.

IC = (TS - NLL + b) / log2(F)

    TS    mean over samples of 8 * (UTF-8 bytes of tokens 2..n) / (n - 1): bits of text per token
    NLL   mean over all scored tokens of -log2 p(token | before), softmax over the tokenizer's own tokens
    F     operations of decoding one token, averaged over generating `tokens` from an empty context
    b     -24 for `mixed_text`, -18.7 for `ch_fineweb_edu`, -27 otherwise

A sample is the first `tokens` tokens of a document. F is counted from the model's own tensors (`families.work`: real
head size, the routed experts' width, k experts, shared ones, latent attention), so values of MoE models and of models
whose heads are not hidden size / heads wide differ from those of the published code, which takes both from the config
in a simpler way. F does not see precision or how many experts there are, so a smaller model can only lose IC. Two
variants of ours do see it, as `log2` of other denominators; they are no published metric:

    bytes read     (TS - NLL + b) / log2(bytes of weights read to decode one token at batch size 1, as stored)
    bytes stored   (TS - NLL + b) / log2(bytes of all weights, as stored)

Source: arXiv 2511.08066 and its published code; both byte variants: ours.

- run: eval/information-capacity
  with: {dataset: test.jsonl, corpus: mixed_text}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from moecli.core.artifacts import Checkpoint, Evaluation, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.engine.scorer import Window
from moecli.families.adapter import dense, load_tokenizer, tokenizer_digest
from moecli.families.work import decode_bytes, decode_flops
from moecli.methods.eval import Scoring, log_probabilities, refuse_nan

TASK = "information_capacity"
OFFSETS = {"mixed_text": -24.0, "ch_fineweb_edu": -18.7, "other": -27.0}
"""b of each corpus."""


class InformationCapacity(Scoring):
    """Options of `eval/information-capacity`."""

    corpus: Literal["mixed_text", "ch_fineweb_edu", "other"] = "other"
    """What the text is, for the published offset b."""
    tokens: Annotated[int, Field(ge=2)] = 1024
    """Tokens of each document that are used, and tokens generated where operations are counted."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.tokens > model.max_positions:
            yield Problem(
                "tokens",
                f"`tokens` must be at most the model's {model.max_positions} positions, got {self.tokens}",
                hint=f"write `tokens: {model.max_positions}`",
            )


@stage("eval/information-capacity", version=1, on_source_too=True)
def information_capacity(opt: InformationCapacity, model: Checkpoint, ctx: Context) -> Evaluation:
    tokenizer = load_tokenizer(model)
    encoded = ((text, tokenizer.encode(text)[: opt.tokens]) for text in opt.texts())
    samples = [(text, ids) for text, ids in encoded if len(ids) > 1]
    if not samples:
        raise StageFailed(f"no document of `{opt.dataset}` has two tokens", hint="name more text as `dataset`")
    text_size = [8 * len(tokenizer.decode(ids[1:]).encode()) / (len(ids) - 1) for _, ids in samples]
    windows = [Window(ids[:-1], ids[1:]) for _, ids in samples]
    found = log_probabilities(opt, model, windows, ctx, vocab=len(tokenizer))
    bits = [-float(value.double().sum()) / math.log(2) for value in found]
    refuse_nan(bits, [text for text, _ in samples])
    settings = {
        "dataset": opt.dataset, "tokens": opt.tokens, "corpus": opt.corpus, "documents": len(samples),
        "dtype": opt.dtype_of(model), "tokenizer": tokenizer_digest(tokenizer),
    }  # fmt: skip
    metrics = _metrics(text_size, bits, [len(window.targets) for window in windows], opt, model)
    return Evaluation(tuple(metrics), settings)


def _metrics(
    text_size: Sequence[float],
    bits: Sequence[float],
    counts: Sequence[int],
    opt: InformationCapacity,
    model: Checkpoint,
) -> Iterator[Metric]:
    samples = len(bits)
    size, nll = math.fsum(text_size) / samples, math.fsum(bits) / sum(counts)
    gain = size - nll + OFFSETS[opt.corpus]
    error = _error(text_size, bits, counts, size, nll)
    opened = dense(model)
    flops = decode_flops(model.config, {name: opened.spec(name) for name in opened.names()}, opt.tokens)
    weights = decode_bytes(model)
    for name, cost in (
        (TASK, flops),
        (f"{TASK} per bytes read (ours)", weights.read),
        (f"{TASK} per bytes stored (ours)", weights.stored),
    ):
        yield Metric(
            TASK, name, gain / math.log2(cost), None if error is None else error / math.log2(cost), samples, True
        )
    yield Metric(TASK, "text_size (bits per token)", size, None, samples)
    yield Metric(TASK, "nll (bits per token)", nll, None, samples, False)
    yield Metric(TASK, "decode GFLOPs per token", flops / 1e9, None, samples)


def _error(
    text_size: Sequence[float], bits: Sequence[float], counts: Sequence[int], size: float, nll: float
) -> float | None:
    """Standard error of TS - NLL over samples, by linearisation; None for one sample."""
    samples, tokens = len(bits), sum(counts)
    if samples < 2:
        return None
    off = ((s - size) / samples - (b - nll * n) / tokens for s, b, n in zip(text_size, bits, counts, strict=True))
    return math.sqrt(samples / (samples - 1) * math.fsum(value**2 for value in off))
