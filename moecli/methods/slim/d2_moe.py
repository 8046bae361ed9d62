"""One matrix that all experts of a layer share, and a thin difference for each (D2-MoE).

For gate, up and down of each layer: base = sum_e f_e W_e / sum_e f_e, and W_e - base is cut to rank r, nearest on the
tokens that the expert sees, as `slim/svd-llm` does it. f_e is the number of tokens routed to the expert
(`base: frequency`) or 1 (`base: mean`). With E experts the base is 1/E of the numbers; the differences get the rest of
what is `kept`: r = floor((kept - 1/E) O I / (O + I)). The base is stored, and multiplied with a token, once.

Not part of it: the paper's elementwise Fisher information as weights f_e, which needs gradients of all weights; its
pruning of the base; factors shared between experts. Statistics are those of the source model; experts with few tokens
lean on others' inputs as in `slim/svd-llm`, and are counted in the report.

Source: arXiv 2502.17298.

- run: slim/d2-moe
  with: {kept: 0.6}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationText, Checkpoint, ExpertWeights
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import RunSetting, stage
from moecli.engine.data import batches_of
from moecli.engine.sweep import SweptLayer, sweep
from moecli.methods.matrices import GRAMS, LowRank, rank_problem, whitened, write_factored
from moecli.ops.lowrank import Factored, rank_at


class D2Moe(LowRank):
    """Options of `slim/d2-moe`."""

    kept: Annotated[float, Field(gt=0, lt=1)]
    """Part of the routed experts' numbers that base and factors may hold together."""
    base: Literal["frequency", "mean"] = "frequency"
    """Weights of the experts in the base: tokens routed to them, or all alike."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def shape(self, experts: int, outputs: int, inputs: int) -> dict[str, Any]:
        return {"rank": rank_at(self.kept - 1 / experts, outputs, inputs), "base": True, "rows": 0}

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from rank_problem(self.kept, 1 / model.experts, model)


@stage("slim/d2-moe", version=1)
def d2_moe(opt: D2Moe, text: CalibrationText, model: Checkpoint, ctx: Context) -> Checkpoint:
    rank = opt.shape(model.facts.experts, model.facts.expert_width, model.facts.hidden)["rank"]

    def base(weight_EOI: Tensor, count_E: Tensor) -> Tensor:
        alike = opt.base == "mean" or int(count_E.sum()) == 0
        return weighted_mean(weight_EOI, torch.ones_like(count_E) if alike else count_E)

    def make(layer: SweptLayer, experts: ExpertWeights) -> tuple[dict[str, Factored], dict[str, float]]:
        return whitened(layer, experts, base, rank, ctx.device)

    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=GRAMS)
    made = write_factored(model, swept, make, opt, ctx)
    for line in swept.report():
        ctx.note(line)
    return made


def weighted_mean(weight_EOI: Tensor, share_E: Tensor) -> Tensor:
    """sum_e share_e W_e / sum_e share_e in float64, [O, I]; expert by expert, so that no other copy is made."""
    total_OI = torch.zeros(weight_EOI.shape[1:], dtype=torch.float64, device=weight_EOI.device)
    for weight_OI, share in zip(weight_EOI, (share_E.double() / share_E.sum()).tolist(), strict=True):
        total_OI += share * weight_OI.double()
    return total_OI
