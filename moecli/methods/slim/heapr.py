"""Drop the channels whose loss would hardly be noticed, by second order of the loss (HEAPr).

score_k = 1/2 (1/n sum_t h_tk^2) (1/n sum_t (dl/dh_tk)^2) over the n tokens t routed to the expert, with h_tk the
channel's activation and l the model's loss. This is the paper's 1/n sum_t 1/2 (h_tk w_k)^T G (h_tk w_k) with
G = 1/n sum_t a_t a_t^T, a_t = dl/dy_t the gradient at the expert's output and w_k the channel's column of `down`,
because w_k^T a_t = dl/dh_tk: two vectors an expert instead of two D x D matrices, one way through the layers and back.

`reduce: mean` is the paper's; `sum` multiplies by n, which is what the loss over all text weighs. Experts that no token
reached lose their channels first, ranked by weights among themselves. The loss here is summed over tokens, theirs is
the mean: a constant that moves no rank. `scope: global` is the paper's HEAPr-G, `layer` its HEAPr-L.

Source: arXiv 2509.22299, section 3.

- run: slim/heapr
  with: {ratio: 0.25}
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.context import Context
from moecli.core.model import ModelFacts
from moecli.core.stage import stage
from moecli.methods.slim import Slim, drop_channels, reads, scored


class Heapr(Slim):
    """Options of `slim/heapr`."""

    reduce: Literal["mean", "sum"] = "mean"
    """`mean` over an expert's tokens, as in the paper, or `sum`: then rarely used experts weigh less."""


@stage("slim/heapr", version=1, needs=reads("h2", "gh2"))
def heapr(opt: Heapr, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint:
    ctx.note(memory_words(model.facts))
    score = scored(stats, ("h2", "gh2"), model, ctx, lambda s, _: saliency(s, opt.reduce))
    return drop_channels(model, stats, score, opt, ctx)


def memory_words(facts: ModelFacts) -> str:
    """What the score reads of all layers, and what the D x D form keeps: sum and mean of each expert, float32."""
    experts = len(facts.moe_layers) * facts.experts
    vectors, matrices = 2 * 8 * facts.expert_width * experts, 2 * 4 * facts.hidden**2 * experts
    return (
        f"the score reads two vectors of each expert, {vectors / 1e6:,.1f} MB in all; "
        f"two matrices of each, as the definition has it, take {matrices / 1e6:,.1f} MB"
    )


def saliency(stats: LayerStats, reduce: str) -> Tensor:
    """float64 [E, F]"""
    tokens_E1 = stats.count_E.double().clamp(min=1)[:, None]
    mean_EF = stats["h2"] / tokens_E1 * stats["gh2"] / tokens_E1 / 2
    return mean_EF if reduce == "mean" else mean_EF * tokens_E1
