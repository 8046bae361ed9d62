"""How fast the source and the result could run on named GPUs: `ops.roofline` on the headers of both. Estimates only."""

from __future__ import annotations

from collections.abc import Iterator

from moecli.core.errors import MoecliError
from moecli.core.model import ModelSketch
from moecli.families.count import count_of
from moecli.ops.roofline import GPUS, Gpu, ModelCount, decode, prefill
from moecli.runner.report import SpeedEstimate

CONTEXT = 2048
"""Tokens of the prompts, and of the context that decode goes on from."""
STEPS = (("decode", 1), ("decode", 8), ("prefill", 1))
"""What is estimated, with its batch size."""


def estimates(source: ModelSketch, result: ModelSketch | None = None) -> tuple[SpeedEstimate, ...]:
    """Of every GPU and step; empty where the headers do not tell the parts of the source."""
    before, after = _counted(source), None if result is None else _counted(result)
    return () if before is None else tuple(_rows(before, after))


def _counted(sketch: ModelSketch) -> ModelCount | None:
    """None also for a form of quantization that moecli does not read: then there is nothing to estimate from."""
    try:
        return count_of(sketch)
    except MoecliError:
        return None


def _rows(before: ModelCount, after: ModelCount | None) -> Iterator[SpeedEstimate]:
    for gpu in GPUS:
        for what, batch in STEPS:
            old = _step(before, gpu, what, batch)
            new = None if after is None else _step(after, gpu, what, batch)
            yield SpeedEstimate(
                gpu=gpu.name, what=what, batch=batch, tokens=CONTEXT,
                before=old[0], before_bytes=old[1],
                after=new[0] if new else None, after_bytes=new[1] if new else None,
            )  # fmt: skip


def _step(count: ModelCount, gpu: Gpu, what: str, batch: int) -> tuple[float, int]:
    found = (decode if what == "decode" else prefill)(count, gpu, batch, CONTEXT)
    return found.tokens_per_s, round(found.memory_bytes)
