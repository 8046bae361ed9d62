"""Ridge regression in streaming normal equations, batched: many small problems, tokens in chunks.

Each of K problems: find W [D, F] with W p_t near y_t over tokens t. Products in fp32, sums and solve in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NormalEquations:
    """Sums of p p^T [K, F, F] and y p^T [K, D, F] over tokens."""

    def __init__(self, problems: int, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.gram_KFF = torch.zeros(problems, features, features, dtype=torch.float64, device=device)
        self.cross_KDF = torch.zeros(problems, outputs, features, dtype=torch.float64, device=device)

    def add(self, feature_KTF: Tensor, target_KTD: Tensor) -> None:
        """Some tokens. float32 or wider; K problems side by side."""
        self.gram_KFF += feature_KTF.mT @ feature_KTF
        self.cross_KDF += target_KTD.mT @ feature_KTF

    def solve(self, prior_KDF: Tensor, ridge: float) -> Tensor:
        """argmin_W sum_t |W p_t - y_t|^2 + lambda |W - prior|^2, float64 [K, D, F].

        lambda is `ridge` times the mean of p^2 over tokens and features, summed over tokens (the mean diagonal of the
        Gram). Where tokens say nothing, and in a problem without tokens, W is the prior.
        """
        prior_KDF = prior_KDF.to(self.cross_KDF)
        scale_K = self.gram_KFF.diagonal(dim1=-2, dim2=-1).mean(-1)
        lambda_K = ridge * torch.where(scale_K > 0, scale_K, torch.ones_like(scale_K))
        eye_FF = torch.eye(self.gram_KFF.shape[-1], dtype=torch.float64, device=self.gram_KFF.device)
        factor = torch.linalg.cholesky(self.gram_KFF + lambda_K[:, None, None] * eye_FF)
        missing_KDF = self.cross_KDF - prior_KDF @ self.gram_KFF
        return prior_KDF + torch.cholesky_solve(missing_KDF.mT, factor).mT
