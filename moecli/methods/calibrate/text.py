"""Cut calibration text into samples and keep them, for stages below that run it through the model themselves.

`calibrate/statistics` brings its text along; this stage is for recipes that need no statistics, such as GPTQ alone.

- run: calibrate/text
  with: {dataset: calibration.jsonl, samples: 128, tokens_per_sample: 2048}
"""

from __future__ import annotations

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.context import Context
from moecli.core.stage import stage
from moecli.methods.calibrate import TextOptions, text_of


class Text(TextOptions):
    """Options of `calibrate/text`."""


@stage("calibrate/text", version=1)
def text(opt: Text, model: Checkpoint, ctx: Context) -> CalibrationText:
    opt.ready()
    return text_of(opt, model, ctx)
