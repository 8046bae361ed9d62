"""Loads a compact checkpoint of `moecli` through transformers' own model classes.

A compact checkpoint has the `model_type` and the tensor names of the original model and differs in:

* fewer experts than router rows in a layer, with an int64 buffer `....experts.alias_map` from row to expert;
* a number of experts that differs from layer to layer, with or without such a map;
* experts narrower than the config says, by layer or by expert; in memory they take what their channels take;
* matrices of experts that are products: `....experts.left.gate_proj` [E, O, r] and `....right....` [E, r, I] for the
  weights [O, I] of all experts, perhaps with `base`, `rows` and `rows_at`; they are run as they are stored;
* packed integers instead of a weight: `X.weight_packed`, `X.weight_scale`, `X.weight_shape` for `X.weight`;
* the same for all experts of a layer, 3-D where the model stacks them on disk: `X_packed` [E, N, W], `X_scale`
  [E, N, G] and `X_shape` [4], the last of which says whether `X` is [E, K, N] (K inputs, N outputs).

`config.json` says so in `quantization_config`:

    {"quant_method": "moecli", "experts": {"<layer>": M}, "rows": E or {"<layer>": R},
     "packed": what the integers are (this loader sees it in their shapes) or null, "guard": name or null,
     "widths": {"<layer>": [channels of each expert]},
     "factors": {"<layer>": [of gate, up and down: {"name": as on disk, "rank": r, "base": bool, "rows": n}]}}

Loading it takes `import moecli`, or `trust_remote_code=True` with this file beside the weights: the file
needs torch and transformers (5.17 to 5.x) only. Packed weights are unpacked while loading, so the model in memory
is dense; with `"memory": "packed"` experts stay packed, which takes moecli (`moecli.runtime.packed` says how).

With neither, transformers warns `Unknown quantization type, got moecli` and then raises `RuntimeError: You
set `ignore_mismatched_sizes` to `False`...`, because sizes disagree. A packed checkpoint, or one of
factors, has no size that disagrees: its weights would be missing and made up. So it also holds an empty tensor
under the name of a stock weight, `guard` in the config, which gives the same error; this loader takes it away.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moecli.families.alias import make_alias
from moecli.families.factored import make_factored
from moecli.families.ragged import narrow_experts

METHOD = "moecli"
GUARD_BUFFER = "moecli_guard"
PARTS = ("_packed", "_scale", "_shape")
STACKS = (".experts.gate_up_proj", ".experts.down_proj")
"""Names in the model, of every family, of the tensors that hold all experts of a layer."""


class CompactConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compact checkpoint; unknown keys are refused."""

    def __init__(
        self,
        experts: Mapping[str, int],
        rows: int | Mapping[str, int],
        packed: Mapping[str, Any] | None = None,
        guard: str | None = None,
        widths: Mapping[str, Sequence[int]] | None = None,
        factors: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        quant_method: str = METHOD,
        memory: str = "dense",
    ) -> None:
        if memory not in ("dense", "packed"):
            raise ValueError(f"`memory` of a checkpoint's experts is `dense` or `packed`, got `{memory}`")
        self.quant_method = quant_method
        self.memory = memory
        self.experts = {str(layer): int(count) for layer, count in experts.items()}
        self.rows = rows if isinstance(rows, int) else {str(layer): int(r) for layer, r in rows.items()}
        self.packed = packed
        self.guard = guard
        self.widths = {str(layer): [int(width) for width in found] for layer, found in (widths or {}).items()}
        self.factors = {str(layer): [dict(each) for each in found] for layer, found in (factors or {}).items()}

    def rows_of(self, layer: str) -> int:
        """Router rows of a layer."""
        return self.rows if isinstance(self.rows, int) else self.rows[layer]


