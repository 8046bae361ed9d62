"""GPTQ's checkpoint layout: the codes of `pack-quantized` under older names, for engines that look for those.

For a linear `X` with weight [N, K], b bits and groups of g inputs:

    X.qweight   int32 [K*b/32, N]     words of `X.weight_packed`, transposed: code + 2^(b-1), 3 bits 32 codes in 3 words
    X.qzeros    int32 [K/g, N*b/32]   the zero point 2^(b-1) of each output, packed along N; version 1 holds one less
    X.scales    float16 [K/g, N]
    X.g_idx     int32 [K]             group of each input, here always k // g

`quantization_config` has bits and groups for all modules, and in `dynamic` those of modules that differ: regular
expressions, matched from the start of a module's name, `-:` in front of those for modules that stay dense. Engines ask
it for fused modules too (`self_attn.qkv_proj`, `mlp.experts`), so a rule names the highest module whose linears are all
alike.

`GptqView` shows a packed checkpoint so, and `unpacked_gptq` reads such a checkpoint as a packed one again, both without
loss: a scale that float16 does not hold exactly is refused. What others wrote is read where it is symmetric and its
inputs are in order; scales then take the model's dtype, as engines load them. Exports are of version 1: vLLM's CPU
build takes zero points of both for those of version 1, and computes something else from version 2 without a word.

Sources: GPTQModel and AutoGPTQ (`pack`), vLLM 0.32 `quantization/auto_gptq.py` and `utils/gptq_utils.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import StageFailed, SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.durable import natural_key
from moecli.io.formats import (
    Group,
    packed_names,
    packed_weights,
    quantization_config,
    scheme_of,
    schemes_of,
)
from moecli.io.reader import Origin, StoredCheckpoint, StoredView, stored
from moecli.io.servable import CHANNEL
from moecli.ops.pack import pack_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = "gptq"
Version = Literal["gptq", "gptq_v2"]
"""As `checkpoint_format` calls them."""
VERSIONS: tuple[Version, ...] = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
"""That symmetric codes may have here; those of 1 bit lie on both sides of zero."""


class GptqNames(NamedTuple):
    """What replaces `X.weight`."""

    qweight: str
    qzeros: str
    scales: str
    g_idx: str


def gptq_names(weight_name: str) -> GptqNames:
    """Names for `X.weight`."""
    module = weight_name.removesuffix(".weight")
    return GptqNames(*(f"{module}.{part}" for part in GptqNames._fields))


def gptq_version(config: Mapping[str, Any]) -> Version | None:
    """Which version of the layout a config.json says its weights have; None for none."""
    found = config.get("quantization_config") or {}
    if found.get("quant_method") != METHOD:
        return None
    version = found.get("checkpoint_format") or "gptq"
    if version not in VERSIONS:
        raise SurroundingsError(f"`checkpoint_format: {version}` is a GPTQ layout that moecli does not read")
    return version


# -- written ----


def why_no_gptq(weight_name: str, specs: Mapping[str, TensorSpec], scheme: Group) -> str | None:
    """Why a packed weight has no place in this layout, as the end of "`X` ..."."""
    names, bits = packed_names(weight_name), scheme.bits
    if bits not in BITS:
        return f"has codes of {bits} bit, which the layout has no zero point for"
    if len(specs[names.packed].shape) != 2:
        return "holds all experts of a layer, which the layout does not know"
    (rows, words), groups = specs[names.packed].shape, specs[names.scale].shape[-1]
    columns = words * 32 // bits if scheme.group_size == CHANNEL else groups * scheme.group_size
    if columns * bits % 32 or rows * bits % 32:
        return f"is [{rows}, {columns}], and the layout wants 32 bits to divide both ways at {bits} bits"
    return None


def gptq_specs(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """What `GptqView` shows of a checkpoint with these specs; none of its weights may fail `why_no_gptq`."""
    new, schemes = dict(specs), schemes_of(config)
    for weight in packed_weights(specs):
        parts, bits = packed_names(weight), scheme_of(weight, schemes).bits
        (rows, words), groups = new.pop(parts.packed).shape, new.pop(parts.scale).shape[1]
        del new[parts.shape]
        names = gptq_names(weight)
        new |= {
            names.qweight: TensorSpec("int32", (words, rows)),
            names.qzeros: TensorSpec("int32", (groups, rows * bits // 32)),
            names.scales: TensorSpec("float16", (groups, rows)),
            names.g_idx: TensorSpec("int32", (words * 32 // bits,)),
        }
    return {name: new[name] for name in sorted(new, key=natural_key)}


def gptq_config(config: Mapping[str, Any], weights: Iterable[str], version: Version) -> dict[str, Any]:
    """config.json of a packed model for this layout: most weights' bits and groups, and `dynamic` for the others."""
    packed, schemes = config["quantization_config"], schemes_of(config)
    schemes_by_module: dict[str, Scheme | None] = dict.fromkeys(packed["ignore"])
    for weight in sorted(weights, key=natural_key):
        found = scheme_of(weight, schemes)
        schemes_by_module[weight.removesuffix(".weight")] = Scheme(found.bits, found.group_size)
    most = Counter(filter(None, schemes_by_module.values())).most_common(1)[0][0]
    rules = {}
    for pattern, scheme in _rules(schemes_by_module, most).items():
        rules[f"{'+' if scheme else '-'}:{pattern}"] = scheme._asdict() if scheme else {}
    return {
        "quant_method": METHOD,
        "checkpoint_format": version,
        **most._asdict(),
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
    }


