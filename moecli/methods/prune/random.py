"""Drop experts at random: the floor every method must beat. The recipe's `seed` decides.

Source: the usual floor, for example arXiv 2510.13999, section 4. Experts are drawn per layer, uniformly; with the
default `protect` the Super Experts stay, which random pruning in papers does not do.

- run: prune/random
  with: {keep: 64}
"""

from __future__ import annotations

import torch

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.prune import Prune, drop_experts, reads


class Random(Prune):
    """Options of `prune/random`."""


@stage("prune/random", version=1, needs=reads())
def random(opt: Random, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    score = {layer: torch.rand(len(s.count_E), generator=ctx.rng) for layer, s in stats.items()}
    return drop_experts(model, stats, score, opt, ctx)