class CompactQuantizer(HfQuantizer):
    """Gives the empty model the sizes of the checkpoint, and unpacks integers on the way in."""

    quantization_config: CompactConfig
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        blocks = moe_blocks(model)
        if unknown := sorted({*config.experts, *config.widths, *config.factors} - set(blocks)):
            raise ValueError(f"the checkpoint's config names layers without experts: {', '.join(unknown)}")
        if self._stays_packed:
            packed_runtime().refuse(config.widths, config.factors)
        for layer, experts in config.experts.items():
            resize_block(blocks[layer], experts, config.rows_of(layer))
        for layer, widths in config.widths.items():
            narrow_experts(blocks[layer].experts, widths)
        for layer, projections in config.factors.items():
            make_factored(blocks[layer].experts, projections)
        if config.guard:
            model.register_buffer(GUARD_BUFFER, torch.empty(0, dtype=torch.uint8, device="meta"))
        self._dtypes = wanted_dtypes(model)
        return model

    def update_weight_conversions(self, weight_conversions: list, *args: Any) -> list:
        """(conversions) in transformers 5.17, (conversions, model) later."""
        self._originals: dict[int, Any] = {}
        config, conversions = self.quantization_config, []
        keep = self._stays_packed
        guard = [guard_renaming(config.guard, "" if config.factors else "$")] if config.guard else []
        if not (config.packed or config.widths):
            return [*guard, *weight_conversions]
        for stock in weight_conversions:
            merging = by_width(stock) if config.widths else stock
            ours = [unpacking(merging, keep), *stack_renamings(stock)] if config.packed else [merging]
            self._originals |= {id(conversion): stock for conversion in ours}
            conversions += ours
        if not config.packed:
            return conversions
        return [*guard, *conversions, *packed_stacks(keep), packed_linears()]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if hasattr(model, GUARD_BUFFER) and not self.quantization_config.factors:  # those are saved as they are
            delattr(model, GUARD_BUFFER)
        if self._stays_packed:
            for block in moe_blocks(model).values():
                if block.experts.down_proj.dtype == torch.uint8:
                    packed_runtime().keep_packed(block.experts)
        elif self._originals:
            self._forget_packing(model)
        as_stock_would_cast(model, self._dtypes)
        return model

    def _forget_packing(self, model: nn.Module) -> None:
        """The model is dense now and `save_pretrained` writes it so: its config must not say packed."""
        used = [self._originals.get(id(conversion)) for conversion in model._weight_conversions]
        model._weight_conversions = list({id(stock): stock for stock in used if stock is not None}.values())
        self.quantization_config = copy.copy(self.quantization_config)
        self.quantization_config.packed = self.quantization_config.guard = None
        model.config.quantization_config = self.quantization_config

    @property
    def _stays_packed(self) -> bool:
        return bool(self.quantization_config.packed) and self.quantization_config.memory == "packed"

    def param_needs_quantization(self, model: nn.Module, name: str, **kwargs: Any) -> bool:
        """Whether a tensor of another size than the model's is meant: experts that stay packed."""
        return self._stays_packed and f".{name}".endswith(STACKS)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Not with several widths in one layer: stock conversions would write its flat tensors as they are. Nor packed:
        the checkpoint that was read is that already.
        """
        return not self._stays_packed and all(
            len(set(widths)) == 1 for widths in self.quantization_config.widths.values()
        )

    @property
    def is_trainable(self) -> bool:
        return not self._stays_packed


def packed_runtime() -> Any:
    """`moecli.runtime.packed`. Not part of the file beside the weights: kernels are files of their own."""
    try:
        return importlib.import_module("moecli.runtime.packed")
    except ImportError as error:
        raise ValueError("experts stay packed in memory where moecli is installed only; leave out `memory`") from error


# Sizes


def moe_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Layer index as text -> the module that has `experts`, where these are fused parameters."""
    blocks = {}
    for path, module in model.named_modules():
        experts = getattr(module, "experts", None)
        layer = next((part for part in path.split(".") if part.isdigit()), None)
        if layer is not None and isinstance(getattr(experts, "down_proj", None), nn.Parameter):
            blocks[layer] = module
    return blocks


def resize_block(block: nn.Module, experts: int, rows: int) -> None:
    """Let an MoE block on meta hold `experts` experts behind `rows` router rows, aliased if they differ."""
    stock = block.experts.num_experts
    if rows != stock:
        for path, module in block.named_modules():
            if path.split(".")[0] != "experts" and "shared" not in path:
                resize_router(module, stock, rows)
        resize_experts(block.experts, rows)
    if rows != experts:
        make_alias(block.experts, experts, rows)


def resize_experts(experts: nn.Module, count: int) -> None:
    """Replace each parameter [E, ...] by an empty [count, ...]."""
    for name, value in list(experts.named_parameters(recurse=False)):
        if value.shape[0] == experts.num_experts:
            setattr(experts, name, _empty(value, (count, *value.shape[1:])))
    experts.num_experts = count


def resize_router(module: nn.Module, stock: int, rows: int) -> None:
    """Replace each parameter and buffer [E, ...] or [1, E] by an empty one with `rows` for E."""
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.shape[0] == stock:
            setattr(module, name, _empty(value, (rows, *value.shape[1:])))
        elif tuple(value.shape) == (1, stock):
            setattr(module, name, _empty(value, (1, rows)))
    for name in ("num_experts", "n_routed_experts", "out_features"):
        if getattr(module, name, None) == stock:
            setattr(module, name, rows)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = torch.empty(shape, dtype=like.dtype, device=like.device)
    return nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value


# Packed integers


