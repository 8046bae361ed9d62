"""Perplexity of a text in both forms in use, each under its own name.

`rolling`: lm-eval's word_perplexity, byte_perplexity and bits_per_byte; documents apart, every token scored once,
the first after BOS. `windowed`: what compression papers call WikiText-2 PPL; documents joined by a blank line,
consecutive blocks of `window` tokens without BOS, exp of the mean over tokens. The two are not comparable.

Source: lm-evaluation-harness; windowed form as in GPTQ's and SparseGPT's published code.

- run: eval/perplexity
  with: {dataset: test.jsonl}
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import PositiveInt

from moecli.core.artifacts import Checkpoint, Column, Evaluation, Items
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.engine.scorer import Window
from moecli.families.adapter import load_tokenizer, tokenizer_digest
from moecli.methods.eval import Documents, Scoring, log_probabilities, metric_of, refuse_nan, window_problem
from moecli.ops.scoring import block_windows

TASK = "perplexity"


class Perplexity(Scoring):
    """Options of `eval/perplexity`."""

    window: PositiveInt | None = None
    """Tokens in a window, for both forms; the model's positions, at most 2048, by default."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        return window_problem(self.window, model)


@stage("eval/perplexity", version=2, on_source_too=True)
def perplexity(opt: Perplexity, model: Checkpoint, ctx: Context) -> Evaluation:
    texts = opt.texts()
    length = opt.window or min(model.facts.max_positions, 2048)
    tokenizer = load_tokenizer(model)
    rolling = Documents.of(texts, tokenizer, length)
    joined = tokenizer.encode("\n\n".join(texts), add_special_tokens=False)
    blocks = [Window(*block) for block in block_windows(joined, length)]
    if not blocks:
        raise StageFailed(f"`{opt.dataset}` has {len(joined)} tokens, a window is {length}", hint="lower `window`")

    found = log_probabilities(opt, model, [*rolling.windows, *blocks], ctx)
    count = len(rolling.windows)
    sums = rolling.loglikelihoods(found[:count])
    block_sums = [float(value.double().sum()) for value in found[count:]]
    refuse_nan(block_sums, [tokenizer.decode(block.inputs) for block in blocks])
    columns = _rolling(sums, rolling)
    windowed = Column("perplexity", tuple(block_sums), (length - 1.0,) * len(blocks))
    metrics = [metric_of(TASK, name, column) for name, column in columns.items()]
    metrics.append(metric_of(TASK, f"perplexity (windowed {length})", windowed))
    settings = {
        "dataset": opt.dataset, "window": length, "documents": len(texts), "dtype": opt.dtype_of(model),
        "tokenizer": tokenizer_digest(tokenizer),
    }  # fmt: skip
    return Evaluation(tuple(metrics), settings, items=(Items(TASK, rolling.names, rolling.names, columns),))


def _rolling(sums: list[float], documents: Documents) -> dict[str, Column]:
    in_bytes = tuple(map(float, documents.bytes))
    words = tuple(float(len(text.split())) for text in documents.texts)
    return {
        "bits_per_byte (rolling)": Column("bits", tuple(sums), in_bytes),
        "byte_perplexity (rolling)": Column("perplexity", tuple(sums), in_bytes),
        "word_perplexity (rolling)": Column("perplexity", tuple(sums), words),
    }
