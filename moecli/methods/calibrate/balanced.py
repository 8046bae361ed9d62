"""Choose calibration text that reaches all experts evenly, among more samples than are kept.

`pool` times as many samples are drawn and run through the model once; then samples are taken one by one, each the one
that makes the shares of experts most even over all layers (`ops.balance`). If the first samples are as even, they stay.
The report says how uneven experts are with the first samples and with those chosen: the mean over layers of the
standard deviation of their shares, MoEQuant's measure.

MoEQuant makes text of its own with the model, by a beam search that rewards balance; the term is not published in a
form that could be checked, and its text for Mixtral begins with repetition. Choosing among real text is ours. Its other
half, Hessians weighed by the router's weights, is `hessian: affinity` of `quantize/gptq`. EAQuant (arXiv 2506.13329)
draws more text until each expert has enough, which is `min_tokens_per_expert` of `calibrate/statistics`.

Source: the aim and the measure of MoEQuant (arXiv 2505.03804); the choice is ours.

- run: calibrate/balanced
  with: {dataset: calibration.jsonl, samples: 128, pool: 4}
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import RunSetting, stage
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of, digest_of
from moecli.engine.sweep import sweep
from moecli.methods.calibrate import TextOptions, text_of
from moecli.ops.balance import balanced, unevenness


class Balanced(TextOptions):
    """Options of `calibrate/balanced`."""

    pool: Annotated[int, Field(ge=2)] = 4
    """Samples to choose from, in multiples of `samples`; fewer where the text is used up."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in; `auto` is the checkpoint's. Many CPUs are much faster in `float32`."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""


@stage("calibrate/balanced", version=1)
def balanced_text(opt: Balanced, model: Checkpoint, ctx: Context) -> CalibrationText:
    opt.ready()
    draws = [text_of(opt, model, ctx, draw) for draw in range(opt.pool)]
    ids, mask = (torch.cat([getattr(draw, name) for draw in draws]) for name in ("ids", "mask"))
    text = CalibrationText(ids, mask, digest_of(ids, mask))
    count_NLE = visits(opt, text, model, ctx)
    chosen = balanced(count_NLE, opt.samples)
    before, after = (unevenness(count_NLE[some].sum(0)) for some in (slice(0, opt.samples), chosen))
    ctx.record("unevenness", {"first": before, "chosen": after})
    ctx.note(
        f"of {len(ids)} samples {len(chosen)} were chosen: the standard deviation of experts' shares is {after:.4f}, "
        f"with the first ones {before:.4f} (mean of {count_NLE.shape[1]} layers, 1/E is {1 / count_NLE.shape[2]:.4f})"
    )
    return CalibrationText(ids[chosen], mask[chosen], digest_of(ids[chosen], mask[chosen]))


def visits(opt: Balanced, text: CalibrationText, model: Checkpoint, ctx: Context) -> Tensor:
    """int64 [N, L, E]: how many tokens of each sample each expert of each MoE layer got. Fewer experts: zeros."""
    swept = sweep(
        model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track,
        dtype=None if opt.dtype == "auto" else getattr(torch, opt.dtype),
    )  # fmt: skip
    samples, experts = len(text.ids), model.facts.experts
    sample_T = torch.arange(samples).repeat_interleave(text.mask.sum(1))
    found = []
    for layer in swept:
        if layer.is_moe:
            index_Tk = layer.observe(collectors(["topk_idx"]))["topk_idx"].long()
            place_Tk = (sample_T[:, None] * experts + index_Tk)[index_Tk >= 0]
            found.append(torch.bincount(place_Tk, minlength=samples * experts).view(samples, experts))
            if len(found) == len(model.facts.moe_layers):
                break
    for line in swept.report():
        ctx.note(line)
    return torch.stack(found, 1)
