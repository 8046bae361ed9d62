"""Correct compressed weights where their inputs lie: the least output error on calibration text at a rank (EoRA).

G = mean of x x^T over a weight's inputs, each expert's over its own tokens; B A is the best of rank r for
tr((dW - B A) G (dW - B A)^T). Published code takes a running mean that forgets, and adds to eigenvalues that are 0
before it divides by them: here the mean is a plain one, and nothing is divided. Text of the task at hand in place of
general text makes it an adaptation to the task: say so beside such numbers. Below a `prune/...` stage write
`use: {source: ID}` with its `id`: what was lost is what the pruned model had.

Source: arXiv 2410.21271.

- run: compensate/eora
  with: {rank: 16}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.engine.linears import InputGrams
from moecli.methods.compensate import Compensate, Inputs, compensate


class Eora(Compensate):
    """Options of `compensate/eora`."""


MOMENTS = Inputs(
    of_experts={"x": "x_cov", "h": "h_cov"},
    expert_moment=lambda mean_ECC: mean_ECC,
    of_others=InputGrams,
    other_moment=lambda grams, leader: grams.matrix(leader)[None],
)


@stage("compensate/eora", version=1)
def eora(opt: Eora, text: CalibrationText, model: Checkpoint, source: Checkpoint, ctx: Context) -> Checkpoint:
    return compensate(opt, MOMENTS, text, model, source, ctx)
