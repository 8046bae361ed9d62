"""Measure how fast a model generates on this machine, and how much memory that takes.

The whole model is on the device, run by transformers as it comes. What is packed is dequantized, so that a packed model
is as fast as its dense twin, unless `memory: packed` has experts of 2, 3 and 4 bits stay packed, as `runtime.packed`
runs them; the source model beside it is what it is. Prompts are random tokens, since time does not depend on the text
but on which experts it reaches: random tokens reach more experts than text does.

    prefill tokens/s   batch * prompt / time of one forward pass over the prompts that gives the last logits
    decode tokens/s    batch / time of one further token on a cache of the prompt, greedy
    peak memory        on CUDA allocated bytes at the most, weights included; on the CPU none is given

Each is the median of `repeats` runs after one that does not count, for each batch size on its own; its standard error
takes the runs for normal ones. The device's bandwidth is measured too, by copying, beside what the data sheet says.
Numbers of different machines are kept apart: the name of the device is part of the stage's key. That is the GPU where
there is one, so after a change of `--device` on such a machine the stage needs `--redo`.

- run: eval/speed
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint, Evaluation, Metric
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts
from moecli.core.stage import Options, stage
from moecli.families.adapter import load_model
from moecli.ops.roofline import gpu_of

COPY_BYTES = 1 << 30
"""Copied to measure bandwidth on CUDA; a sixteenth of it on the CPU."""


class Speed(Options):
    """Options of `eval/speed`."""

    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] = (1, 8)
    """Sequences that run at the same time."""
    prompt: PositiveInt = 512
    """Tokens of each prompt."""
    new_tokens: PositiveInt = 32
    """Tokens generated for each run of decode."""
    repeats: PositiveInt = 5
    """Timed runs; the median counts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to run in; `auto` is the checkpoint's."""
    memory: Literal["dense", "packed"] = "dense"
    """Experts that are packed to 2, 3 or 4 bits are dequantized while loading, or stay packed: then the model is loaded
    to the CPU first, dense."""

    def identity(self, digest: Callable[..., str]) -> dict[str, Any]:
        return {"device": device_name()}

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.prompt + self.new_tokens > model.max_positions:
            yield Problem(
                "prompt",
                f"`prompt` and `new_tokens` must fit in the model's {model.max_positions} positions together, "
                f"got {self.prompt} + {self.new_tokens}",
                hint=f"write `prompt: {max(1, model.max_positions - self.new_tokens)}`",
            )


def device_name() -> str:
    """The device that a run uses when nothing else is asked: the GPU if there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


@stage("eval/speed", version=2, on_source_too=True)
def speed(opt: Speed, model: Checkpoint, ctx: Context) -> Evaluation:
    dtype = model.facts.dtype if opt.dtype == "auto" else opt.dtype
    loaded = _loaded(opt, model, getattr(torch, dtype), ctx)
    here = device_name() if ctx.device.type == "cuda" else f"{platform.machine()} CPU"
    rows = {batch: _measured(loaded, opt, batch, ctx) for batch in ctx.track(opt.batch_sizes, "batch sizes")}
    sheet, copied = gpu_of(here), copy_bandwidth(ctx.device)
    bandwidth = {"measured": copied, "sheet": sheet.bandwidth if sheet else None}
    ctx.record("speed", {"device": here, "dtype": dtype, "prompt": opt.prompt, "bandwidth": bandwidth})
    promised = f", {sheet.bandwidth / 1e9:.0f} GB/s in the {sheet.name}'s data sheet" if sheet else ""
    ctx.note(f"measured on {here}: copying moves {copied / 1e9:.0f} GB/s{promised}")
    settings = {
        "prompt": opt.prompt, "new_tokens": opt.new_tokens, "repeats": opt.repeats, "dtype": dtype, "device": here,
        "memory": opt.memory,
    }  # fmt: skip
    metrics = [metric for batch, found in rows.items() for metric in _metrics(batch, found, opt)]
    return Evaluation(tuple(metrics), settings)


def _loaded(opt: Speed, model: Checkpoint, dtype: torch.dtype, ctx: Context) -> nn.Module:
    if opt.memory == "dense":
        return load_model(model, ctx.device, dtype)
    from moecli.runtime.packed import pack_experts  # imports transformers

    loaded = load_model(model, "cpu", dtype)
    try:
        layers = pack_experts(loaded, model)
    except ValueError as error:
        raise StageFailed(str(error), hint="write `memory: dense`") from error
    ctx.note(f"experts of {layers} layers stay packed" if layers else "no experts are packed: all weights are dense")
    return loaded.to(ctx.device)


class Times(NamedTuple):
    """Of one batch size."""

    prefill_s: tuple[float, ...]
    """Of each run"""
    decode_s: tuple[float, ...]
    """Of each run, for one token of each sequence"""
    peak_bytes: int | None


def _metrics(batch: int, found: Times, opt: Speed) -> Iterator[Metric]:
    work = (("prefill", batch * opt.prompt, found.prefill_s), ("decode", batch, found.decode_s))
    for name, tokens, seconds in work:
        rates = [tokens / s for s in seconds]
        error = 1.2533 * statistics.stdev(rates) / math.sqrt(len(rates)) if len(rates) > 1 else None
        label = f"{name} tokens/s, batch {batch}"
        yield Metric("speed", label, statistics.median(rates), error, len(rates), True)
    if found.peak_bytes is not None:
        label = f"peak memory GiB, batch {batch}"
        yield Metric("speed", label, found.peak_bytes / 2**30, None, len(found.decode_s), False)


@torch.inference_mode()
def _measured(model: nn.Module, opt: Speed, batch: int, ctx: Context) -> Times:
    device, cuda = ctx.device, ctx.device.type == "cuda"
    chosen = torch.Generator().manual_seed(ctx.seed)
    prompt = torch.randint(model.config.get_text_config().vocab_size, (batch, opt.prompt), generator=chosen).to(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runs = [_run(model, prompt, opt.new_tokens, device) for _ in range(opt.repeats + 1)][1:]
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return Times(tuple(prefill for prefill, _ in runs), tuple(decode for _, decode in runs), peak)


def _run(model: nn.Module, prompt: Tensor, new_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the prompts, and of one further token."""
    began = _now(device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    read = _now(device)
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
    return read - began, (_now(device) - read) / new_tokens


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device) -> float:
    """bytes/s that are read and written together when the device copies its own memory, the best of five."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        began = _now(device)
        target.copy_(source)
        best = min(best, _now(device) - began)
    return 2 * size / best