def unpack(packed: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    """codes * scale in the scale's dtype: symmetric `pack-quantized` of compressed-tensors, dense words.

    packed int32 [N, W], scale [N, G], shape int64 [2] = N, K. Bits are what fits: W = ceil(K * bits / 32), which tells
    them for K from 32 on. With 1 bit codes are -1 and 1.
    """
    columns = int(shape.flatten()[-1])
    bits = packed.shape[-1] * 32 // columns
    words = packed.to(torch.int64) & 0xFFFFFFFF
    if 32 % bits == 0:
        shifts = torch.arange(32 // bits, device=words.device) * bits
        unsigned = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :columns]
    else:
        stream = ((words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1).flatten(-2)
        stream = stream[..., : columns * bits].unflatten(-1, (columns, bits))
        unsigned = (stream << torch.arange(bits, device=words.device)).sum(-1)
    codes = (2 * unsigned - 1 if bits == 1 else unsigned - 2 ** (bits - 1)).to(scale.dtype)
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def unpack_stack(packed: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    """As `unpack`, expert by expert: packed [E, N, W], scale [E, N, G], shape [4] of the result and `transposed`.

    Unpacking takes 8 bytes for each code: those of one expert, not of a layer.
    """
    *sizes, transposed = shape.flatten().tolist()
    columns = shape.new_tensor([sizes[1] if transposed else sizes[2]])
    dense = torch.empty(sizes, dtype=scale.dtype, device=scale.device)
    for expert, codes, factors in zip(dense, packed, scale, strict=True):
        weight = unpack(codes, factors, columns)
        expert.copy_(weight.mT if transposed else weight)
    return dense


class Unpack(ConversionOps):
    """First operation of a converter that merges experts: packed sources become the dense ones it expects."""

    hf_quantizer = True  # tells transformers >= 5.18 not to cast what this reads

    def convert(self, input_dict: Mapping[str, Any], **kwargs: Any) -> dict[str, list[Tensor]]:
        """{source pattern: one tensor per expert}; the result has the patterns of the dense weights."""
        out = {}
        for source in dict.fromkeys(_stem(pattern) for pattern in input_dict):
            dense = _listed(input_dict.get(f"{source}$"))
            packed, scale, shape = (_listed(input_dict.get(f"{source}{part}$")) for part in PARTS)
            if dense and packed:
                raise ValueError(f"some experts of `{source}` are packed and some are not")
            out[f"{source}$"] = dense or [unpack(*parts) for parts in zip(packed, scale, shape, strict=True)]
        return out


class UnpackWhole(ConversionOps):
    """The three parts of one tensor become the tensor."""

    hf_quantizer = True

    def convert(
        self, input_dict: Mapping[str, Any], source_patterns: list[str], full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        """{source pattern: [tensor]} of all three patterns, in the order of PARTS."""
        packed, scale, shape = (_listed(input_dict[pattern])[0] for pattern in source_patterns)
        return {full_layer_name: (unpack_stack if packed.dim() == 3 else unpack)(packed, scale, shape)}


class KeepPacked(ConversionOps):
    """In place of a converter's operations: the packed experts of a layer become what `runtime.packed` runs on."""

    hf_quantizer = True

    def __init__(self, operations: list[ConversionOps]) -> None:
        self._operations = operations

    def convert(self, input_dict: Mapping[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """{source pattern: one tensor per expert}, or {target: [tensor]} of all experts for the three parts of one."""
        sources = list(dict.fromkeys(_stem(pattern) for pattern in input_dict))
        if not any(_listed(input_dict.get(f"{source}{PARTS[0]}$")) for source in sources):
            values: Any = Unpack().convert(input_dict)
            for operation in self._operations:
                values = operation.convert(values, target_patterns=target_patterns, **kwargs)
            return values
        if any(_listed(input_dict.get(f"{source}$")) for source in sources):
            raise ValueError(f"some experts of `{sources[0]}` are packed and some are not")
        matrices = [
            zip(*(_listed(input_dict.get(f"{source}{part}$")) for part in PARTS), strict=True) for source in sources
        ]
        return {target_patterns[0]: packed_runtime().kept(list(zip(*matrices, strict=True)))}


class KeepWhole(ConversionOps):
    """As `KeepPacked`, from the three parts of all experts."""

    hf_quantizer = True

    def convert(
        self, input_dict: Mapping[str, Any], source_patterns: list[str], full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        packed, scale, shape = (_listed(input_dict[pattern])[0] for pattern in source_patterns)
        columns = shape[1] if shape[3] else shape[2]
        return {
            full_layer_name: packed_runtime().kept(
                [[(words, s, columns)] for words, s in zip(packed, scale, strict=True)]
            )
        }


class ByWidth(ConversionOps):
    """A converter's operations on the experts of each width; of several, the results follow each other in one flat
    tensor, widest first, as `narrow_experts` has them.
    """

    hf_quantizer = True

    def __init__(self, operations: list[ConversionOps]) -> None:
        self._operations = operations

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """{source pattern: one tensor per expert}"""
        first = next(iter(input_dict.values()))
        sizes = [tensor.numel() for tensor in first] if isinstance(first, list) else [1]
        if len(set(sizes)) == 1 and sizes[0]:
            return self._merged(input_dict, target_patterns, **kwargs)
        flat = [first[0].new_empty(0)]
        for size in sorted({*sizes} - {0}, reverse=True):
            members = {
                source: [tensor for tensor, own in zip(tensors, sizes, strict=True) if own == size]
                for source, tensors in input_dict.items()
            }
            flat += [value.flatten() for value in self._merged(members, target_patterns, **kwargs).values()]
        return {target_patterns[0]: torch.cat(flat)}

    def _merged(self, values: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Tensor]:
        for operation in self._operations:
            values = operation.convert(values, target_patterns=target_patterns, **kwargs)
        return values


def packed_linears() -> WeightConverter:
    """Reads every packed weight that no converter of the model claims."""
    return _whole(".weight")


def packed_stacks(keep: bool = False) -> list[WeightConverter]:
    """Read the experts of a layer that are packed as one tensor, under their names in the model."""
    return [_whole(stack, keep) for stack in STACKS]


def _whole(name: str, keep: bool = False) -> WeightConverter:
    sources = [f"{re.escape(name)}{part}$" for part in PARTS]
    return WeightConverter(sources, name, [KeepWhole() if keep else UnpackWhole()])


def stack_renamings(conversion: Any) -> list[WeightRenaming]:
    """Where the model renames stacked experts: the same for their packed parts."""
    if not isinstance(conversion, WeightRenaming):
        return []
    (source, *others), target = conversion._original_source_patterns, conversion._original_target_patterns[0]
    if others or not f".{target}".endswith(STACKS):
        return []
    return [_scoped(WeightRenaming(f"{source.removesuffix('$')}{part}$", target + part), conversion) for part in PARTS]


def unpacking(conversion: Any, keep: bool = False) -> Any:
    """The same converter, reading packed weights as well; anything else as it is. `keep`: experts stay packed."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    stems = [source.removesuffix("$") for source in conversion._original_source_patterns]
    if not all(stem.endswith(".weight") for stem in stems):
        return conversion
    experts = f".{conversion._original_target_patterns[0]}".endswith(STACKS)
    changed = WeightConverter(
        [f"{stem}{part}$" for stem in stems for part in ("", *PARTS)],
        list(conversion._original_target_patterns),
        [KeepPacked(conversion.operations)] if keep and experts else [Unpack(), *conversion.operations],
    )
    return _scoped(changed, conversion)


def by_width(conversion: Any) -> Any:
    """The same converter, merging experts of several widths as well; anything else as it is."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    return _scoped(WeightConverter(list(sources), list(targets), [ByWidth(conversion.operations)]), conversion)


def _scoped(changed: Any, conversion: Any) -> Any:
    changed.scope_prefix, changed.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return changed


def guard_renaming(guard: str, end: str = "$") -> WeightRenaming:
    """Sends the empty tensor that stops stock transformers to a buffer, which is dropped after loading packed weights.
    Where it stays it is saved under its name, if `end` is empty: reversed patterns keep a `$`.
    """
    return WeightRenaming(f"^{re.escape(guard)}{end}", GUARD_BUFFER)


def _stem(pattern: str) -> str:
    pattern = pattern.removesuffix("$")
    return next((pattern.removesuffix(part) for part in PARTS if pattern.endswith(part)), pattern)


def _listed(value: Any) -> list[Tensor]:
    return [] if value is None else value if isinstance(value, list) else [value]


# Dtypes


def wanted_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """What each tensor of the empty model shall be: its own dtype, or float32 where the family says so."""
    plan = model._get_dtype_plan(torch.get_default_dtype())
    alternation, key_of, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    dtypes = {}
    for name, value in model.state_dict().items():
        match = alternation.search(name) if alternation else None
        dtypes[name] = plan[key_of[match.lastgroup]] if match else value.dtype
    return dtypes


def as_stock_would_cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast what transformers 5.17 read in the file's dtype because its name or format changed on the way."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        wanted = dtypes.get(name, value.dtype)
        if value.is_floating_point() and value.dtype != wanted and value.device.type != "meta":
            value.data = value.data.to(wanted)


# Registration


def register() -> None:
    """Make transformers know `quant_method: moecli`. Doing it twice does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CompactConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(CompactQuantizer)


class MoecliForCausalLM:
    """What `auto_map` names. Importing this file registered the loader; the model is of a stock class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to copy: `save_pretrained` of the stock class is asked later, not this one."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, *args, **(kwargs | {"trust_remote_code": False}))


register()
