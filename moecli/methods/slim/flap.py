"""Drop the channels that vary least, and put what they give on average into the output's bias (FLAP on experts).

score_k = Var_t(h_tk) ||down_k||^2 over the tokens routed to the expert, made comparable between experts by subtracting
the expert's mean score and dividing by their standard deviation. Then down_bias += sum over dropped k of
mean_t(h_tk) down_k, where the family's experts have such a bias (gpt_oss); elsewhere it has no place in a checkpoint
that loads as it is, and the report says so. `repair: least_squares` makes up for the mean as well, and takes the place
of the bias everywhere.

Every token counts the same (in the published code every forward pass does). `floor: 1` is theirs, one threshold over
all layers is `scope: global`.

Source: arXiv 2312.11983, as carried over to experts by its MoE implementations.

- run: slim/flap
  with: {ratio: 0.25}
"""

from __future__ import annotations

from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.engine.stats import channel_variance
from moecli.families import family_of
from moecli.methods.slim import Slim, drop_channels, reads, scored


class Flap(Slim):
    """Options of `slim/flap`."""


@stage("slim/flap", version=1, needs=reads("h1", "h2"))
def flap(opt: Flap, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    score = scored(stats, ("h1", "h2"), model, ctx, fluctuation)
    mean = {layer: s["h1"] / s.count_E.clamp(min=1)[:, None] for layer, s in stats.items()}
    first = family_of(model.config).read_expert(model, model.facts.moe_layers[0], 0)
    if first.down_bias_D is None and opt.repair == "none":
        ctx.note("the experts have no output bias, so what dropped channels give on average is lost")
    return drop_channels(model, stats, score, opt, ctx, mean)


def fluctuation(stats: LayerStats, norm_EF: Tensor) -> Tensor:
    """float64 [E, F], standardised within each expert; 0 where all channels of an expert are alike."""
    raw_EF = channel_variance(stats) * norm_EF.square()
    spread_E1 = raw_EF.std(dim=1, keepdim=True, correction=0)
    return (raw_EF - raw_EF.mean(dim=1, keepdim=True)) / spread_E1.where(spread_E1 > 0, 1)
