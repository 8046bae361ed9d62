"""What a model is made of, for estimates of speed: exact counts from the headers of its files, no weight is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from statistics import fmean
from typing import Any

from moecli.core.errors import SurroundingsError
from moecli.core.model import DTYPE_BYTES, ModelSketch, TensorSpec
from moecli.families.family import Family, Linear, family_of
from moecli.io.factors import FACTORS_KEY, factor_tensors, stands_for
from moecli.io.formats import packed_names, parts_of, scheme_of, schemes_of
from moecli.io.gpt_oss_layout import as_packed_specs
from moecli.ops.roofline import LayerCount, Matrix, ModelCount

Specs = Mapping[str, TensorSpec]


def count_of(sketch: ModelSketch) -> ModelCount | None:
    """The parts of a model. None when its headers are not at hand, or when its experts are stored in a form whose
    shape they do not tell (such as MXFP4 blocks).

    KV cache: what keys and values take, or the latent and the rotary part under MLA, as serving engines keep it; layers
    without keys (linear attention, convolutions) keep none, their small state is not counted.
    """
    if not sketch.specs:
        return None
    family = family_of(_without_quantization(sketch.config))
    counter = _Counter(family, sketch)
    layers = tuple(counter.layer(index) for index in range(family.facts.layers))
    if any(not layers[index].expert for index in family.facts.moe_layers):
        return None
    head = next((name for name in counter.linears if name.endswith("lm_head.weight")), None)
    return ModelCount(
        layers,
        counter.matrix(head) if head else counter.tied_head(),
        family.facts.hidden,
        family.facts.top_k,
        sketch.bytes,
        max(2, int(DTYPE_BYTES.get(family.facts.dtype, 2))),
    )


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "quantization_config"}


class _Counter:
    """Looks up matrices of one model by the names that they have when they are not packed."""

    def __init__(self, family: Family, sketch: ModelSketch) -> None:
        sketch = replace(sketch, specs=as_packed_specs(sketch.specs))
        self._family, self._specs = family, sketch.specs
        self._schemes = schemes_of(sketch.config)
        self._hidden = family.facts.hidden
        self._packed = {name.removesuffix("_packed") for name in sketch.specs if name.endswith("_packed")}
        parts = {part for name in self._packed for part in parts_of(name, sketch.specs)}
        self._factors = sketch.config.get(FACTORS_KEY) or {}
        self._thin = {n for n in stands_for(sketch.config) if ".rows_at." not in n}
        guard = (sketch.config.get("quantization_config") or {}).get("guard")
        self._shapes = {name: spec for name, spec in sketch.specs.items() if name not in parts | {guard}}
        self._shapes |= {name: self._dense(name) for name in self._packed}
        self.linears: dict[str, Linear] = {linear.name: linear for linear in family.linears_in(self._shapes)}

    def _dense(self, name: str) -> TensorSpec:
        """Shape of the weight that is packed, outputs before inputs."""
        packed = self._specs[packed_names(name).packed]
        columns = int(packed.shape[-1] * DTYPE_BYTES[packed.dtype] * 8 // self._bits(name))
        return TensorSpec("bfloat16", (*packed.shape[:-1], columns))

    def _bits(self, name: str) -> int:
        """By the config, or, for a planned model, by the width of the nearest weight that takes the stream."""
        if self._schemes:
            return scheme_of(name, self._schemes).bits
        wide = [
            n for n in self._packed if n.endswith(("gate_proj.weight", "w1.weight", "gate_up_proj", "q_proj.weight"))
        ]
        if not wide:
            raise SurroundingsError(f"`{name}` is packed and config.json does not say with how many bits")
        nearest = max(wide, key=lambda other: _shared_parts(other, name))
        return round(self._specs[packed_names(nearest).packed].shape[-1] * 32 / self._hidden)

    def matrix(self, name: str) -> Matrix:
        """A linear by its dense name; of a stack, one expert of it."""
        linear, shape = self.linears[name], self._shapes[name].shape
        outputs, inputs = shape[-2:]
        if linear.transposed and name not in self._packed:
            outputs, inputs = inputs, outputs
        parts = parts_of(name, self._specs) if name in self._packed else [name]
        size = sum(self._specs[part].bytes for part in parts)
        return Matrix(inputs, outputs, size / (shape[0] if len(shape) == 3 else 1))

    def tied_head(self) -> Matrix:
        name = next(name for name in self._specs if name.endswith("embed_tokens.weight"))
        spec = self._specs[name]
        return Matrix(spec.shape[1], spec.shape[0], spec.bytes)

    def layer(self, index: int) -> LayerCount:
        mine = {name: linear for name, linear in self.linears.items() if linear.layer == index}
        plain = {name: self.matrix(name) for name, linear in mine.items() if linear.role != "expert"}
        routed = self._expert(index, mine)
        prefix = f"model.layers.{index}."
        names = [name for name in self._shapes if name.startswith(prefix) and name not in mine.keys() | self._thin]
        by_end = {name.removesuffix(".weight").rpartition(".")[2]: matrix for name, matrix in plain.items()
                  if mine[name].role == "attention"}  # fmt: skip
        return LayerCount(
            linears=(*plain.values(), *self._factored(index, ("base",))),
            experts=self._family.experts_in(index) if routed else 0,
            expert=routed,
            small_bytes=sum(self._shapes[name].bytes for name in names if not name.endswith(".alias_map")),
            **_attention(by_end),
            window=self._window(index),
        )

    def _expert(self, index: int, mine: Mapping[str, Linear]) -> tuple[Matrix, ...]:
        """Of the first expert, or the mean of all where they differ in width; a stacked gate and up is one matrix."""
        if index not in self._family.facts.moe_layers:
            return ()
        if str(index) in self._factors:
            return tuple(self._factored(index, ("left", "right", "rows")))
        form, widths = self._family.layout(self._shapes, index), self._family.widths_in(index)
        experts = range(len(widths)) if len(set(widths)) > 1 else (0,)
        found = [[self.matrix(name) for name in form.names_of(expert) if name in mine] for expert in experts]
        return tuple(
            Matrix(*(round(fmean(sizes)) for sizes in (inputs, outputs)), fmean(taken))
            for inputs, outputs, taken in (zip(*alike, strict=True) for alike in zip(*found, strict=True))
        )

    def _factored(self, index: int, parts: Collection[str]) -> Iterator[Matrix]:
        """These parts of factored experts: of one expert, or `base`, with which a token is multiplied once."""
        entry = self._factors.get(str(index), {"projections": ()})
        for projection in entry["projections"]:
            for part, name in factor_tensors(entry, projection["name"]).items():
                if part in parts:
                    *experts, outputs, inputs = self._specs[name].shape
                    yield Matrix(inputs, outputs, self._specs[name].bytes / (experts[0] if experts else 1))

    def _window(self, index: int) -> int | None:
        kinds = self._family.config.get("layer_types") or []
        sliding = index < len(kinds) and kinds[index] == "sliding_attention"
        return self._family.config.get("sliding_window") if sliding else None


def _shared_parts(first: str, second: str) -> int:
    """Parts of two paths that are equal, from the left."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _attention(by_end: Mapping[str, Matrix]) -> dict[str, int]:
    """Widths of cache, queries and values, from the shapes of the projections."""
    if "kv_a_proj_with_mqa" in by_end:  # MLA
        queries = by_end.get("q_b_proj") or by_end["q_proj"]
        kept = by_end["kv_a_proj_with_mqa"].outputs
        return {"kv_width": kept, "score_width": queries.outputs, "value_width": by_end["o_proj"].inputs}
    if "k_proj" not in by_end:
        return {}
    out = by_end.get("o_proj") or by_end["out_proj"]
    kept = by_end["k_proj"].outputs + by_end["v_proj"].outputs
    return {"kv_width": kept, "score_width": out.inputs, "value_width": out.inputs}
