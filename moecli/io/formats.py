"""compressed-tensors: the names and the config that transformers and vLLM read.

`pack-quantized`, for a linear `X` with weight [N, K], b bits and groups of g columns:

    X.weight_packed   int32 [N, ceil(K*b/32)]   dense little-endian stream of code + 2^(b-1); with 1 bit, which no stock
                                                reader knows as ours, 0 for -1 and 1 for 1
    X.weight_scale    model dtype [N, K/g]      ([N, 1] with one scale for each output channel)
    X.weight_shape    int64 [2] = [N, K]

Symmetric integers only. Two forms for small floats, whose inputs stay as they are:

    float-quantized        X.weight          float8_e4m3fn [N, K]
                           X.weight_scale    model dtype [N, 1], or [ceil(N/128), ceil(K/128)] in blocks
    mxfp4-pack-quantized   X.weight_packed   uint8 [N, K/2]    two e2m1 codes a byte, the first in the low half
                           X.weight_scale    uint8 [N, K/32]   exponent of a power of two, plus 127

Sources: compressed-tensors 0.18 to 0.20 (dense packing of odd widths since 0.18) and transformers'
`integrations/compressed_tensors.py`. Who reads which of them rightly: `io.servable`.

No stock reader has a packed form for a tensor that holds all experts of a layer. For those, `X` 3-D and E experts of
[N, K] in it, there is a form of our own, which only compact exports hold (`runner.export` sees to that):

    X_packed   int32 [E, N, ceil(K*b/32)]   as above, expert by expert; X keeps its name, `.weight` in it or not
    X_scale    model dtype [E, N, K/g]      ([E, N, 1] with one scale for each output channel)
    X_shape    int64 [4] = the three sizes of X, then 1 where X itself is [E, K, N], else 0

K is always the input width: `transposed` tensors (gpt_oss) are packed the other way round, so that one scale
belongs to the inputs of one output, as in the 2-D form. A scheme's targets match X as they match a linear.

Beside a packed 2-D `X.weight` there may be a correction of low rank r, which belongs to the model until it is exported
(`runner.adapters` writes it as a PEFT adapter):

    X.weight_lora_a   model dtype [r, K]        the weight is what is packed, plus lora_b lora_a
    X.weight_lora_b   model dtype [N, r]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from moecli.core.artifacts import Checkpoint, PartWriter
from moecli.core.errors import SurroundingsError
from moecli.core.model import TensorSpec
from moecli.io.durable import natural_key
from moecli.io.factors import unfactored
from moecli.io.gpt_oss_layout import METHOD as BLOCKS_METHOD
from moecli.io.gpt_oss_layout import without_blocks
from moecli.io.reader import Origin, StoredView
from moecli.io.servable import CHANNEL, Format
from moecli.ops.correction import corrected
from moecli.ops.floats import BLOCK, MX_GROUP
from moecli.ops.pack import pack_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = "compressed-tensors"
LAYOUTS: Mapping[Format, str] = {
    "int": "pack-quantized",
    "fp8": "float-quantized",
    "fp8_block": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
"""Formats that we write and read, and what compressed-tensors calls their layouts."""
FLOATS: Mapping[Format, tuple[int, int]] = {"fp8": (8, CHANNEL), "fp8_block": (8, BLOCK), "mxfp4": (4, MX_GROUP)}
"""Bits and group size of the formats that have no choice of them."""
VERSION = "0.18.0"
"""First release that packs 3-bit codes as we do; 1, 2, 4 and 8 bits are the same in all."""


class PackedNames(NamedTuple):
    """What replaces `X.weight`, or a stacked `X`."""

    packed: str
    scale: str
    shape: str


class Group(NamedTuple):
    """A scheme of its own for some linears, such as 8-bit attention beside 4-bit experts."""

    targets: Sequence[str]
    """Exact module names, or `re:` patterns."""
    bits: int
    group_size: int
    format: Format = "int"


def packed_names(weight_name: str) -> PackedNames:
    """Names for `X.weight`, or for a stacked tensor of any name."""
    return PackedNames(f"{weight_name}_packed", f"{weight_name}_scale", f"{weight_name}_shape")


class FactorNames(NamedTuple):
    """What corrects `X.weight`: b a is added to it."""

    a: str
    b: str


def factor_names(weight_name: str) -> FactorNames:
    """Names of the factors that correct a weight."""
    return FactorNames(f"{weight_name}_lora_a", f"{weight_name}_lora_b")


def corrected_weights(names: Iterable[str]) -> set[str]:
    """The weights that these on-disk names hold factors for."""
    return {name.removesuffix("_lora_b") for name in names if name.endswith("_lora_b")}


def quantization_config(
    bits: int,
    group_size: int,
    ignore: Sequence[str] = (),
    extra_groups: Sequence[Group] = (),
    format: Format = "int",
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json. `group_size` CHANNEL means one scale a row.

    Every linear gets `bits` and `group_size` in this `format`, unless it is in `ignore` (module names on disk, or `re:`
    patterns: each router, lm_head) or in one of `extra_groups`. ValueError for an extra group whose `re:`
    pattern contains "experts": transformers would take it for the scheme of the routed experts.
    """
    for group in extra_groups:
        for target in group.targets:
            if target.startswith("re:") and "experts" in target:
                raise ValueError(f"`{target}` would be read as the routed experts' scheme; write `expert[s]` in it")
    groups = [Group(["Linear"], bits, group_size, format), *extra_groups]
    layouts = {LAYOUTS[group.format] for group in groups}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _group(targets: Sequence[str], bits: int, group_size: int, format: Format) -> dict[str, Any]:
    strategy = "channel" if group_size == CHANNEL else "block" if format == "fp8_block" else "group"
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int" if format == "int" else "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size if strategy == "group" else None,
        "dynamic": False,
        "actorder": None,
    }
    if strategy == "block":
        weights["block_structure"] = [group_size, group_size]
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": LAYOUTS[format],
    }


