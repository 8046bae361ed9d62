"""Replace every expert matrix by two thin ones, nearest on the tokens that the expert sees (SVD-LLM).

With C the second moment of what goes into a matrix W [O, I] and S S^T = C, W S = U Sigma V^T is cut to rank
r = floor(kept O I / (O + I)), so that the factors hold at most `kept` of W's numbers: W' = U_r Sigma_r V_r^T S^-1. The
squared error of the outputs is the sum of the dropped sigma^2. U_r Sigma_r V_r^T S^-1 is U_r (U_r^T W), so U_r and
U_r^T W are stored, and no Cholesky factor or inverse is taken (`ops.lowrank`): a C of low rank is no special case.

C is that of the tokens routed to the expert, in the source model. With n < 2 I tokens it is (1 - g) of it and
g = I / (I + n) of the layer's over all tokens; for down, whose inputs no two experts share, of a multiple of the
identity. Such experts are counted in the report. Ranks are the same in all layers. The paper's updates by fine-tuning
are not part of it.

Source: arXiv 2403.07378, section 3.1; the share of other inputs for experts with few tokens is ours.

- run: slim/svd-llm
  with: {kept: 0.8}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from moecli.core.artifacts import CalibrationText, Checkpoint, ExpertWeights
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import RunSetting, stage
from moecli.engine.data import batches_of
from moecli.engine.sweep import SweptLayer, sweep
from moecli.methods.matrices import GRAMS, LowRank, rank_problem, whitened, write_factored
from moecli.ops.lowrank import Factored, rank_at


class SvdLlm(LowRank):
    """Options of `slim/svd-llm`."""

    kept: Annotated[float, Field(gt=0, lt=1)]
    """Part of the routed experts' numbers that the factors may hold."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def shape(self, experts: int, outputs: int, inputs: int) -> dict[str, Any]:
        return {"rank": rank_at(self.kept, outputs, inputs), "base": False, "rows": 0}

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from rank_problem(self.kept, 0, model)


@stage("slim/svd-llm", version=1)
def svd_llm(opt: SvdLlm, text: CalibrationText, model: Checkpoint, ctx: Context) -> Checkpoint:
    rank = rank_at(opt.kept, model.facts.expert_width, model.facts.hidden)

    def make(layer: SweptLayer, experts: ExpertWeights) -> tuple[dict[str, Factored], dict[str, float]]:
        return whitened(layer, experts, lambda weight_EOI, count_E: None, rank, ctx.device)

    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=GRAMS)
    made = write_factored(model, swept, make, opt, ctx)
    for line in swept.report():
        ctx.note(line)
    return made
