"""The finished model folder, in one of five forms.

stock      one expert for each router row and one packing for all experts: loads with nothing of ours
compact    router rows that share experts, experts of different widths or stored as factors, experts packed in different
           ways, or packed experts that stay stacked in one tensor: loads with `import moecli`, or with
           `trust_remote_code=True` and the file put beside the weights
expanded   a compact model written out, dense, with a copy of its expert for each row, zeros for channels that are gone
           and factors multiplied out: stock, nothing saved
research   a packed model written out, dense, and its codes and scales in `packed/` beside it (`runner.sidecar`): stock,
           nothing saved on disk, for mixes of bits that no engine reads
gptq       packed integers in GPTQ's layout (`io.gptq_layout`), which vLLM loads and stock transformers does not: for
           readers of that layout, and for experts whose bits differ by layer

Which loader reads which packed experts rightly, `io.servable` says: what stock transformers would misread or refuse is
never written as `stock`. All forms keep the names and dtypes of the tensors. The same checkpoint gives the same bytes.
Corrections of packed weights go into a folder beside them (`runner.adapters`), in the dense forms into the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moecli.core.artifacts import Checkpoint, sketch_of
from moecli.core.errors import Problem, UsageError
from moecli.core.model import ModelSketch, TensorSpec
from moecli.families import ALIAS_KEY, WIDTHS_KEY, family_of, form_of, padded
from moecli.families.family import BF16_HINT
from moecli.io.durable import natural_key
from moecli.io.factors import FACTORS_KEY
from moecli.io.formats import (
    DenseView,
    corrected_weights,
    factor_names,
    format_of,
    packed_names,
    packed_weights,
    scheme_of,
    schemes_of,
    unpacked_spec,
)
from moecli.io.gpt_oss_layout import as_packed_specs
from moecli.io.gptq_layout import GptqView, why_no_gptq
from moecli.io.reader import Origin, StoredCheckpoint, StoredView, stored
from moecli.io.servable import answer, in_words, why_not
from moecli.io.writer import Export, export_folder
from moecli.runner.adapters import write_adapter
from moecli.runner.sidecar import write_sidecar
from moecli.runtime.modeling_file import AUTO_MAP, FILE_NAME, modeling_source
from moecli.runtime.quantizer import METHOD, compact_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["stock", "compact", "expanded", "research", "gptq"]
DENSE: tuple[Kind, ...] = ("expanded", "research")
"""Forms that hold dense weights."""


def choose(checkpoint: Checkpoint) -> Literal["stock", "compact"]:
    """The form that loads in most places and is exact."""
    return "compact" if why_not_stock(sketch_of(checkpoint)) else "stock"


def export(
    checkpoint: Checkpoint,
    folder: Path | str,
    kind: Kind | Literal["auto"] = "auto",
    extra_files: Mapping[str, str] | None = None,
) -> Export:
    """Write `checkpoint` to `folder`; `auto` is what `choose` says. `extra_files` is {name: text}.

    Raises UsageError when `stock` is asked for and the model has no such form, and what
    `io.writer.export_folder` raises.
    """
    kind = choose(checkpoint) if kind == "auto" else kind
    view = as_written(checkpoint, kind)
    files = {FILE_NAME: modeling_source()} if "auto_map" in view.config else {}
    written = export_folder(view, folder, extra_files=files | dict(extra_files or {}))
    if kind not in DENSE:
        write_adapter(checkpoint, folder)
    if kind == "research":
        write_sidecar(checkpoint, folder)
    return written


def as_written(checkpoint: Checkpoint, kind: Kind) -> StoredCheckpoint:
    """What `export` writes, as a checkpoint: config and tensors of the folder to be."""
    if reason := why_not_exported(sketch_of(checkpoint), kind):
        raise UsageError(reason.message, hint=reason.hint)
    if kind in DENSE:
        return _Expanded(padded(DenseView(checkpoint)))
    if kind == "gptq":
        return GptqView(_View(checkpoint))
    return _Compact(checkpoint) if kind == "compact" else _View(checkpoint)


def why_not_exported(model: ModelSketch, kind: Kind | Literal["auto"]) -> Problem | None:
    """Why a model, written or only planned, has no such form, and what to type instead."""
    if kind == "expanded":
        return None
    if kind == "research":
        return _why_not_research(model)
    if kind == "gptq":
        return _why_not_gptq(model)
    stock, floats, narrow = why_not_stock(model), _why_not_integers(model), _why_not_told(model)
    if kind == "auto":
        return stock and (narrow or (floats and stock))
    return stock if kind == "stock" else floats or narrow


def _why_not_told(model: ModelSketch) -> Problem | None:
    """The loader of the compact form sees bits in the words of a row, which few inputs leave open."""
    schemes = schemes_of(model.config)
    for name in sorted(packed_weights(model.specs), key=natural_key):
        if format_of(name, model.specs) != "int":
            continue
        words, bits = model.specs[packed_names(name).packed].shape[-1], scheme_of(name, schemes).bits
        inputs = unpacked_spec(name, model.specs, schemes).shape[-1]
        if words * 32 // inputs != bits:
            message = f"`{name}` has {inputs} inputs, whose words look alike for {bits} bits and {words * 32 // inputs}"
            return Problem("export", message, hint="write `bits: 4` or 8, or `export: expanded`")
    return None


def _why_not_integers(model: ModelSketch) -> Problem | None:
    specs = as_packed_specs(model.specs)
    floats = sorted({format_of(name, specs) for name in packed_weights(specs)} - {"int"})
    if not floats:
        return None
    return Problem("export", f"the compact form packs integers only, this model has weights in {floats[0]}",
                   hint="write `format: int` in the `quantize/...` stage, or `export: research`")  # fmt: skip


def _why_not_research(model: ModelSketch) -> Problem | None:
    if model.config.get(ALIAS_KEY) or model.config.get(WIDTHS_KEY):
        return Problem("export", "the research form is for experts of one count and width",
                       hint="write `export: compact`, or `export: expanded`")  # fmt: skip
    if model.specs and not packed_weights(model.specs):
        why = "no stage packs any"
        if packed_weights(as_packed_specs(model.specs)):
            why = f"those of {model.config['model_type']}'s own layout are exported as they are"
        return Problem("export", f"the research form is for packed weights, and {why}", hint="write `export: auto`")
    return None


def _why_not_gptq(model: ModelSketch) -> Problem | None:
    if model.config.get(ALIAS_KEY) or model.config.get(WIDTHS_KEY) or model.config.get(FACTORS_KEY):
        return Problem("export", "GPTQ's layout is for experts of one count and width, each a matrix of its own",
                       hint="write `export: compact`")  # fmt: skip
    specs = as_packed_specs(model.specs)
    weights = sorted(packed_weights(specs), key=natural_key)
    if specs and not weights:
        return Problem("export", "GPTQ's layout is for packed weights, and no stage packs any",
                       hint="write `export: auto`")  # fmt: skip
    if floats := sorted({format_of(name, specs) for name in weights} - {"int"}):
        return Problem("export", f"GPTQ's layout is for integers, this model has weights in {floats[0]}",
                       hint="write `format: int` in the `quantize/...` stage, or `export: auto`")  # fmt: skip
    if model.facts.dtype not in ("bfloat16", "float16"):
        return Problem("export", f"scales are float16 in GPTQ's layout, this model's would be {model.facts.dtype}",
                       hint=BF16_HINT)  # fmt: skip
    schemes = schemes_of(model.config)
    for name in weights:
        if reason := why_no_gptq(name, specs, scheme_of(name, schemes)):
            return Problem("export", f"there is no GPTQ layout of this model: `{name}` {reason}",
                           hint="write `export: auto`")  # fmt: skip
    if (form := form_of(model)) and form.mix in ("projection", "expert"):
        row = answer(form, "vllm")
        return Problem("export", f"its experts are packed to {in_words(form)}, and vllm {row.note}",
                       hint="write `export: compact`")  # fmt: skip
    return None


def why_not_stock(model: ModelSketch) -> Problem | None:
    """Why a model, written or only planned, needs the compact form, and what to type instead."""
    if aliased := model.config.get(ALIAS_KEY):
        counts = sorted(set(aliased.values()))
        share = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return _no_stock(
            f"its {model.facts.router_rows} router rows share {share} experts in each layer",
            "put `- run: router/row-drop` below the merge, or write `export: compact`",
        )
    if model.config.get(FACTORS_KEY):
        return _no_stock(
            "its experts are stored as low-rank factors",
            "write `form: expanded` in the stage that factors them, or `export: compact`",
        )
    if narrow := model.config.get(WIDTHS_KEY):
        found = sorted({width for widths in narrow.values() for width in widths})
        return _no_stock(
            f"its experts have {found[0]} to {found[-1]} channels, a stock config one width for all",
            "write `widths: uniform` in the `slim/...` stage, or `export: compact`",
        )
    if (form := form_of(model)) and (row := why_not(form, "hf")):
        ours = "write `export: compact`" if form.format == "int" else "write `export: research`"
        hints = [ours, *([row.hint] if row.hint else [])]
        reason = f"its experts are packed to {in_words(form)}, and transformers {row.note}"
        return _no_stock(reason, ", or ".join(hints))
    return None


def _no_stock(reason: str, hint: str | None) -> Problem:
    return Problem("export", f"there is no stock form of this model: {reason}", hint=hint)


class _View(StoredView):
    """A checkpoint under the config of the folder to be. This class is the stock form."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.parent = stored(checkpoint)
        self.facts_of = self.parent.facts_of
        self.config: Mapping[str, Any] = _without_compact(self.parent.config)
        self.facts = self.facts_of(self.config)
        guard = (self.parent.config.get("quantization_config") or {}).get("guard")
        hidden = {part for name in corrected_weights(self.parent.names()) for part in factor_names(name)} | {guard}
        self._names = dict.fromkeys(name for name in self.parent.names() if name not in hidden)

    def names(self) -> Iterable[str]:
        return tuple(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def spec(self, name: str) -> TensorSpec:
        return self.parent.spec(name)

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        return self.parent.get(name, device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.parent.rows(name, start, stop)

    def side_files(self) -> Mapping[str, str]:
        return {name: path for name, path in self.parent.side_files().items() if name != FILE_NAME}

    def origin(self, name: str) -> Origin:
        return self.parent.origin(name)


class _Compact(_View):
    """The compact form: its config, and the empty tensor that stops readers who do not know it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = dict(self.config)
        packed = config.pop("quantization_config", None)
        counts = {int(layer): count for layer, count in (config.get(ALIAS_KEY) or {}).items()}
        factors = config.get(FACTORS_KEY)
        self._guard = _guard_name(self.parent) if packed or factors else None
        rows = self.parent.facts.router_rows
        widths = config.get(WIDTHS_KEY)
        config["quantization_config"] = compact_config(counts, rows, packed, self._guard, widths, factors)
        config["auto_map"] = AUTO_MAP
        self.config = config
        self.facts = self.facts_of(config)
        extra = [self._guard] if self._guard else []
        self._names = dict.fromkeys(sorted({*self._names, *extra}, key=natural_key))

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec("uint8", (0,)) if name == self._guard else self.parent.spec(name)

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        import torch

        if name == self._guard:
            return torch.empty(0, dtype=torch.uint8, device=device)
        return self.parent.get(name, device)

    def origin(self, name: str) -> Origin:
        return ("own", name) if name == self._guard else self.parent.origin(name)


def _guard_name(checkpoint: Checkpoint) -> str:
    """A tensor that stock models have and packed files, or those of factors, do not: `runtime.compact_model` says what
    for.
    """
    layer = checkpoint.facts.moe_layers[0]
    return f"{family_of(checkpoint.config).experts_module(layer)}.down_proj"


class _Expanded(_View):
    """The expanded form of a dense checkpoint: the experts of an aliased layer, one for each router row."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        family, names = family_of(self.parent.config), set(self.parent.names())
        self._alias: dict[str, list[int]] = {}
        """stacked tensor -> expert of each row"""
        self._copied: dict[str, str] = {}
        """name of a row's own expert -> name of the shared one"""
        aliased = self.parent.config.get(ALIAS_KEY) or {}
        for layer in map(int, aliased):
            alias = [int(expert) for expert in self.parent.get(family.alias_name(layer)).tolist()]
            names.discard(family.alias_name(layer))
            form = family.layout(names, layer)
            stacked = form.names_of(0) == form.names_of(1)
            if stacked:
                self._alias |= dict.fromkeys(form.names_of(0), alias)
                continue
            shared = [form.names_of(expert) for expert in range(family.experts_in(layer))]
            names -= {name for expert in shared for name in expert}
            for row, expert in enumerate(alias):
                self._copied |= dict(zip(form.names_of(row), shared[expert], strict=True))
        config = dict(self.config)
        config.pop(ALIAS_KEY, None)
        self.config = config
        self.facts = self.facts_of(config)
        self._names = dict.fromkeys(sorted(names | set(self._copied), key=natural_key))

    def spec(self, name: str) -> TensorSpec:
        spec = self.parent.spec(self._below(name))
        return replace(spec, shape=(len(self._alias[name]), *spec.shape[1:])) if name in self._alias else spec

    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        import torch

        tensor = self.parent.get(self._below(name), device)
        if name not in self._alias:
            return tensor
        return tensor.index_select(0, torch.tensor(self._alias[name], device=tensor.device))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._alias:
            return self.get(name)[start:stop]
        return self.parent.rows(self._below(name), start, stop)

    def origin(self, name: str) -> Origin:
        return ("own", name) if name in self._alias else self.parent.origin(self._below(name))

    def _below(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(f"no tensor `{name}`")
        return self._copied.get(name, name)


def _without_compact(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what an earlier compact export put there."""
    new = dict(config)
    quantization = new.get("quantization_config") or {}
    if quantization.get("quant_method") == METHOD:
        del new["quantization_config"]
        if quantization.get("packed"):
            new["quantization_config"] = quantization["packed"]
    if new.get("auto_map") == AUTO_MAP:
        del new["auto_map"]
    return new
