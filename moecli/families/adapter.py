"""The one module that touches semi-public parts of transformers: build without weights, load by layer, load
whole.

Tested on transformers 5.17 and the newest 5.x. Everything goes through transformers' own weight conversion,
so a model loaded here is bit-equal to `from_pretrained` on the same tensors, but the tensors may come from
any `Checkpoint`: a folder, an overlay chain, a dequantizing view, an alias checkpoint.

Three kinds of names meet here: *on-disk* names (what a Checkpoint lists), *model* names (what `state_dict`
lists) and decoder layers; `TensorMap` is the bridge.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.families.alias import make_alias
from moecli.families.factored import make_factored
from moecli.families.family import ALIAS_KEY, FAMILIES, WIDTHS_KEY, family_of
from moecli.families.ragged import narrow_experts
from moecli.families.widths import padded
from moecli.io.factors import FACTORS_KEY, FactoredView, factor_tensors
from moecli.io.formats import DenseView, packed_weights
from moecli.io.gpt_oss_layout import METHOD as BLOCKS
from moecli.io.gptq_layout import METHOD as GPTQ

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_NOT_FOR_STOCK = ("quantization_config", "auto_map")
_LONGEST = 300
"""Characters of a library's message that are shown."""


# --- building -------------------------------------------------------------------------------------


