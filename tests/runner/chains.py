"""Overlay chains as stages leave them, made with `families` and `io` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from moecli.core.artifacts import Checkpoint, ExpertWeights
from moecli.families import alias_config, facts_of, family_of
from moecli.io.formats import Group, put_packed, put_packed_stack, quantization_config
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.ops.pack import pack_rows, quantize_rtn

GROUP_SIZE = 16
ROLES = ("expert", "shared", "attention", "dense")


def opened(folder: Path) -> FolderCheckpoint:
    return FolderCheckpoint(folder, facts_of)


def alias_of(layer: int, rows: int, experts: int) -> list[int]:
    """Unsorted, different in each layer, every expert used."""
    return [(row * 7 + layer) % experts for row in range(rows)]


def merged(model: Checkpoint, folder: Path, experts: int | Mapping[int, int]) -> OverlayCheckpoint:
    """Each layer's experts become the means of their groups, behind an alias map."""
    family, facts = family_of(model.config), model.facts
    counts = {layer: experts if isinstance(experts, int) else experts[layer] for layer in facts.moe_layers}
    with OverlayWriter(folder, model, config=alias_config(model.config, counts)) as out:
        for layer, count in counts.items():
            alias = alias_of(layer, facts.router_rows, count)

            def write(part, layer=layer, count=count, alias=alias):
                groups = [[row for row in range(len(alias)) if alias[row] == e] for e in range(count)]
                family.write_experts(part, model, layer, [_mean(model, layer, group) for group in groups])
                part.put(family.alias_name(layer), torch.tensor(alias))

            out.part(f"layer-{layer:03d}", write)
    return out.checkpoint


def pruned(model: Checkpoint, folder: Path, kept: list[int]) -> OverlayCheckpoint:
    """Keeps these experts and their router rows in every layer."""
    family = family_of(model.config)
    with OverlayWriter(folder, model, config=family.shrink_config(model.config, len(kept))) as out:
        for layer in model.facts.moe_layers:

            def write(part, layer=layer):
                family.keep_experts(part, model, layer, kept)
                family.keep_router_rows(part, model, layer, kept)

            out.part(f"layer-{layer:03d}", write)
    return out.checkpoint


def quantized(
    model: Checkpoint, folder: Path, bits: int = 4, per_layer: Mapping[int, int] | None = None
) -> OverlayCheckpoint:
    """Packs experts, attention and dense layers; `per_layer` gives some layers' experts bits of their own."""
    family, other = family_of(model.config), per_layer or {}
    linears = list(family.linears(model))
    ignore = [linear.name.removesuffix(".weight") for linear in linears if linear.role not in ROLES]
    targets = [linear for linear in linears if linear.role in ROLES]
    bits_of = {x.name: other.get(x.layer, bits) if x.role == "expert" else bits for x in targets}
    extra = [
        Group([name.removesuffix(".weight") for name in bits_of if bits_of[name] == width], width, GROUP_SIZE)
        for width in sorted(set(bits_of.values()) - {bits})
    ]
    config = dict(model.config)
    config["quantization_config"] = quantization_config(bits, GROUP_SIZE, ignore, extra)
    with OverlayWriter(folder, model, config=config) as out:

        def write(part):
            for linear in targets:
                weight, bits = model.get(linear.name), bits_of[linear.name]
                codes, scale = quantize_rtn(weight.mT if linear.transposed else weight, bits, GROUP_SIZE)
                if weight.dim() == 2:
                    put_packed(part, linear.name, codes, scale, bits)
                else:
                    words, shape = pack_rows(codes, bits), weight.shape
                    put_packed_stack(part, linear.name, words, scale, shape, bits, linear.transposed)

        out.part("all", write)
    return out.checkpoint


def _mean(model: Checkpoint, layer: int, experts: list[int]) -> ExpertWeights:
    family = family_of(model.config)
    members = [family.read_expert(model, layer, expert) for expert in experts]
    return ExpertWeights(*(None if p[0] is None else torch.stack(p).mean(0) for p in zip(*members, strict=True)))
