"""Perplexity of a text in both forms in use, each under its own name.

`rolling`: lm-eval's word_perplexity, byte_perplexity and bits_per_byte; documents apart, every token scored once,
the first after BOS. `windowed`: what compression papers call WikiText-2 PPL; documents joined by a blank line,
consecutive blocks of `window` tokens without BOS, exp of the mean over tokens. The two are not comparable.

Source: lm-evaluation-harness; windowed form as in GPTQ's and SparseGPT's published code.

- run: eval/perplexity
  with: {dataset: test.jsonl}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import PositiveInt

from moecli.core.artifacts import Checkpoint, Evaluation, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, RunSetting, stage
from moecli.engine.data import identity as data_identity
from moecli.engine.data import parse, pinned, read_rows, spec_text
from moecli.families.adapter import load_model, load_tokenizer
from moecli.ops.scoring import block_windows, ratio, rolling_windows, target_logprobs


class Perplexity(Options):
    """Options of `eval/perplexity`."""

    dataset: str
    """A local json, jsonl, parquet or txt file (also .gz), `demo`, or a hub data set `org/name[config](split)`."""
    field: str = "text"
    """Column that holds the text."""
    window: PositiveInt | None = None
    """Tokens in a window, for both forms; the model's positions, at most 2048, by default."""
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
        return {"dataset": data_identity(parse(self.dataset), digest)}

    def ready(self) -> None:
        read_rows(self.dataset, self.field)

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.window is not None and not 2 <= self.window <= model.max_positions:
            yield Problem(
                "window",
                f"`window` must be between 2 and the model's {model.max_positions} positions, got {self.window}",
                hint=f"write `window: {model.max_positions}`",
            )


@stage("eval/perplexity", version=1, on_source_too=True)
def perplexity(opt: Perplexity, model: Checkpoint, ctx: Context) -> Evaluation:
    texts = read_rows(opt.dataset, opt.field)[: opt.documents]
    length = opt.window or min(model.facts.max_positions, 2048)
    tokenizer = load_tokenizer(model)
    dtype = model.facts.dtype if opt.dtype == "auto" else opt.dtype
    loaded = load_model(model, ctx.device, getattr(torch, dtype))
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rolling = [list(rolling_windows(tokenizer.encode(t, add_special_tokens=False), prefix, length)) for t in texts]
    blocks = list(block_windows(tokenizer.encode("\n\n".join(texts), add_special_tokens=False), length))
    if not blocks:
        raise StageFailed(f"`{opt.dataset}` has fewer than {length} tokens", hint="lower `window`")

    flat = [window for document in rolling for window in document]
    sums = list(_scores(loaded, flat + blocks, opt.batch_size, ctx))
    document_sums, block_sums = _by_document(sums[: len(flat)], rolling), sums[len(flat) :]
    settings = {"dataset": opt.dataset, "window": length, "documents": len(texts), "dtype": dtype}
    return Evaluation((*_rolling(texts, document_sums), _windowed(block_sums, length)), settings)


def _rolling(texts: list[str], sums: list[float]) -> Iterator[Metric]:
    bits, bits_error = ratio([-s / math.log(2) for s in sums], [len(t.encode()) for t in texts])
    nats, nats_error = ratio([-s for s in sums], [len(t.split()) for t in texts])
    word = math.exp(nats)
    yield Metric("perplexity", "bits_per_byte (rolling)", bits, bits_error, len(texts), False)
    yield Metric(
        "perplexity",
        "byte_perplexity (rolling)",
        2**bits,
        _scaled(bits_error, math.log(2) * 2**bits),
        len(texts),
        False,
    )
    yield Metric("perplexity", "word_perplexity (rolling)", word, _scaled(nats_error, word), len(texts), False)


def _windowed(sums: list[float], length: int) -> Metric:
    nats, error = ratio([-s for s in sums], [length - 1] * len(sums))
    return Metric(
        "perplexity",
        f"perplexity (windowed {length})",
        math.exp(nats),
        _scaled(error, math.exp(nats)),
        len(sums),
        False,
    )


def _scaled(error: float | None, slope: float) -> float | None:
    return None if error is None else error * slope


@torch.inference_mode()
def _scores(
    model: torch.nn.Module, windows: list[tuple[list[int], list[int]]], batch_size: int, ctx: Context
) -> Iterator[float]:
    """Sum of target log-probabilities of each window, right-padded in batches of similar length."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))
    sums = [0.0] * len(windows)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for chunk in ctx.track(chunks, "scoring"):
        width = len(windows[chunk[0]][0])
        ids = torch.zeros(len(chunk), width, dtype=torch.int64)
        mask = torch.zeros(len(chunk), width, dtype=torch.int64)
        for row, index in enumerate(chunk):
            inputs = windows[index][0]
            ids[row, : len(inputs)] = torch.tensor(inputs)
            mask[row, : len(inputs)] = 1
        logits = model(input_ids=ids.to(ctx.device), attention_mask=mask.to(ctx.device), use_cache=False).logits
        totals = [
            target_logprobs(logits[row, : len(windows[i][0])], windows[i][1]).double().sum()
            for row, i in enumerate(chunk)
        ]
        for index, total in zip(chunk, torch.stack(totals).tolist(), strict=True):
            sums[index] = total
    yield from sums


def _by_document(sums: list[float], documents: list[list[tuple[list[int], list[int]]]]) -> list[float]:
    values = iter(sums)
    return [math.fsum(next(values) for _ in windows) for windows in documents]