def packed_specs(
    weight_name: str, spec: TensorSpec, bits: int, group_size: int, transposed: bool = False
) -> dict[str, TensorSpec]:
    """What stands on disk for a weight [N, K] or [E, N, K] of this spec, scales in its dtype.

    `group_size` divides K. `transposed`: the spec is [E, K, N].
    """
    *experts, rows, columns = _logical(spec.shape, transposed)
    groups = 1 if group_size == CHANNEL else columns // group_size
    names = packed_names(weight_name)
    return {
        names.packed: TensorSpec("int32", (*experts, rows, -(-columns * bits // 32))),
        names.scale: TensorSpec(spec.dtype, (*experts, rows, groups)),
        names.shape: TensorSpec("int64", (4 if experts else 2,)),
    }


def float_specs(weight_name: str, spec: TensorSpec, format: Format) -> dict[str, TensorSpec]:
    """What stands on disk for a weight [N, K] of this spec as small floats."""
    names, (rows, columns) = packed_names(weight_name), spec.shape
    if format == "mxfp4":
        scale = TensorSpec("uint8", (rows, columns // MX_GROUP))
        return {names.packed: TensorSpec("uint8", (rows, columns // 2)), names.scale: scale}
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK)) if format == "fp8_block" else (rows, 1)
    return {weight_name: TensorSpec("float8_e4m3fn", spec.shape), names.scale: TensorSpec(spec.dtype, blocks)}


def unpacked_spec(
    weight_name: str, specs: Mapping[str, TensorSpec], schemes: Schemes, transposed: bool = False
) -> TensorSpec:
    """Inverse of `packed_specs` and `float_specs`: the weight, from the specs of what stands on disk and the config's
    schemes. MXFP4 does not say its dtype: bfloat16, which stock loaders read it as.
    """
    names, scheme = packed_names(weight_name), scheme_of(weight_name, schemes)
    if scheme.format == "mxfp4":
        rows, halves = specs[names.packed].shape
        return TensorSpec("bfloat16", (rows, 2 * halves))
    if scheme.format != "int":
        return TensorSpec(specs[names.scale].dtype, specs[weight_name].shape)
    packed, scale = specs[names.packed], specs[names.scale]
    per_scale = scheme.group_size if scheme.group_size != CHANNEL else packed.shape[-1] * 32 // scheme.bits
    shape = (*packed.shape[:-1], scale.shape[-1] * per_scale)
    return TensorSpec(scale.dtype, _logical(shape, transposed))


def put_packed(part: PartWriter, weight_name: str, codes_NK: Tensor, scale_NG: Tensor, bits: int) -> None:
    """Write codes and scales in place of the parent's 2-D weight."""
    put_words(part, weight_name, pack_rows(codes_NK, bits), scale_NG, codes_NK.shape, bits)


def put_packed_stack(
    part: PartWriter, weight_name: str, packed_ENW: Tensor, scale_ENG: Tensor,
    shape: Sequence[int], bits: int, transposed: bool = False,
) -> None:  # fmt: skip
    """Write what `pack_rows` made of each expert in place of the parent's tensor, which has this `shape`.

    `transposed`: it is [E, K, N].
    """
    put_words(part, weight_name, packed_ENW, scale_ENG, (*shape, int(transposed)), bits)


def put_words(
    part: PartWriter, weight_name: str, packed: Tensor, scale: Tensor, shape: Sequence[int], bits: int
) -> None:
    """Write what `pack_rows` made of a 2-D weight of this shape in place of it."""
    import torch

    names = packed_names(weight_name)
    part.drop(weight_name, f"packed to {bits} bits")
    part.put(names.packed, packed)
    part.put(names.scale, scale)
    part.put(names.shape, torch.tensor(shape, dtype=torch.int64))


def put_floats(part: PartWriter, weight_name: str, codes: Tensor, scale: Tensor, format: Format) -> None:
    """Write what `ops.floats` made of a 2-D weight in place of it."""
    names = packed_names(weight_name)
    if format == "mxfp4":
        part.drop(weight_name, "packed to MXFP4")
    part.put(names.packed if format == "mxfp4" else weight_name, codes)
    part.put(names.scale, scale)


def _logical(shape: Sequence[int], transposed: bool) -> tuple[int, ...]:
    """[..., N, K] from the shape on disk."""
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)


def is_packed(checkpoint: Checkpoint, weight_name: str) -> bool:
    """Whether `X.weight`, or a stacked `X`, is stored packed."""
    return packed_names(weight_name).packed in checkpoint


def packed_weights(names: Iterable[str]) -> set[str]:
    """The weights that these on-disk names hold packed, or as FP8 beside a scale."""
    known = set(names)
    beside = {name.removesuffix("_scale") for name in known if name.endswith(".weight_scale")}
    return {name.removesuffix("_packed") for name in known if name.endswith("_packed")} | (beside & known)


def format_of(weight_name: str, specs: Mapping[str, TensorSpec]) -> Format:
    """How one of `packed_weights` is stored: the tensors beside it tell. FP8 in blocks counts as `fp8` here."""
    packed = specs.get(packed_names(weight_name).packed)
    return "fp8" if packed is None else "mxfp4" if packed.dtype == "uint8" else "int"


def parts_of(weight_name: str, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Names of the tensors that hold one of `packed_weights`, those that should be there included."""
    names = packed_names(weight_name)
    return {"int": tuple(names), "mxfp4": (names.packed, names.scale), "fp8": (weight_name, names.scale)}[
        format_of(weight_name, specs)
    ]


class DenseView(StoredView):
    """A checkpoint whose packed weights read as ordinary ones, dequantized and corrected when asked for.

    Config and facts are those of the dense model. A checkpoint without packed tensors reads as it is, and a
    compact export as the alias checkpoint it was made from. Experts stored as factors read multiplied
    out (`io.factors`), GPTQ's layout like ours (`io.gptq_layout`), gpt_oss's blocks dense (`io.gpt_oss_layout`).
    SurroundingsError when it is quantized in a way this view does not know.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from moecli.io.gptq_layout import unpacked_gptq  # which shows its weights under the names of this module

        self.parent = unfactored(without_blocks(unpacked_gptq(checkpoint)))
        self.facts_of = self.parent.facts_of
        config = dict(self.parent.config)
        guard = _unwrapped(config.get("quantization_config"))[1]
        self._schemes = schemes_of(config)
        config.pop("quantization_config", None)
        self._shapes: dict[str, list[int]] = {}
        self.config: Mapping[str, Any] = config
        self.facts = self.facts_of(config)
        self._packed = packed_weights(self.parent.names())
        self._corrected = corrected_weights(self.parent.names())
        specs = {part: self.parent.spec(part) for part in self.parent.names() if part.endswith("_packed")}
        self._formats = {name: format_of(name, specs) for name in self._packed}
        hidden = {part for name in self._packed for part in parts_of(name, specs)}
        hidden |= {part for name in self._corrected for part in factor_names(name)}
        shown = {name for name in self.parent.names() if name not in hidden and name != guard}
        self._names = dict.fromkeys(sorted(self._packed | shown, key=natural_key))
        self._refuse_the_unknown(hidden)

    def _refuse_the_unknown(self, hidden: set[str]) -> None:
        for name in sorted(hidden):
            if name not in self.parent:
                raise SurroundingsError(f"the checkpoint has packed weights but no `{name}`")
        for name in sorted(self._packed):
            for suffix in ("zero_point", "g_idx"):
                if f"{name}_{suffix}" in self.parent:
                    raise SurroundingsError(f"`{name}` is packed with `{suffix}`, which moecli does not read")

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        if name not in self._packed:
            return self.parent.spec(self._known(name))
        names, format = packed_names(name), self._formats[name]
        if format == "mxfp4":
            rows, halves = self.parent.spec(names.packed).shape
            return TensorSpec(self.facts.dtype, (rows, 2 * halves))
        shape = self._shape(name)[0] if format == "int" else self.parent.spec(name).shape
        return TensorSpec(self.parent.spec(names.scale).dtype, shape)

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        if name not in self._packed:
            return self.parent.get(self._known(name), device)
        codes, scale = self._codes_and_scale(name)
        dense = self._dense(name, self.parent.get(codes, device), self.parent.get(scale, device))
        if name not in self._corrected:
            return dense
        a_rK, b_Nr = (self.parent.get(factor, device) for factor in factor_names(name))
        return corrected(dense, b_Nr, a_rK)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._packed:
            return self.parent.rows(self._known(name), start, stop)
        codes, scale = self._codes_and_scale(name)
        if self._scheme(name).format == "fp8_block":  # rows share scales
            return self.get(name)[start:stop]
        dense = self._dense(name, self.parent.rows(codes, start, stop), self.parent.rows(scale, start, stop))
        if name not in self._corrected:
            return dense
        a, b = factor_names(name)
        return corrected(dense, self.parent.rows(b, start, stop), self.parent.get(a))

    def origin(self, name: str) -> Origin:
        """Dequantized tensors are in no file as they are: ("own", name)."""
        return ("own", name) if name in self._packed else self.parent.origin(self._known(name))

    def _codes_and_scale(self, name: str) -> tuple[str, str]:
        names = packed_names(name)
        return name if self._formats[name] == "fp8" else names.packed, names.scale

    def bits(self, name: str) -> int:
        """Bits of a packed weight, by the config's groups. SurroundingsError when none of them covers it."""
        return self._scheme(name).bits

    def group_size(self, name: str) -> int:
        """Inputs that share a scale in a packed weight."""
        if self._formats[name] != "int":
            found = self._scheme(name).group_size
            return self.spec(name).shape[-1] if found == CHANNEL else found
        shape, transposed = self._shape(name)
        return _logical(shape, transposed)[-1] // self.parent.spec(packed_names(name).scale).shape[-1]

    def logical(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a weight packed as integers."""
        rows, columns = _logical(*self._shape(name))[-2:]
        return rows, columns

    def _shape(self, name: str) -> tuple[tuple[int, ...], bool]:
        """Shape of the dense tensor, and whether its inputs come before its outputs."""
        if name not in self._shapes:
            self._shapes[name] = self.parent.get(packed_names(name).shape).tolist()
        found = self._shapes[name]
        return (tuple(found[:3]), bool(found[3])) if len(found) == 4 else (tuple(found), False)

    def _scheme(self, name: str) -> Group:
        return scheme_of(name, self._schemes)

    def _dense(self, name: str, packed_NW: Tensor, scale_NG: Tensor) -> Tensor:
        import torch

        from moecli.ops.floats import dequantize_fp8, dequantize_mxfp4
        from moecli.ops.pack import dequantize, unpack_rows

        format = self._scheme(name).format
        if format == "mxfp4":
            return dequantize_mxfp4(packed_NW, scale_NG, getattr(torch, self.facts.dtype))
        if format != "int":
            return dequantize_fp8(packed_NW, scale_NG, format == "fp8_block")
        bits = self._scheme(name).bits
        shape, transposed = self._shape(name)
        columns = _logical(shape, transposed)[-1]
        words = -(-columns * bits // 32)
        if packed_NW.shape[-1] != words:
            raise SurroundingsError(f"`{name}` needs {words} words a row at {bits} bits, it has {packed_NW.shape[-1]}")
        if len(shape) == 2:
            return dequantize(unpack_rows(packed_NW, bits, columns), scale_NG)
        # Expert by expert: unpacking takes 8 bytes for each code.
        dense = scale_NG.new_empty((len(packed_NW), *shape[1:]))
        for expert, packed, scale in zip(dense, packed_NW, scale_NG, strict=True):
            weight_NK = dequantize(unpack_rows(packed, bits, columns), scale)
            expert.copy_(weight_NK.mT if transposed else weight_NK)
        return dense

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(f"no tensor `{name}`")
        return name


def _unwrapped(config: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, str | None]:
    """The packed format inside a compact export's `quantization_config`, and its guard: an empty tensor that
    is there for other readers. Any other config is returned as it is."""
    if config is None or config.get("quant_method") != "moecli":
        return config, None
    return config.get("packed"), config.get("guard")


class Schemes(tuple[Group, ...]):
    """The groups of a config.json. A mix of bits names each expert's weights, so names are looked up, not searched."""

    def named(self, module: str) -> Group | None:
        """The first group with exactly this target."""
        return self._named.get(module)

    @cached_property
    def others(self) -> list[tuple[str, Group]]:
        """Targets that stand for several modules."""
        return [(t, group) for group in self for t in group.targets if t == "Linear" or t.startswith("re:")]

    @cached_property
    def _named(self) -> dict[str, Group]:
        return {target: group for group in reversed(self) for target in group.targets}


def scheme_of(name: str, schemes: Schemes) -> Group:
    """How a packed weight is packed: the group that names it, else one whose pattern does, else its class's.

    SurroundingsError when there is none.
    """
    module = name.removesuffix(".weight")
    if group := schemes.named(module):
        return group
    for matches in (_matches_pattern, _matches_class):
        for target, group in schemes.others:
            if matches(module, target):
                return group
    raise SurroundingsError(f"`{name}` is packed, but no config group of `quantization_config` covers it")


def schemes_of(model_config: Mapping[str, Any]) -> Schemes:
    """The groups in a config.json, a compact export's too; none for an unquantized model.

    SurroundingsError when it is quantized in a way that DenseView does not know.
    """
    config = _unwrapped(model_config.get("quantization_config"))[0]
    if config is None:
        return Schemes()
    if config.get("quant_method") == BLOCKS_METHOD:
        return Schemes([Group(("Linear",), *FLOATS["mxfp4"], "mxfp4")])
    if config.get("quant_method") != METHOD:
        raise SurroundingsError(f"weights quantized by `{config.get('quant_method')}` cannot be read as dense ones")
    return Schemes(_read_groups(config))


def _read_groups(config: Mapping[str, Any]) -> Iterator[Group]:
    for name, group in config["config_groups"].items():
        weights, layout = group["weights"], group.get("format") or config.get("format")
        format = _format(weights, layout)
        if format is None or group.get("input_activations"):
            balance = "symmetric" if weights["symmetric"] else "asymmetric"
            inputs = " with rounded inputs" if group.get("input_activations") else ""
            raise SurroundingsError(
                f"`{name}` of `quantization_config` is {balance} {weights['type']} in `{layout}`{inputs}; "
                f"moecli reads symmetric int in `{LAYOUTS['int']}`, and {' and '.join(FLOATS)} of its own"
            )
        group_size = FLOATS[format][1] if format in FLOATS else weights["group_size"] or CHANNEL
        yield Group(tuple(group["targets"]), weights["num_bits"], group_size, format)


def _format(weights: Mapping[str, Any], layout: str | None) -> Format | None:
    """Which format of LAYOUTS a config group has, if any."""
    kind = (weights["type"], weights["num_bits"], weights["strategy"], weights["symmetric"])
    if layout == LAYOUTS["int"] and weights["type"] == "int" and weights["symmetric"]:
        return "int"
    if layout == LAYOUTS["mxfp4"] and kind == ("float", 4, "group", True) and weights["group_size"] == MX_GROUP:
        return "mxfp4"
    if layout == LAYOUTS["fp8"] and kind == ("float", 8, "channel", True):
        return "fp8"
    whole = [BLOCK, BLOCK]
    if layout == LAYOUTS["fp8"] and kind == ("float", 8, "block", True) and weights.get("block_structure") == whole:
        return "fp8_block"
    return None


def _matches_pattern(module: str, target: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _matches_class(module: str, target: str) -> bool:
    """Class names hold for every packed tensor: only linears, and experts that are some, are packed."""
    return target == "Linear"
