"""More bits for experts that are used often, weigh much and suffer from rounding, layer by layer (PMQ).

An expert e of a layer at b bits costs 1000 * phi^alpha * w^beta * eps_b^gamma, with phi its share of the layer's
assignments, w its share of the router's probability over them (softmax over all experts, before the chosen ones are
renormalized; sigmoid scores for sigmoid routers), and eps_b = sum over batches of ||Z - Z_eb||_F, Z the output of the
MoE block and Z_eb the same with e alone rounded to b bits. The sum of bits of a layer is at most E times `average`, and
one expert or more is at the largest number of bits and one at the next.

eps depends on `batch_size`, for norms of batches are added and not squares: 8 sequences, as published. Only the
expert's own tokens are run again (`engine.rounding`), which is exact. Rounding is to nearest, on the symmetric grid
that `quantize/...` writes unless options say otherwise; with 1 bit the sign times mean |w| of a group on both. Experts
that no token reached cost nothing and get the fewest bits.

Source: arXiv 2410.06270 (MC-MoE, section 3.2) and 2510.10962 (MC#). Exponents 1, 1.5, 1 give the
published maps (the released option says gamma 2 and is never read).

- run: allocate/pmq
  with: {average: 2.0, bits: [1, 2, 3]}       # the published choice
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import BitPlan, CalibrationStats, CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.engine.data import batches_of
from moecli.engine.rounding import RoundingErrors
from moecli.engine.sweep import sweep
from moecli.methods.allocate import Measuring, measured, solve
from moecli.ops.precision import PMQ_EXPONENTS, pmq_cost

Exponent = Annotated[float, Field(ge=0)]


class Pmq(Measuring):
    """Options of `allocate/pmq`."""

    scope: Literal["layer", "model"] = "layer"
    """`layer` keeps `average` in every layer, as published; `model` over all of them together, which compares costs
    of different layers."""
    at_least: Literal["upper_two", "none"] = "upper_two"
    """`upper_two`: in every layer one expert or more at the largest of `bits` and one at the next."""
    alpha: Exponent = PMQ_EXPONENTS[0]
    """Exponent of how often an expert is used."""
    beta: Exponent = PMQ_EXPONENTS[1]
    """Exponent of its router probability."""
    gamma: Exponent = PMQ_EXPONENTS[2]
    """Exponent of its error."""
    batch_size: PositiveInt = 8
    """Sequences whose error is one norm."""


@stage("allocate/pmq", version=1, needs=("prob_routed",))
def pmq(opt: Pmq, stats: CalibrationStats, text: CalibrationText, model: Checkpoint, ctx: Context) -> BitPlan:
    settings = {"what": "norms", "batch_size": opt.batch_size}
    eps = measured(lambda: _norms(opt, text, model, ctx), opt, text, ctx, **settings)
    exponents = (opt.alpha, opt.beta, opt.gamma)
    cost = {
        layer: pmq_cost(stats[layer].count_E.tolist(), stats[layer]["prob_routed"].tolist(), eps[layer], exponents)
        for layer in model.facts.moe_layers
    }
    if unused := sum(int((stats[layer].count_E == 0).sum()) for layer in cost):
        ctx.note(f"{unused} experts saw no token: they cost nothing and get the fewest bits")
    return solve(cost, opt, model, ctx)


def _norms(opt: Pmq, text: CalibrationText, model: Checkpoint, ctx: Context) -> dict[int, Tensor]:
    """{layer: sum over batches of ||Z - Z_eb||_F, float64 [E, levels]}"""
    batches = batches_of(text, opt.batch_size)
    ends_B = torch.tensor(list(accumulate(int(batch.counted.sum()) for batch in batches)))
    swept = sweep(model, batches, device=ctx.device, track=ctx.track, statistics=opt.held())
    found = {}
    for layer in swept:
        if layer.is_moe:
            errors = RoundingErrors(layer.parts.experts, opt.levels(), opt.rounding_of(layer), ends_B)
            found[layer.index] = layer.observe([errors])[errors.name].sqrt().sum(0)
    for line in swept.report():
        ctx.note(line)
    return found
