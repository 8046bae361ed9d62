"""Gram matrices of an expert's inputs x and of what its down projection takes, h: the Hessians of GPTQ without their
factor 2/n, and what least squares need.

Products of bf16 values are exact in fp32 and are added in fp32 on tensor cores; a weight g enters one factor in two
bf16 parts (relative error 2^-16). On CUDA sums over micro-batches are fp32, on the CPU fp64; results are fp32.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from moecli.engine.collectors.base import Collector, LayerShape
from moecli.engine.collectors.grouped import Grouped
from moecli.ops import gram


class _Gram(Collector):
    power: ClassVar[int] = 0
    """Each token counts g to this power."""

    @classmethod
    @abstractmethod
    def size(cls, shape: LayerShape) -> tuple[int, int]:
        """Matrices and their width."""

    def start(self, shape: LayerShape, device: torch.device) -> None:
        count, width = self.size(shape)
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self.total = torch.zeros(count, width, width, dtype=dtype, device=device)

    def update(self, grouped: Grouped) -> None:
        weight_S = grouped.gate_S**self.power if self.power else None
        gram.add(self.total, *self.values(grouped), grouped.end_E, weight_S)

    @abstractmethod
    def values(self, grouped: Grouped) -> tuple[Tensor, Tensor | None]:
        """Rows and which of them belong to the visits; None: one each."""

    def result(self) -> dict[str, Tensor]:
        return {self.name: gram.whole(self.total).float()}

    @classmethod
    def held_bytes(cls, shape: LayerShape) -> int:
        count, width = cls.size(shape)
        return 4 * count * width * width


class _OfInput(_Gram):
    routed = True

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, int]:
        return shape.experts, shape.hidden

    def values(self, grouped: Grouped) -> tuple[Tensor, Tensor | None]:
        return grouped.hidden_TD, grouped.row_S


class _OfInner(_Gram):
    routed = True
    needs = frozenset({"inner"})

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, int]:
        return shape.experts, shape.width

    def values(self, grouped: Grouped) -> tuple[Tensor, Tensor | None]:
        return grouped.inner_SF, None


class XCov(_OfInput):
    """Sum over X_i of x x^T. float32 [E, D, D], sum. Hessian of gate and up projections from routed tokens (GPTQ),
    SVD-LLM, SparseGPT, EoRA, Sub-MoE's truncation. Not centred. 4 E D^2 bytes a layer: 2.1 GB for 128 experts of
    width 2048.
    """

    name = "x_cov"


class GxCov(_OfInput):
    """Sum over X_i of g_ti x x^T. float32 [E, D, D], sum. Affinity-weighted Hessian, MoEQuant (2505.03804)."""

    name = "gx_cov"
    power = 1


class XCovPool(_OfInput):
    """Sum over *all* tokens of x x^T. float32 [1, D, D], sum. The Hessian of gate and up projections when every expert
    is calibrated on every token: one for all of them; the fallback of experts with few tokens.
    """

    name = "x_cov_pool"
    routed = False

    @classmethod
    def size(cls, shape: LayerShape) -> tuple[int, int]:
        return 1, shape.hidden

    def update(self, grouped: Grouped) -> None:
        end_1 = torch.full((1,), grouped.tokens, dtype=torch.int32, device=self.total.device)
        gram.add(self.total, grouped.hidden_TD, None, end_1)


class HCov(_OfInner):
    """Sum over X_i of h h^T. float32 [E, F, F], sum. Hessian of the down projection (GPTQ), least-squares repair after
    channel pruning, Nystroem; its diagonal is `h2`.
    """

    name = "h_cov"


class GhCov(_OfInner):
    """Sum over X_i of g_ti h h^T. float32 [E, F, F], sum. Affinity-weighted Hessian, MoEQuant (2505.03804)."""

    name = "gh_cov"
    power = 1


class PhCov(_OfInner):
    """Sum over X_i of (g h)(g h)^T. float32 [E, F, F], sum. What the block adds to the stream is W_down (g h): least
    squares on it weight tokens like this; its diagonal is `ph2`.
    """

    name = "ph_cov"
    power = 2
