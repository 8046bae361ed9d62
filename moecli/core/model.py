"""What is known of a model before a weight is read: facts from `config.json`, shapes from file headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ScoreRule = Literal["softmax", "sigmoid", "topk_softmax", "sparsemixer"]
"""How router logits become weights: softmax over all then top-k; sigmoid scores; top-k on logits then
softmax over the k; PhiMoE's two rounds."""

DTYPE_BYTES: Mapping[str, float] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e8m0fnu": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip


PlannedBits = Mapping[int, tuple[tuple[int, int], ...]]
"""{layer: for each routed expert the bits of its gate and up projections, and of its down projection}"""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype (torch's name without `torch.`) and shape of one tensor on disk."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return int(self.numel * DTYPE_BYTES[self.dtype])


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What `config.json` tells. Letters: E experts, k experts per token, D model width, F expert width."""

    model_type: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    """E: routed experts stored in each MoE layer (after pruning or merging: those that are left)."""
    top_k: int
    hidden: int
    """D"""
    expert_width: int
    """F"""
    vocab: int
    dtype: str
    score: ScoreRule
    renormalized: bool
    """True when the weights of the k chosen experts are divided by their sum."""
    max_positions: int
    router_rows: int
    """Rows of the router: equal to `experts` except where an alias map folds several rows on one expert."""
    groups: int = 1
    """`n_group` of group-limited routing; 1 means no groups."""
    groups_used: int = 1
    """`topk_group`"""
    shared_width: int = 0
    """Total width of shared experts, 0 without."""
    quantized: str | None = None
    """`quant_method` of a checkpoint that is already quantized."""


@dataclass(frozen=True, slots=True)
class ModelSketch:
    """A model that need not exist yet: facts plus, where headers were readable, every tensor's spec.

    `plan` pushes a sketch through the recipe: each stage's `Options.forecast` says what it makes of it.
    """

    facts: ModelFacts
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    """On-disk tensor name -> spec; empty when only `config.json` was at hand."""

    planned: int | None = None
    """Experts per layer that a `cluster/...` stage has decided on and no `merge/...` has applied yet."""

    planned_bits: PlannedBits | None = None
    """Bits that an `allocate/...` stage decides on and no `quantize/...` stage has applied yet. While it has not run:
    some plan that its options allow, as large as they allow, so that sizes are right whichever it chooses.
    """

    uneven: bool = False
    """Whether layers may keep different numbers of experts: then counts here are their mean."""

    within_groups: bool = False
    """Whether clusters stay within the groups of group-limited routing, the same number in each."""

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())

    @property
    def parameters(self) -> int:
        """Stored elements; packed words count as words."""
        return sum(spec.numel for spec in self.specs.values())
