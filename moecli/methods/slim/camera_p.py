"""Drop the channels whose routed energy at the expert's output is lowest (CAMERA-P).

score_k = ((1 - alpha) sum_t (g_t h_tk)^2 + alpha max_t |g_t h_tk|^2) ||down_k||^2 over the tokens routed to the expert,
with h_tk the channel's activation and g_t the weight the model multiplies the expert's output with. Sums run over all
tokens, so busy experts score higher, and with many tokens the sum outweighs the maximum unless alpha is close to 1.

Differs from the authors' code: only routed experts are ranked (there shared ones too), sums are float64 (there
bfloat16, with many ties), and statistics are those of the source model (there each layer sees pruned layers below it).
`scope: layer` is theirs.

Source: arXiv 2508.02322; alpha 0.9 is what the authors' script runs with.

- run: slim/camera-p
  with: {ratio: 0.2}
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.slim import Slim, drop_channels, reads, scored
from moecli.ops.channels import camera_energy


class CameraP(Slim):
    """Options of `slim/camera-p`."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the largest activation against the sum of squares."""


@stage("slim/camera-p", version=1, needs=reads("ph2", "phmax"))
def camera_p(opt: CameraP, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    def energy(s: LayerStats, norm_EF: Tensor) -> Tensor:
        return camera_energy(s["ph2"], s["phmax"], norm_EF, opt.alpha)

    score = scored(stats, ("ph2", "phmax"), model, ctx, energy)
    return drop_channels(model, stats, score, opt, ctx)
