"""How well the model compresses a text: bits for each character of it.

BPC = total nats / (ln 2 * characters). The token streams of all documents, each with the special tokens that the
tokenizer adds by itself, are one stream, in windows of `window` + 1 tokens, `stride` apart; the first scores all its
tokens, each later one its last `stride`. Context runs on across documents, as published.

Two numbers: `bits_per_character` also scores what is left behind the last whole window, so that every character that
is counted is scored; `bits_per_character (as published)` leaves that tail out and counts its characters all the same,
which makes it too small, the more so the shorter the text. Compare the latter with published tables, which used
bfloat16 and a slow tokenizer (here: the one the model comes with). The very first token has no context and is never
scored.

Source: Compression Represents Intelligence Linearly (arXiv 2404.09937, published code); corrected tail: ours.

- run: eval/bits-per-character
  with: {dataset: test.jsonl}
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import PositiveInt

from moecli.core.artifacts import Checkpoint, Evaluation, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.engine.scorer import Window
from moecli.families.adapter import load_tokenizer, tokenizer_digest
from moecli.methods.eval import Scoring, log_probabilities, refuse_nan, window_problem
from moecli.ops.scoring import strided_windows

TASK = "bits_per_character"


class BitsPerCharacter(Scoring):
    """Options of `eval/bits-per-character`."""

    window: PositiveInt = 1900
    """Tokens the model sees at a time."""
    stride: PositiveInt = 512
    """Tokens that each window but the first adds."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from window_problem(self.window, model)
        if self.stride > self.window:
            yield Problem("stride", f"`stride` must be at most `window` ({self.window}), got {self.stride}")


@stage("eval/bits-per-character", version=1, on_source_too=True)
def bits_per_character(opt: BitsPerCharacter, model: Checkpoint, ctx: Context) -> Evaluation:
    texts, tokenizer = opt.texts(), load_tokenizer(model)
    stream = [token for text in texts for token in tokenizer.encode(text)]
    if len(stream) <= opt.window:
        raise StageFailed(
            f"`{opt.dataset}` has {len(stream)} tokens, the first window needs {opt.window + 1}", hint="lower `window`"
        )
    windows = [Window(*window) for window in strided_windows(stream, opt.window, opt.stride)]
    sums = [float(value.double().sum()) for value in log_probabilities(opt, model, windows, ctx)]
    refuse_nan(sums, [tokenizer.decode(window.inputs) for window in windows])
    whole = 1 + (len(stream) - 1 - opt.window) // opt.stride
    characters = sum(map(len, texts))
    metrics = [
        Metric(TASK, name, -math.fsum(some) / math.log(2) / characters, None, len(texts), False)
        for name, some in ((TASK, sums), (f"{TASK} (as published)", sums[:whole]))
    ]
    settings = {
        "dataset": opt.dataset, "window": opt.window, "stride": opt.stride, "documents": len(texts),
        "dtype": opt.dtype_of(model), "tokenizer": tokenizer_digest(tokenizer),
    }  # fmt: skip
    return Evaluation(tuple(metrics), settings)
