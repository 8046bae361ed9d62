"""Replace every expert matrix by two thin ones plus a few of its rows: MC-SMoE's second step, in one shot.

W is cut to rank r by a plain SVD; of what is missing, S = W - L R, the rows whose outputs miss most are kept whole:
score_o = mean over inputs i of S_oi^2 m_i, m_i the mean of x_i^2 over the tokens routed to the expert (1 for an expert
without tokens). Each matrix keeps floor(rows O) of them.

This is not how the paper does it: there S is pruned step by step while the model is trained against its source (the
importance of a row is a running mean of |S dLoss/dS|, its schedule LoSparse's, arXiv 2306.11222), with one threshold
over all matrices. Nothing is trained here, and its results are not the paper's. Put it below a `merge/...` stage, with
a `calibrate/statistics` stage of the merged model in between.

Source: arXiv 2310.01334 for the form; the one-shot score is ours.

- run: slim/mc-smoe-second
  with: {rank: 32, rows: 0.1}
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, ExpertWeights
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.methods.matrices import MATRICES, LowRank, checked_inputs, slabs, write_factored
from moecli.ops.lowrank import Factored, truncated


class McSmoeSecond(LowRank):
    """Options of `slim/mc-smoe-second`."""

    rank: PositiveInt = 32
    """Rank of the thin matrices."""
    rows: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the rows of what is missing that is kept."""

    def shape(self, experts: int, outputs: int, inputs: int) -> dict[str, Any]:
        return {"rank": self.rank, "base": False, "rows": math.floor(self.rows * outputs + 1e-9)}

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        outputs, inputs = model.expert_width, model.hidden
        most = max(math.ceil((1 - self.rows) * outputs * inputs / (outputs + inputs)) - 1, 0)
        if self.rank > most:
            yield Problem(
                "rank",
                f"rank {self.rank} and {self.rows:g} of the rows hold no less than a {outputs} x {inputs} matrix",
                hint=f"write `rank: {most}` or less" if most else "lower `rows`",
            )


@stage("slim/mc-smoe-second", version=1, needs=("x2", "h2"))
def mc_smoe_second(opt: McSmoeSecond, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    def make(layer: int, experts: ExpertWeights) -> tuple[dict[str, Factored], dict[str, float]]:
        found, lost, total = {}, 0.0, 0.0
        for field, into in MATRICES.items():
            weight_EOI, s = getattr(experts, field), stats[layer]
            mean_EI = checked_inputs(s[f"{into}2"], weight_EOI, into, layer) / s.count_E.clamp(min=1)[:, None]
            mean_EI = torch.where((s.count_E > 0)[:, None], mean_EI, torch.ones_like(mean_EI))
            rows = opt.shape(len(weight_EOI), *weight_EOI.shape[1:])["rows"]
            pieces = []
            for some in slabs(len(weight_EOI), 80 * weight_EOI[0].numel()):
                weight, mean = weight_EOI[some].to(ctx.device), mean_EI[some].to(ctx.device)
                piece = low_rank_and_rows(weight, mean, opt.rank, rows)
                weighed = (weight.double() - piece.expanded().double()).square() * mean[:, None]
                lost += float(weighed.sum())
                total += float((weight.double().square() * mean[:, None]).sum())
                pieces.append(piece.to(weight_EOI))
            found[field] = joined(pieces)
        return found, {"lost": lost, "total": total}

    made = write_factored(model, ctx.track(model.facts.moe_layers, "factoring"), make, opt, ctx)
    ctx.note("one shot, without the paper's training; errors take the inputs of a matrix as independent")
    return made


def low_rank_and_rows(weight_EOI: Tensor, mean_EI: Tensor, rank: int, rows: int) -> Factored:
    """L R of this rank by SVD, and the rows of what is missing with the largest sum of S_oi^2 m_i, in float64; what is
    missing is counted from the factors as they are stored, in the dtype of W.
    """
    cut = truncated(weight_EOI, rank)
    factors = Factored(cut.left_EOr, cut.right_ErI)
    if rows == 0:
        return factors
    as_stored = factors.to(weight_EOI)
    missing_EOI = weight_EOI.double() - as_stored.left_EOr.double() @ as_stored.right_ErI.double()
    score_EO = (missing_EOI.square() * mean_EI.double()[:, None]).sum(-1)
    at_En = score_EO.argsort(dim=1, descending=True, stable=True)[:, :rows].sort(1).values
    kept_EnI = missing_EOI.gather(1, at_En[..., None].expand(-1, -1, weight_EOI.shape[2]))
    return factors._replace(rows_EnI=kept_EnI, at_En=at_En)


def joined(pieces: list[Factored]) -> Factored:
    """Factors of some experts each, of all."""
    return Factored(*(None if some[0] is None else torch.cat(some) for some in zip(*pieces, strict=True)))