class Scheme(NamedTuple):
    """How a module is packed, in the words of this layout's config."""

    bits: int
    group_size: int


def _rules(schemes: Mapping[str, Scheme | None], most: Scheme) -> dict[str, Scheme | None]:
    """Patterns for all modules whose scheme is not `most`; none of them matches a module of another scheme."""
    rules: dict[str, Scheme | None] = {}
    for module, scheme in schemes.items():
        if scheme == most or any(re.match(pattern, module) for pattern in rules):
            continue
        alike = (p for p in _patterns(module) if all(s == scheme for m, s in schemes.items() if re.match(p, m)))
        rules[next(alike)] = scheme
    return rules


def _patterns(module: str) -> Iterator[str]:
    """Of modules that hold this one, the highest first, each in all layers and then in its own; last the module."""
    steps = module.split(".")
    for depth in range(1, len(steps) + 1):
        path = re.escape(".".join(steps[:depth])) + r"(\.|$)"
        yield re.sub(r"\\\.layers\\\.\d+", r"\\.layers\\.\\d+", path)
        yield path


class GptqView(StoredView):
    """A checkpoint packed as `pack-quantized`, shown in this layout. None of its weights fails `why_no_gptq`."""

    def __init__(self, checkpoint: Checkpoint, version: Version = "gptq") -> None:
        self.parent = stored(checkpoint)
        self.facts_of = self.parent.facts_of
        specs = {name: self.parent.spec(name) for name in self.parent.names()}
        self._specs = gptq_specs(specs, self.parent.config)
        self._zero = -1 if version == "gptq" else 0
        self._schemes = schemes_of(self.parent.config)
        weights = packed_weights(specs)
        self._weight = {part: weight for weight in weights for part in gptq_names(weight)}
        config = gptq_config(self.parent.config, weights, version)
        self.config: Mapping[str, Any] = dict(self.parent.config) | {"quantization_config": config}
        self.facts = self.facts_of(self.config)

    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        import torch

        if name not in self._weight:
            return self.parent.get(name, device)
        weight = self._weight[name]
        parts, names, spec = packed_names(weight), gptq_names(weight), self._specs[name]
        if name == names.qweight:
            return self.parent.get(parts.packed, device).T.contiguous()
        if name == names.scales:
            return _halves(parts.scale, self.parent.get(parts.scale, device)).T.contiguous()
        groups, rows = self._specs[names.scales].shape
        if name == names.g_idx:
            return torch.arange(spec.numel, dtype=torch.int32, device=device) // (spec.numel // groups)
        zeros = torch.full((groups, rows), self._zero, dtype=torch.int8, device=device)
        return pack_rows(zeros, scheme_of(weight, self._schemes).bits)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.get(name)[start:stop] if name in self._weight else self.parent.rows(name, start, stop)

    def origin(self, name: str) -> Origin:
        return ("own", name) if name in self._weight else self.parent.origin(name)


def _halves(name: str, scale: Tensor) -> Tensor:
    """The same scales in float16. StageFailed where that is not exact: below 2^-17, and above 65504."""
    import torch

    half = scale.to(torch.float16)
    if bool((wrong := half.to(scale.dtype) != scale).any()):
        value = scale[wrong].flatten()[0].item()
        raise StageFailed(
            f"`{name}` has the scale {value:.3g}, which float16, the scales of GPTQ's layout, does not hold exactly",
            hint="write `export: stock`",
        )
    return half


# -- read ----


def unpacked_gptq(checkpoint: Checkpoint) -> StoredCheckpoint:
    """A checkpoint in this layout as one in `pack-quantized`; any other is returned as it is.

    SurroundingsError for zero points or an order of inputs that `pack-quantized` has no place for.
    """
    version = gptq_version(checkpoint.config)
    return stored(checkpoint) if version is None else _Packed(checkpoint, version)


