"""Set weights to zero column by column and let the columns behind make the loss good (SparseGPT).

Unstructured or N:M, in all experts of a layer at once. H is the second moment of what goes into a matrix over the
tokens routed to its expert, with `damp` of its mean diagonal added. What goes is chosen in blocks of 128 columns over
all outputs, or in each group of N:M: the lowest w^2 / [H^-1]_jj among columns that are left. Inputs that were always
zero lose their weights first. Layers are made sparse in order and each sees what the sparse ones before it make; the
matrices of one layer see its dense form.

An expert with n < 2 C tokens for C inputs has (1 - g) of its own H and g = C / (C + n) of the layer's over all tokens;
for down, whose inputs no two experts share, of a multiple of the identity. Such experts are counted in the report, and
so are matrices whose H has no Cholesky factor at 100 times the damping: their smallest weights go, nothing is made
good.

The model gets no smaller: zeros are stored like any weight.

Source: arXiv 2301.00774, algorithm 1. The share of other inputs for experts with few tokens is ours.

- run: slim/sparsegpt
  with: {sparsity: "2:4"}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationText, Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.stage import RunSetting, stage
from moecli.engine.data import batches_of
from moecli.engine.sweep import SweptLayer, sweep
from moecli.families import family_of
from moecli.methods.matrices import (
    GRAMS,
    MATRICES,
    Heard,
    Sparse,
    added,
    input_moments,
    keep_counts,
    kept_counts,
    note_moments,
    observed_grams,
    report_zeros,
    slabs,
    write_zeros,
)
from moecli.ops.gptq import DAMPS, factor
from moecli.ops.sparsity import sparsegpt as solve


class Sparsegpt(Sparse):
    """Options of `slim/sparsegpt`."""

    damp: Annotated[float, Field(gt=0)] = 0.01
    """Share of H's mean diagonal that is added to its diagonal."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""


@stage("slim/sparsegpt", version=1)
def sparsegpt(opt: Sparsegpt, text: CalibrationText, model: Checkpoint, ctx: Context) -> Checkpoint:
    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=GRAMS)
    counts = []
    with ctx.writer(model) as out:
        for layer in swept:
            if not layer.is_moe:
                continue

            name, made = f"layer-{layer.index:03d}", dict[str, Tensor]()

            def write(part: PartWriter, layer: SweptLayer = layer, made: dict[str, Tensor] = made) -> None:
                heard = Heard(part)
                keep_counts(ctx, layer.index, _write(heard, layer, opt, model, ctx))
                made.update(heard.values)

            finished = out.has_part(name)
            out.part(name, write)
            counts.append(kept_counts(ctx, layer.index))
            layer.rewrite(out.read_part(name) if finished else made)
    for line in swept.report():
        ctx.note(line)
    total = added(counts)
    note_moments(total, ctx)
    if total["unfactored"]:
        ctx.note(
            f"{total['unfactored']} matrices lost their smallest weights, and nothing was made good: the second moment "
            "of their inputs has no Cholesky factor"
        )
    report_zeros(model, opt, ctx)
    return out.checkpoint


def _write(part: PartWriter, layer: SweptLayer, opt: Sparsegpt, model: Checkpoint, ctx: Context) -> dict[str, float]:
    """Make the experts of a layer sparse; counts for the report."""
    experts = family_of(model.config).read_experts(model, layer.index)
    found, new, counts = observed_grams(layer), {}, []
    for into in ("x", "h"):
        seen = input_moments(layer, into, found)
        fields = [field for field, of in MATRICES.items() if of == into]
        solved, failed = _solved([getattr(experts, field) for field in fields], seen.value_ECC, opt, ctx.device)
        new |= dict(zip(fields, solved, strict=True))
        counts.append({"own": seen.own, "mixed": seen.mixed, "unseen": seen.unseen, "unfactored": failed})
    return added([*counts, write_zeros(part, model, layer.index, experts, new, opt)])


def _solved(
    weights: Sequence[Tensor], moment_ECC: Tensor, opt: Sparsegpt, device: torch.device
) -> tuple[list[Tensor], int]:
    """Sparse forms of some stacks [E, R, C] with the same inputs, and how many matrices had no factor."""
    inputs, failed = moment_ECC.shape[-1], 0
    pieces: list[list[Tensor]] = [[] for _ in weights]
    for some in slabs(len(moment_ECC), 4 * (6 * inputs**2 + 6 * max(w[0].numel() for w in weights))):
        moment = moment_ECC[some]
        found = factor(moment, opt.damp, act_order=False)
        failed += len(weights) * int((found.tries_E == len(DAMPS)).sum())
        live_E1C = (moment.diagonal(dim1=-2, dim2=-1) > 0)[:, None]
        for weight_ERC, made in zip(weights, pieces, strict=True):
            sparse = solve(weight_ERC[some].to(device) * live_E1C, found.upper_ECC, opt.zeros)
            made.append(sparse.to(weight_ERC))
    return [torch.cat(made) for made in pieces], failed
