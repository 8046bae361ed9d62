"""Correct compressed weights with each input weighed by its mean size (L2QER).

s_c = mean |x_c| over a weight's inputs, at least 1e-4; B A is the truncated singular value decomposition of
dW diag(s), times diag(1 / s). Published code takes the largest of the means over batches and divides s by
sqrt(min s max s), which cancels; here it is the mean over all tokens, so batches play no part. Its factors are rounded
to few bits by a format of their own; here they keep the model's dtype.

Source: arXiv 2402.02446.

- run: compensate/lqer
  with: {rank: 32}
"""

from __future__ import annotations

from torch import Tensor

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.engine.linears import InputSizes
from moecli.methods.compensate import Compensate, Inputs, compensate

LEAST = 1e-4
"""Mean |x| below which an input counts no less."""


class Lqer(Compensate):
    """Options of `compensate/lqer`."""


def squared(mean_EC: Tensor) -> Tensor:
    """diag(s)^2, the second moment that the scaling stands for."""
    return mean_EC.clamp(min=LEAST).square()


SIZES = Inputs(
    of_experts={"x": "x_abs", "h": "h_abs"},
    expert_moment=squared,
    of_others=InputSizes,
    other_moment=lambda sizes, leader: squared(sizes.vector(leader)[None]),
)


@stage("compensate/lqer", version=1)
def lqer(opt: Lqer, text: CalibrationText, model: Checkpoint, source: Checkpoint, ctx: Context) -> Checkpoint:
    return compensate(opt, SIZES, text, model, source, ctx)