def empty_model(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of `config` in eval mode: parameters on meta, buffers real (rotary frequencies are nowhere
    else).

    `dtype` defaults to the config's, then float32. `quantization_config` and `auto_map` are set aside:
    tensors are expected dense, and a checkpoint that is not fails loudly when it is loaded. Alias layers
    are already in place. SurroundingsError when the config's values make no model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    parsed = parse_config(config)
    dtype = dtype or parsed.dtype or torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype)
    except (KeyError, ValueError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {_one_line(error)}"
        raise SurroundingsError(f"transformers builds no model from config.json ({said})") from error
    _apply_aliases(model, config)
    return model.eval()


def parse_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The stock config object of a `config.json`. SurroundingsError when transformers does not know the
    type or refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, __version__

    model_type = config.get("model_type")
    try:
        config_class = CONFIG_MAPPING[model_type]
    except KeyError:
        raise SurroundingsError(f"transformers {__version__} has no model type `{model_type}`") from None
    try:
        return config_class.from_dict({k: v for k, v in config.items() if k not in _NOT_FOR_STOCK})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise SurroundingsError(f"transformers {__version__} refuses config.json: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """What somebody else's exception says, in one line without a full stop."""
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."


def _apply_aliases(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    layers = decoder_layers(model)[1]
    for layer, experts in config.get(ALIAS_KEY, {}).items():
        parts = moe_parts(layers[int(layer)])
        if parts is None:
            raise SurroundingsError(f"`{ALIAS_KEY}` names layer {layer}, which has no experts")
        make_alias(parts.experts, int(experts), parts.experts.num_experts)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Module path and list of the decoder layers: the shallowest ModuleList called `layers`, else the
    shallowest.
    """
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        raise SurroundingsError(f"no decoder layers found in `{type(model).__name__}`")
    return min(found, key=lambda item: (not item[0].endswith("layers"), item[0].count(".")))


@dataclass(frozen=True, slots=True)
class MoeParts:
    """The routed part of one decoder layer, found by structure: the block that owns 3-D `experts` and a
    router.
    """

    path: str
    """Path of the block inside the decoder layer."""
    block: nn.Module
    router: nn.Module
    experts: nn.Module


def moe_parts(layer: nn.Module) -> MoeParts | None:
    """The MoE block of a decoder layer, or None for a dense layer."""
    for path, block in layer.named_modules():
        experts = getattr(block, "experts", None)
        router = getattr(block, "gate", None)
        router = getattr(block, "router", None) if router is None else router
        if isinstance(experts, nn.Module) and isinstance(router, nn.Module) and _is_fused(experts):
            return MoeParts(path, block, router, experts)
    return None


def _is_fused(experts: nn.Module) -> bool:
    return any(p.dim() == 3 for p in experts.parameters(recurse=False))


# --- names ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorMap:
    """On-disk names grouped by where their values go; what a stock load ignores (MTP) is in no group."""

    prefix: str
    """Path of the decoder layers in the model, such as `model.layers`."""
    layers: Mapping[int, Sequence[str]]
    outside: Sequence[str]
    """Embeddings, final norm, head."""
    targets: Mapping[str, str] = field(repr=False)
    """On-disk name -> model name (for experts stored one by one: the fused tensor they go into)."""


def tensor_map(model: PreTrainedModel, checkpoint: Checkpoint) -> TensorMap:
    """Where each tensor of `checkpoint` goes. SurroundingsError names those that fit nowhere."""
    prefix, modules = decoder_layers(model)
    state = model.state_dict()
    rename = _renamer(model, state)
    extra = _extra_of(checkpoint)
    targets = {name: rename(name) for name in checkpoint.names() if not extra(name)}
    _refuse_unexpected(model, {t for t in targets.values() if t not in state})
    layers: dict[int, list[str]] = {index: [] for index in range(len(modules))}
    outside: list[str] = []
    in_layer = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    for name, target in targets.items():
        if target not in state:
            continue
        match = in_layer.match(target)
        (layers[int(match[1])] if match else outside).append(name)
    return TensorMap(prefix, layers, outside, targets)


def _renamer(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Callable[[str], str]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> str:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, state)
        return target

    return rename


def _extra_of(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Whether a tensor belongs to MTP layers, which the model does not run."""
    known = checkpoint.config.get("model_type") in FAMILIES
    return family_of(checkpoint.config).is_extra if known else lambda name: False


def _conversions(model: PreTrainedModel) -> list[Any]:
    """Fresh on every call: the entries keep the tensors of the load they were used in."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def _refuse_unexpected(model: PreTrainedModel, names: set[str]) -> None:
    info = _info(unexpected_keys=names)
    model._adjust_missing_and_unexpected_keys(info)
    _refuse(model, unexpected=info.unexpected_keys)


# --- loading --------------------------------------------------------------------------------------


def load_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The whole model, from any Checkpoint, bit-equal to `from_pretrained` on the same tensors.

    Packed weights are dequantized. Narrow experts are read padded and cut when all is read, so that they are run as
    elsewhere and take what their channels take; experts stored as factors are read multiplied out and take their
    factors then. SurroundingsError names what is missing, unexpected, of another shape, or failed to convert.
    """
    widths, factored = checkpoint.config.get(WIDTHS_KEY) or {}, _with_factors(checkpoint)
    checkpoint = dense(checkpoint)
    model = empty_model(checkpoint.config, dtype)
    names = tensor_map(model, checkpoint)
    wanted = [*names.outside, *(name for layer in names.layers.values() for name in layer)]
    missing = _load(model, checkpoint, wanted, device)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    _refuse_missing(model, missing)
    _move_buffers(model, device)
    _load_generation_config(model, checkpoint)
    if factored is not None:
        _take_factors(model, factored)
    for layer, found in widths.items():
        if (parts := moe_parts(decoder_layers(model)[1][int(layer)])) is not None:
            narrow_experts(parts.experts, found)
    return model


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with packed weights read as ordinary ones and narrow experts padded with zeros; one without any
    is returned as it is.
    """
    quantized = checkpoint.config.get("quantization_config") or {}
    other_layout = quantized.get("quant_method") in (GPTQ, BLOCKS)
    stored_otherwise = other_layout or packed_weights(checkpoint.names()) or checkpoint.config.get(FACTORS_KEY)
    return padded(DenseView(checkpoint) if stored_otherwise else checkpoint)


def _with_factors(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint whose experts are stored as factors, this one or the one that this view shows multiplied out."""
    while isinstance(checkpoint, DenseView | FactoredView):
        checkpoint = checkpoint.parent
    return checkpoint if checkpoint.config.get(FACTORS_KEY) else None


def _take_factors(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Let the experts of a loaded model hold and run their factors."""
    for layer, entry in checkpoint.config[FACTORS_KEY].items():
        parts = moe_parts(decoder_layers(model)[1][int(layer)])
        if parts is None:
            raise SurroundingsError(f"`{FACTORS_KEY}` names layer {layer}, which has no experts")
        make_factored(parts.experts, entry["projections"])
        for projection in entry["projections"]:
            for part, name in factor_tensors(entry, projection["name"]).items():
                slot = getattr(getattr(parts.experts, part), projection["name"])
                slot.data.copy_(checkpoint.get(name, slot.device))


def load_layer(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    names: TensorMap,
    layer: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Give decoder layer `layer` its weights and return it; every other layer is left as it is."""
    missing = _load(model, checkpoint, names.layers[layer], device)
    prefix = f"{names.prefix}.{layer}."
    _refuse_missing(model, {name for name in missing if name.startswith(prefix)})
    module = model.get_submodule(prefix[:-1])
    _move_buffers(module, device)
    return module


def free_layer(model: PreTrainedModel, names: TensorMap, layer: int) -> None:
    """Put the parameters of a layer back on meta. Buffers stay: some exist nowhere on disk."""
    _to_meta(model.get_submodule(f"{names.prefix}.{layer}"))


def load_outside(
    model: PreTrainedModel, checkpoint: Checkpoint, names: TensorMap, device: torch.device | str = "cpu"
) -> None:
    """Give everything but the decoder layers its weights (embeddings, final norm, head), tied ones
    included.
    """
    missing = _load(model, checkpoint, names.outside, device)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    _refuse_missing(model, {name for name in missing if not name.startswith(names.prefix + ".")})
    _move_buffers(model, device)


def free_outside(model: PreTrainedModel, names: TensorMap) -> None:
    """Put all parameters outside the decoder layers back on meta."""
    _to_meta(model, without=model.get_submodule(names.prefix))


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights. SurroundingsError when there is none, or a damaged one."""
    from transformers import AutoTokenizer

    files = checkpoint.side_files()
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    path = next((files[name] for name in known if name in files), None)
    if path is None:
        raise SurroundingsError(
            "the model has no tokenizer: none of " + ", ".join(f"`{name}`" for name in known) + " is beside its weights"
        )
    folder = Path(path).parent
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise SurroundingsError(f"the tokenizer in `{folder}` cannot be loaded: {_one_line(error)}") from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides how text becomes ids: rules, vocabulary and special tokens, not files or the template."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    known = json.loads(rules.to_str()) if rules is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(known, dict):  # set by the last call that padded or cut
        known |= {"padding": None, "truncation": None}
    text = json.dumps([known, sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class _Lazy:
    """What the conversion takes for a tensor: read when it is indexed, one at a time, straight to the
    device.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, device: torch.device | str) -> None:
        self._checkpoint, self._name, self._device = checkpoint, name, device

    def __getitem__(self, key: Any) -> Tensor:
        return self._checkpoint.get(self._name, self._device)[key]


def _load(model: PreTrainedModel, checkpoint: Checkpoint, names: Iterable[str], device: torch.device | str) -> set[str]:
    """Load these tensors; return the model names that have got none now, those of other layers included."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = model.dtype if model.config.dtype is None else model.config.dtype
    device = torch.device(device)
    config = LoadStateDictConfig(
        weight_mapping=_conversions(model),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
    )
    with _quiet_and_in_order():
        state = {name: _Lazy(checkpoint, name, device) for name in names}
        info, _ = convert_and_load_state_dict_in_model(model, state, config, None)
    _refuse(model, unexpected=info.unexpected_keys, mismatched=info.mismatched_keys, failed=info.conversion_errors)
    return info.missing_keys


@contextmanager
def _quiet_and_in_order() -> Iterator[None]:
    """No progress bar of transformers, and tensors read one after the other: less memory, and faster on a
    layer.
    """
    from transformers.utils import logging

    name, bar = "HF_DEACTIVATE_ASYNC_LOAD", logging.is_progress_bar_enabled()
    before = os.environ.get(name)
    os.environ[name] = "1"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
        if bar:
            logging.enable_progress_bar()


def _to_meta(root: nn.Module, without: nn.Module | None = None) -> None:
    skipped = set(without.modules()) if without is not None else set()
    for module in root.modules():
        for name, old in module._parameters.items() if module not in skipped else ():
            if old is not None and not old.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=False)


def _move_buffers(root: nn.Module, device: torch.device | str) -> None:
    for module in root.modules():
        for name, old in module._buffers.items():
            if old is not None and not old.is_meta:
                module._buffers[name] = old.to(device)


def _load_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    from transformers import GenerationConfig

    path = checkpoint.side_files().get("generation_config.json")
    if path is not None:
        model.generation_config = GenerationConfig.from_dict(json.loads(Path(path).read_text("utf-8")))


# --- saying no ------------------------------------------------------------------------------------


def _info(**lists: Any) -> Any:
    """Something `_adjust_missing_and_unexpected_keys` can filter by the model's own exceptions."""
    from types import SimpleNamespace

    return SimpleNamespace(**({"missing_keys": set(), "unexpected_keys": set()} | lists))


def _refuse_missing(model: PreTrainedModel, names: set[str]) -> None:
    info = _info(missing_keys=names)
    model._adjust_missing_and_unexpected_keys(info)
    _refuse(model, missing=info.missing_keys)


def _refuse(
    model: PreTrainedModel,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Any, Any]] = (),
    failed: Mapping[str, str] | None = None,
) -> None:
    shapes = [f"`{name}` is {list(got)}, expected {list(want)}" for name, got, want in sorted(mismatched)]
    parts = [
        _listed("missing", [f"`{name}`" for name in sorted(missing)]),
        _listed("unexpected", [f"`{name}`" for name in sorted(unexpected)]),
        _listed("of another shape", shapes),
        _listed("that cannot be converted", [f"`{name}`" for name in sorted(failed or {})]),
    ]
    if found := "; ".join(part for part in parts if part):
        raise SurroundingsError(f"the checkpoint does not fit `{model.config.model_type}`: {found}")


def _listed(what: str, names: Sequence[str], shown: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {', '.join(names[:shown])}{more}"
