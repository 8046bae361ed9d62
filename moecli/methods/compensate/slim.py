"""Correct compressed weights with each input weighed by its root mean square, then round them again (SLiM-LoRA).

s_c^2 = mean x_c^2 over a weight's inputs; B A is the truncated singular value decomposition of dW diag(s), times
diag(1 / s). Then (`renew`) the compressed weights become the nearest to W - B A that have the same scales and the same
zeros, which never adds to the error as this method weighs it, and undoes what GPTQ did for correlated inputs. The paper
takes rank 0.1 min(R, C); its text has mean |x| for s, its code the root mean square. Its code adds the least positive s
to all of them because it divides by s; here nothing is divided. The published quantization of the factors is left out.

Source: arXiv 2410.09615.

- run: compensate/slim
  with: {rank: 32}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.engine.linears import InputGrams
from moecli.methods.compensate import Compensate, Inputs, compensate


class Slim(Compensate):
    """Options of `compensate/slim`."""

    renew: bool = True
    """Round the compressed weights again, to what the correction leaves of them."""


SQUARES = Inputs(
    of_experts={"x": "x2", "h": "h2"},
    expert_moment=lambda mean_EC: mean_EC,
    of_others=InputGrams,
    other_moment=lambda grams, leader: grams.matrix(leader).diagonal()[None],
)


@stage("compensate/slim", version=1)
def slim(opt: Slim, text: CalibrationText, model: Checkpoint, source: Checkpoint, ctx: Context) -> Checkpoint:
    return compensate(opt, SQUARES, text, model, source, ctx, renew=opt.renew)