class _Packed(StoredView):
    """Inverse of `GptqView`."""

    def __init__(self, checkpoint: Checkpoint, version: Version) -> None:
        self.parent = stored(checkpoint)
        self.facts_of = self.parent.facts_of
        found = self.parent.config["quantization_config"]
        _refuse_the_unsymmetric(found)
        self._zero = -1 if version == "gptq" else 0
        names = set(self.parent.names())
        weights = {f"{name.removesuffix('.qweight')}.weight" for name in names if name.endswith(".qweight")}
        self._schemes = {weight: _scheme(weight.removesuffix(".weight"), found) for weight in weights}
        self._weight = {part: weight for weight in weights for part in packed_names(weight)}
        hidden = {part for weight in weights for part in gptq_names(weight)}
        if missing := sorted(hidden - names, key=natural_key):
            raise SurroundingsError(f"the checkpoint has packed weights but no `{missing[0]}`")
        self._names = dict.fromkeys(sorted((names - hidden) | set(self._weight), key=natural_key))
        self.config: Mapping[str, Any] = dict(self.parent.config) | {"quantization_config": self._config(found)}
        self.facts = self.facts_of(self.config)
        self._checked: set[str] = set()

    def _config(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Each weight in the group of its scheme, by name; nothing else is packed."""
        groups: dict[Scheme, list[str]] = {}
        for weight, scheme in sorted(self._schemes.items(), key=lambda item: natural_key(item[0])):
            groups.setdefault(scheme, []).append(weight.removesuffix(".weight"))
        most = Scheme(found["bits"], found["group_size"])
        extra = [Group(modules, *scheme) for scheme, modules in groups.items() if scheme != most]
        return quantization_config(*most, extra_groups=extra)

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        if name not in self._weight:
            return self.parent.spec(name)
        parts, names = packed_names(self._weight[name]), gptq_names(self._weight[name])
        if name == parts.shape:
            return TensorSpec("int64", (2,))
        spec = self.parent.spec(names.qweight if name == parts.packed else names.scales)
        return TensorSpec("int32" if name == parts.packed else self.facts.dtype, spec.shape[::-1])

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        import torch

        if name not in self._weight:
            return self.parent.get(name, device)
        weight = self._weight[name]
        parts, names = packed_names(weight), gptq_names(weight)
        if name == parts.shape:
            words, rows = self.parent.spec(names.qweight).shape
            return torch.tensor([rows, words * 32 // self._schemes[weight].bits], device=device)
        self._check(weight)
        if name == parts.packed:
            return self.parent.get(names.qweight, device).T.contiguous()
        return self.parent.get(names.scales, device).T.contiguous().to(getattr(torch, self.facts.dtype))

    def _check(self, weight: str) -> None:
        """Zero points are those of symmetric codes, and inputs are in order."""
        import torch

        if weight in self._checked:
            return
        names, bits = gptq_names(weight), self._schemes[weight].bits
        (words, rows), (groups, _) = self.parent.spec(names.qweight).shape, self.parent.spec(names.scales).shape
        zeros = pack_rows(torch.full((groups, rows), self._zero, dtype=torch.int8), bits)
        if not torch.equal(self.parent.get(names.qzeros), zeros):
            raise SurroundingsError(f"`{names.qzeros}` has other zero points than symmetric codes of {bits} bits")
        columns = words * 32 // bits
        if not torch.equal(self.parent.get(names.g_idx).long(), torch.arange(columns) // -(-columns // groups)):
            raise SurroundingsError(f"`{names.g_idx}` puts inputs into groups out of order, which moecli does not read")
        self._checked.add(weight)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.get(name)[start:stop] if name in self._weight else self.parent.rows(name, start, stop)

    def origin(self, name: str) -> Origin:
        return ("own", name) if name in self._weight else self.parent.origin(name)


def _refuse_the_unsymmetric(found: Mapping[str, Any]) -> None:
    if not found.get("sym", True) or found.get("desc_act"):
        what = "asymmetric codes" if not found.get("sym", True) else "inputs out of order (`desc_act`)"
        raise SurroundingsError(f"`quantization_config` is GPTQ's layout with {what}, which moecli does not read")


def _scheme(module: str, found: Mapping[str, Any]) -> Scheme:
    """What the config says of a module that has codes: the first rule that matches counts."""
    scheme = Scheme(found["bits"], found["group_size"])
    for rule, values in (found.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), module):
            if rule.startswith("-:"):
                raise SurroundingsError(f"`{module}` has codes, and the rule `{rule}` of `dynamic` leaves it dense")
            _refuse_the_unsymmetric(values)
            scheme = Scheme(values.get("bits", scheme.bits), values.get("group_size", scheme.group_size))
            break
    if scheme.bits not in BITS:
        raise SurroundingsError(f"`{module}` has codes of {scheme.bits} bits, moecli reads {BITS}")
    return scheme
