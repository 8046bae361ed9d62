"""Drop channels at random. The floor under every other method.

score_k is uniform in [0, 1), drawn from the recipe's seed.

Source: the usual control.

- run: slim/random
  with: {ratio: 0.25}
"""

from __future__ import annotations

import torch

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.families import family_of
from moecli.methods.slim import Slim, drop_channels, reads


class Random(Slim):
    """Options of `slim/random`."""


@stage("slim/random", version=1, needs=reads())
def random(opt: Random, model: Checkpoint, stats: CalibrationStats | None, ctx: Context) -> Checkpoint:
    family, width = family_of(model.config), model.facts.expert_width
    score = {
        layer: torch.rand(family.experts_in(layer), width, generator=ctx.rng, dtype=torch.float64)
        for layer in model.facts.moe_layers
    }
    return drop_channels(model, stats, score, opt, ctx)
