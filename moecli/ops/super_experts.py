"""Super Experts: the few experts whose outputs carry a model's massive activations.

Source: arXiv 2507.23279, section 3, and the rule of its published profile code as the specification restates it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

QUANTILE = 0.995
"""An expert's largest output must lie above this quantile of all considered experts'."""
SHARE = 0.1
"""And above this share of the largest of all."""
DEPTH = 0.75
"""Only layers before this share of the depth are considered: late layers have large outputs that do no harm."""


def super_experts(absmax: Mapping[int, Tensor], layers: int) -> dict[int, list[int]]:
    """{layer: experts, ascending} of the Super Experts; layers without any are left out.

    `absmax` is {layer: [E]}, the largest |un-gated output| of each expert over its tokens; `layers` counts all decoder
    layers, dense ones too. Differs from the published code in one thing: a tenth of the maximum is exact there only to
    the integer below.
    """
    considered = {layer: values.double() for layer, values in absmax.items() if layer < round(DEPTH * layers)}
    if not considered:
        return {}
    every = torch.cat(list(considered.values()))
    bar = torch.maximum(torch.quantile(every, QUANTILE), SHARE * every.max())
    found = {layer: (values > bar).nonzero().flatten().tolist() for layer, values in considered.items()}
    return {layer: experts for layer, experts in found.items() if experts}
