"""Drop the channels with the smallest weights. A baseline that needs no text.

score_k = ||gate_k|| ||up_k|| ||down_k||, Euclidean norms of the channel's rows and column.

Source: the usual baseline; the product, because gate, up and down may each be scaled at the others' expense.

- run: slim/magnitude
  with: {ratio: 0.25}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.methods.slim import Slim, drop_channels, reads


class Magnitude(Slim):
    """Options of `slim/magnitude`."""


@stage("slim/magnitude", version=1, needs=reads())
def magnitude(opt: Magnitude, model: Checkpoint, stats: CalibrationStats | None, ctx: Context) -> Checkpoint:
    family, score = family_of(model.config), {}
    for layer in model.facts.moe_layers:
        w = family.read_experts(model, layer)
        score[layer] = w.gate_FD.double().norm(dim=2) * w.up_FD.double().norm(dim=2) * w.down_DF.double().norm(dim=1)
    return drop_channels(model, stats, score, opt, ctx)
