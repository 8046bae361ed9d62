"""MXFP4 as gpt_oss has it: the experts of a layer, one tensor for each projection, and nothing else packed.

For a stacked tensor `X` of E experts, on disk [E, K, N] with K inputs:

    X_blocks   uint8 [E, N, K/32, 16]   e2m1 codes, two a byte, the first in the low half
    X_scales   uint8 [E, N, K/32]       exponent of a power of two, plus 127

Codes and scales are those of `ops.floats` for each expert's [N, K]. transformers and vLLM know these names by
`quant_method: mxfp4`. Source: transformers 5.23 `integrations/mxfp4.py`; the config as openai/gpt-oss-20b has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moecli.core.artifacts import Checkpoint, PartWriter
from moecli.core.model import TensorSpec
from moecli.io.durable import natural_key
from moecli.io.reader import Origin, StoredCheckpoint, StoredView, stored
from moecli.ops.floats import MX_GROUP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = "mxfp4"
CONFIG: Mapping[str, Any] = {
    "quant_method": METHOD,
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
BLOCKS, SCALES = "_blocks", "_scales"


def blocks_specs(name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
    """What stands on disk for a stacked tensor [E, K, N]; 32 divides K."""
    experts, columns, rows = spec.shape
    groups = (experts, rows, columns // MX_GROUP)
    return {
        name + BLOCKS: TensorSpec("uint8", (*groups, MX_GROUP // 2)),
        name + SCALES: TensorSpec("uint8", groups),
    }


def put_blocks(part: PartWriter, name: str, packed_ENH: Tensor, scale_ENG: Tensor) -> None:
    """Write what `quantize_mxfp4` made of each expert in place of the parent's tensor."""
    part.drop(name, "packed to MXFP4")
    part.put(name + BLOCKS, packed_ENH.reshape(*scale_ENG.shape, MX_GROUP // 2))
    part.put(name + SCALES, scale_ENG)


def as_packed_specs(specs: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    """The same tensors under the names of `io.formats`, for what asks how weights are packed: `X_packed` uint8
    [E, N, K/2] and `X_scale`."""
    new = dict(specs)
    for name in [name.removesuffix(BLOCKS) for name in specs if name.endswith(BLOCKS)]:
        *shape, groups, half = new.pop(name + BLOCKS).shape
        new[f"{name}_packed"] = TensorSpec("uint8", (*shape, groups * half))
        if name + SCALES in new:
            new[f"{name}_scale"] = new.pop(name + SCALES)
    return new


def without_blocks(checkpoint: Checkpoint) -> StoredCheckpoint:
    """The checkpoint with such experts read as ordinary ones; one without any is returned as it is."""
    config = checkpoint.config.get("quantization_config") or {}
    return _Dense(checkpoint) if config.get("quant_method") == METHOD else stored(checkpoint)


class _Dense(StoredView):
    """Config and facts are those of the model without packed weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.parent = stored(checkpoint)
        self.facts_of = self.parent.facts_of
        self.config: Mapping[str, Any] = {k: v for k, v in self.parent.config.items() if k != "quantization_config"}
        self.facts = self.facts_of(self.config)
        names = set(self.parent.names())
        self._blocks = {name.removesuffix(BLOCKS) for name in names if name.endswith(BLOCKS)}
        hidden = {name + end for name in self._blocks for end in (BLOCKS, SCALES)}
        self._names = dict.fromkeys(sorted((names - hidden) | self._blocks, key=natural_key))

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        if name not in self._blocks:
            return self.parent.spec(name)
        experts, rows, groups, _ = self.parent.spec(name + BLOCKS).shape
        return TensorSpec(self.facts.dtype, (experts, groups * MX_GROUP, rows))

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        if name not in self._blocks:
            return self.parent.get(name, device)
        return self._read(self.parent.get(name + BLOCKS, device), self.parent.get(name + SCALES, device))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._blocks:
            return self.parent.rows(name, start, stop)
        blocks, scales = (self.parent.rows(name + end, start, stop) for end in (BLOCKS, SCALES))
        return self._read(blocks, scales)

    def _read(self, blocks_ENGh: Tensor, scale_ENG: Tensor) -> Tensor:
        import torch

        from moecli.ops.floats import dequantize_mxfp4

        dtype = getattr(torch, self.facts.dtype)
        dense = [dequantize_mxfp4(*one, dtype).T for one in zip(blocks_ENGh.flatten(-2), scale_ENG, strict=True)]
        return torch.stack(dense)

    def origin(self, name: str) -> Origin:
        return ("own", name) if name in self._blocks else self.parent.origin(name)
