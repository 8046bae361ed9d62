"""Scales that share the range of inputs and weights between them, and one vector of them for many matrices (EAQuant).

Letters: E matrices, C inputs.

Source: SmoothQuant (arXiv 2211.10438), equation 4; EAQuant (arXiv 2506.13329) for the merge.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5
"""Smallest scale, and smallest weight that is divided by."""


def smoothing(input_EC: Tensor, weight_EC: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha), at least LEAST, float32 [E, C]; largest |x| and |w| of a column go in.

    W diag(s) is rounded, and its inputs come divided by s.
    """
    x_EC, w_EC = input_EC.float(), weight_EC.float().clamp(min=LEAST)
    return (x_EC**alpha / w_EC ** (1 - alpha)).clamp(min=LEAST)


def merged(scale_EC: Tensor, share_E: Tensor | None) -> Tensor:
    """One vector [C] for all matrices: the largest scale of each column, or with shares their weighted sum. Shares that
    sum to 0 count alike.
    """
    if share_E is None:
        return scale_EC.amax(0)
    share_E = share_E.to(scale_EC)
    share_E = torch.where(share_E.sum() > 0, share_E, torch.ones_like(share_E))
    return share_E @ scale_EC / share_E.sum()
