"""Keep the experts whose routed outputs turn the residual stream most on text of one domain (EASY-EP).

score_j = sum over tokens t routed to j of g_tj * ||y_tj|| * max(0, 1 - cos(h_t, h_t + r_t)), h the residual stream
before the block, r_t the routed sum without shared experts, g the weight the model really multiplies with.

Unlike REAP it is not divided by the number of tokens, so it rewards frequency: made for a model that serves a known
domain. Calibrate on prompts of that domain with the model's own answers; 25 samples are the authors' number.

For several domains the paper takes the mean over domains of I / sum I. Calibrate on each alone, in a run of its own
with `statistics: [easy, absmax]`, then put them together and start from the file with `calibrate/stored`:

    moecli stats merge --domains runs/math runs/code -o both.safetensors

Source: arXiv 2504.06792, section 3 (NeurIPS 2025).

- run: prune/easy-ep
  with: {keep: 64}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationStats, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.engine.stats import DOMAINS
from moecli.methods.prune import Prune, drop_experts, reads


class EasyEp(Prune):
    """Options of `prune/easy-ep`."""


@stage("prune/easy-ep", version=1, needs=reads("easy"))
def easy_ep(opt: EasyEp, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    if many := stats.source.get(DOMAINS):
        ctx.note(f"scores are means over {many} domains, each of which counts alike")
    return drop_experts(model, stats, {layer: s["easy"] for layer, s in stats.items()}, opt, ctx)
