"""Experts that are stored as factors: names, and a view in which they read as ordinary weights.

In place of the weights `P.<e>.gate_proj.weight` [O, I] of a layer's E experts, and the same for up and down, stand

    P.left.gate_proj      [E, O, r]    P.right.gate_proj     [E, r, I]     W_e = left_e right_e
    P.base.gate_proj      [O, I]       if there: added to each of them
    P.rows.gate_proj      [E, n, I]    P.rows_at.gate_proj   int64 [E, n]  if there: rows added, and to which

and `config.json` says under `moecli_factors`, for each layer,

    {"prefix": P, "experts": E, "projections": [{"name": "gate_proj", "rank": r, "base": false, "rows": 0}, ...]}

with gate, up and down in this order. Compact exports keep it (`runtime.compact_model` runs the factors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecli.core.artifacts import Checkpoint, PartWriter
from moecli.core.model import TensorSpec
from moecli.io.durable import natural_key
from moecli.io.reader import Origin, StoredCheckpoint, StoredView, stored
from moecli.ops.lowrank import Factored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FACTORS_KEY = "moecli_factors"
"""config.json: {"<layer>": what its experts' factors are} of a model that is stored as such."""
PARTS = ("left", "right", "base", "rows", "rows_at")


def layer_entry(prefix: str, experts: int, projections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the config says of one layer."""
    return {"prefix": prefix, "experts": experts, "projections": [dict(found) for found in projections]}


def factor_tensors(entry: Mapping[str, Any], name: str) -> dict[str, str]:
    """{part: tensor name} of one projection."""
    (found,) = (p for p in entry["projections"] if p["name"] == name)
    parts = ["left", "right", *(["base"] if found["base"] else []), *(["rows", "rows_at"] if found["rows"] else [])]
    return {part: f"{entry['prefix']}.{part}.{name}" for part in parts}


def dense_names(entry: Mapping[str, Any], name: str) -> list[str]:
    """Names of the weights that one projection's factors stand for, by expert."""
    return [f"{entry['prefix']}.{expert}.{name}.weight" for expert in range(entry["experts"])]


def stands_for(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """{factor tensor: the weights that it stands for with others} of a config.json; empty without factors."""
    return {
        tensor: dense_names(entry, found["name"])
        for entry in (config.get(FACTORS_KEY) or {}).values()
        for found in entry["projections"]
        for tensor in factor_tensors(entry, found["name"]).values()
    }


def factor_specs(specs: Mapping[str, TensorSpec], entry: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The specs of a model with a layer's weights replaced by factors, in the weights' dtype."""
    new = dict(specs)
    for found in entry["projections"]:
        weights = [new.pop(name) for name in dense_names(entry, found["name"])]
        (outputs, inputs), dtype, experts = weights[0].shape, weights[0].dtype, entry["experts"]
        shapes = {
            "left": (experts, outputs, found["rank"]), "right": (experts, found["rank"], inputs),
            "base": (outputs, inputs), "rows": (experts, found["rows"], inputs), "rows_at": (experts, found["rows"]),
        }  # fmt: skip
        for part, name in factor_tensors(entry, found["name"]).items():
            new[name] = TensorSpec("int64" if part == "rows_at" else dtype, shapes[part])
    return dict(sorted(new.items(), key=lambda item: natural_key(item[0])))


def put_factors(part: PartWriter, entry: Mapping[str, Any], name: str, factors: Factored) -> None:
    """Write the factors of one projection in place of the parent's weights."""
    for weight in dense_names(entry, name):
        part.drop(weight, f"stored as factors of rank {factors.left_EOr.shape[-1]}")
    tensors = factor_tensors(entry, name)
    for kind, value in zip(PARTS, factors, strict=True):
        if value is not None:
            part.put(tensors[kind], value)


def unfactored(checkpoint: Checkpoint) -> StoredCheckpoint:
    """The checkpoint with factors read as ordinary weights; one without any is returned as it is."""
    return FactoredView(checkpoint) if checkpoint.config.get(FACTORS_KEY) else stored(checkpoint)


class FactoredView(StoredView):
    """A checkpoint whose factors read as the weights they stand for, in their dtype; with the config and facts of the
    ordinary model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.parent = stored(checkpoint)
        self.facts_of = self.parent.facts_of
        config = dict(self.parent.config)
        self._where: dict[str, tuple[Mapping[str, str], int]] = {}
        """name of a weight -> the tensors of its projection, its expert"""
        hidden: set[str] = set()
        for entry in config.pop(FACTORS_KEY).values():
            for found in entry["projections"]:
                tensors = factor_tensors(entry, found["name"])
                hidden |= set(tensors.values())
                self._where |= {name: (tensors, e) for e, name in enumerate(dense_names(entry, found["name"]))}
        self.config: Mapping[str, Any] = config
        self.facts = self.facts_of(config)
        shown = {name for name in self.parent.names() if name not in hidden}
        self._names = dict.fromkeys(sorted(shown | set(self._where), key=natural_key))

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        if name not in self._where:
            return self.parent.spec(self._known(name))
        tensors = self._where[name][0]
        left, right = self.parent.spec(tensors["left"]), self.parent.spec(tensors["right"])
        return TensorSpec(left.dtype, (left.shape[1], right.shape[2]))

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        if name not in self._where:
            return self.parent.get(self._known(name), device)
        tensors, expert = self._where[name]

        def of(part: str) -> Tensor | None:
            if part not in tensors:
                return None
            if part == "base":
                return self.parent.get(tensors[part], device)
            return self.parent.rows(tensors[part], expert, expert + 1).to(device)

        left, right, *others = (of(part) for part in PARTS)
        assert left is not None and right is not None
        return Factored(left, right, *others).expanded()[0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.parent.rows(name, start, stop) if name not in self._where else self.get(name)[start:stop]

    def origin(self, name: str) -> Origin:
        """Products are in no file as they are: ("own", name)."""
        return ("own", name) if name in self._where else self.parent.origin(self._known(name))

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(f"no tensor `{name}`")
        return name
