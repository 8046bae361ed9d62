"""One class over the table: what `config.json` says, and where experts, routers and linears are.

A `Family` is bound to one config. It works in on-disk names; `moe_block` and its neighbours give module
paths. Nothing here imports transformers.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.core.artifacts import Checkpoint, ExpertWeights, PartWriter
from moecli.core.errors import MoecliError, Problem, SurroundingsError
from moecli.core.model import DTYPE_BYTES, ModelFacts, TensorSpec
from moecli.families.layouts import InStacks, Layout, PerExpert, Shapes
from moecli.families.routing import RouteRule, Routing, route
from moecli.families.table import PER_EXPERT, TABLE, RouterTensor, Row
from moecli.io.factors import FACTORS_KEY

FAMILIES: tuple[str, ...] = tuple(TABLE)
"""Supported values of `model_type`."""

ALIAS_KEY = "moecli_experts"
"""config.json: {"<layer>": experts on disk} of a model whose router rows share merged experts."""

WIDTHS_KEY = "moecli_widths"
"""config.json: {"<layer>": [channels of each expert on disk]} where these are fewer than its width field says."""

FACTORED = "low-rank factors"
"""Stands for a `quant_method` where experts are stored as factors (`io.factors`): no plain numbers either."""
FACTORED_HINT = "write `form: expanded` in the stage that factors them, or move this stage above it"

Role = Literal["attention", "expert", "shared", "dense", "head", "router"]
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
BF16_HINT = "set `model` to a bfloat16 copy of it"


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight that multiplies: 2-D, or 3-D where experts are stacked. `layer` is None for the head."""

    name: str
    role: Role
    layer: int | None
    transposed: bool = False
    """Inputs before outputs, as some stacked experts are: [E, K, N]"""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model. Raises SurroundingsError when `model_type` is missing or unknown."""
    model_type = config.get("model_type")
    if model_type in TABLE:
        return Family(config)
    if model_type is None:
        raise SurroundingsError("config.json has no `model_type`", hint="set `model` to a transformers checkpoint")
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=3, cutoff=0.6)
    hint = f"the nearest are {', '.join(f'`{n}`' for n in near)}" if near else f"known are {', '.join(FAMILIES)}"
    raise SurroundingsError(f"model type `{model_type}` is not among the supported MoE families", hint=hint)


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    """What config.json tells, with absent fields as transformers has them. Raises SurroundingsError."""
    return family_of(config).facts


def accounting(ckpt: Checkpoint) -> list[SurroundingsError]:
    """What is wrong with the MoE layers of a checkpoint (`Family.accounting`); empty when nothing is."""
    return family_of(ckpt.config).accounting(ckpt)


def expert_forward(family: Family, w: ExpertWeights, x_TD: Tensor) -> Tensor:
    """One expert (or a stack of them, leading E everywhere) on tokens: [T, D] -> [T, D], unweighted."""
    return family.expert_forward(w, x_TD)


class Family:
    """Where one model keeps its experts. Letters: E experts, D model width, F expert width, T tokens."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.model_type: str = config["model_type"]
        self.row: Row = TABLE[self.model_type]

    # -- config.json -------------------------------------------------------------------------

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """config.json with transformers' defaults for what it leaves out."""
        return {**self.row.defaults, **self.config}

    @cached_property
    def facts(self) -> ModelFacts:
        self._refuse_odd_values()
        row, rule = self.row, self.rule
        rows = self._number(*row.experts_keys)
        moe_layers = row.moe_layers(self.values)
        dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        if not moe_layers:
            raise SurroundingsError("config.json gives no layer any experts", where=self.model_type)
        return ModelFacts(
            model_type=self.model_type,
            layers=self._number("num_hidden_layers"),
            moe_layers=moe_layers,
            experts=max((self.experts_in(layer) for layer in moe_layers), default=rows),
            top_k=rule.top_k,
            hidden=self._number("hidden_size"),
            expert_width=self._number(row.width_key),
            vocab=self._number("vocab_size"),
            dtype=str(dtype).removeprefix("torch."),
            score=rule.score,
            renormalized=rule.renormalized,
            max_positions=self._number("max_position_embeddings"),
            router_rows=rows,
            groups=rule.groups,
            groups_used=rule.groups_used,
            shared_width=row.shared_width(self.values),
            quantized=self.quantized,
        )

    @cached_property
    def rule(self) -> RouteRule:
        """How this model routes."""
        row, values = self.row, self.values
        grouped = row.groups_if(values)
        return RouteRule(
            score=row.score,
            top_k=row.fixed_top_k or self._number(*row.top_k_keys),
            renormalized=bool(values[row.renormalized]) if isinstance(row.renormalized, str) else row.renormalized,
            floor=values[row.floor] if isinstance(row.floor, str) else row.floor,
            floor_is=row.floor_is,
            scale=values[row.scale_key] if row.scale_key else 1.0,
            groups=(values["n_group"] or 1) if grouped else 1,
            groups_used=(values["topk_group"] or 1) if grouped else 1,
            group_score=row.group_score,
            band=2 * values[row.band_key] if row.band_key else 0.0,
        )

    @property
    def quantized(self) -> str | None:
        """`quant_method` of config.json; None for a `moecli` one with alias maps only and nothing packed. FACTORED for
        experts that are stored as factors.
        """
        if self.config.get(FACTORS_KEY):
            return FACTORED
        found = self.config.get("quantization_config") or {}
        method = found.get("quant_method")
        return None if method == "moecli" and not found.get("packed") else method

    def experts_in(self, layer: int) -> int:
        """Experts on disk in this layer (fewer than router rows after merging)."""
        aliased = self.config.get(ALIAS_KEY) or {}
        return int(aliased.get(str(layer), self._number(*self.row.experts_keys)))

    def widths_in(self, layer: int) -> list[int]:
        """Channels of each expert on disk."""
        own = (self.config.get(WIDTHS_KEY) or {}).get(str(layer))
        return [self.facts.expert_width] * self.experts_in(layer) if own is None else [int(width) for width in own]

    def _refuse_odd_values(self) -> None:
        """SurroundingsError for the first value of config.json that nothing could be computed from."""
        values = self.values
        dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
        wrong = {} if dtype in DTYPE_BYTES else {"dtype" if "dtype" in values else "torch_dtype": "the name of a dtype"}
        for key in ("quantization_config", ALIAS_KEY, WIDTHS_KEY, FACTORS_KEY):
            if not isinstance(values.get(key) or {}, Mapping):
                wrong[key] = "a mapping"
        if isinstance(widths := values.get(WIDTHS_KEY) or {}, Mapping) and not all(
            isinstance(own, Sequence) and all(isinstance(width, int) for width in own) for own in widths.values()
        ):
            wrong[WIDTHS_KEY] = "a list of widths for each layer"
        for key in ("decoder_sparse_step", *self.row.top_k_keys):
            if key in values and self._number(key) < 1:
                wrong[key] = "at least 1"
        for key, wanted in wrong.items():
            message = f"`{key}` in config.json must be {wanted}, got `{values[key]}`"
            raise SurroundingsError(message, where=self.model_type)

    def _number(self, *keys: str) -> int:
        key = self._winner(keys)
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SurroundingsError(
                f"`{key}` in config.json must be a whole number, got `{value}`", where=self.model_type
            )
        return value

    def _winner(self, keys: Sequence[str]) -> str:
        """Of several names for one field the one that transformers obeys: listed first, and in the file."""
        present = [key for key in keys if key in self.config]
        return present[0] if present else next(key for key in keys if key in self.row.defaults)

    def shrink_config(self, config: Mapping[str, Any], keep: int) -> dict[str, Any]:
        """The config of the same model with `keep` experts a layer, one router row each, and no MTP layers.

        Edits the field the file uses and removes its twin, so that no reader sees the old count.
        Raises MoecliError when the family's routing cannot work with so few (`keep_problem`).
        """
        family = Family(config)
        if problem := keep_problem(family.facts, keep):
            raise MoecliError(problem.message, hint=problem.hint)
        new = without_mtp(config)
        new.pop(ALIAS_KEY, None)
        winner = family._winner(self.row.experts_keys)
        for key in self.row.experts_keys:
            new.pop(key, None)
        new[winner] = keep
        return new

    # -- names -------------------------------------------------------------------------------

    def disk_block(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.row.disk_block}"

    def moe_block(self, layer: int) -> str:
        """Module path of the MoE block."""
        return f"model.layers.{layer}.{self.row.block}"

    def experts_module(self, layer: int) -> str:
        """Module path of the experts; its inputs are (hidden, top-k index, top-k weights) in every family."""
        return f"{self.moe_block(layer)}.experts"

    def router_module(self, layer: int) -> str:
        return f"{self.moe_block(layer)}.{self.row.router}"

    def alias_name(self, layer: int) -> str:
        """On-disk name of the int64 [E] map from router row to expert."""
        return f"{self.disk_block(layer)}.experts.alias_map"

    def expert_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Names in a released checkpoint: gate, up, down, or the stacked tensors that hold all experts."""
        return self._layouts(layer)[0].names_of(expert)

    def _layouts(self, layer: int) -> list[Layout]:
        """Every form the experts may have on disk, the released one first."""
        disk, memory = self.disk_block(layer), self.moe_block(layer)
        found: list[Layout] = []
        if self.row.projections:
            found.append(PerExpert(f"{disk}.experts", self.row.projections))
        return found + [InStacks(memory, form) for form in self.row.stacked]

    def layout(self, names: Container[str], layer: int) -> Layout:
        """The form this checkpoint uses; the released form when it has none of them."""
        layouts = self._layouts(layer)
        present = (form for form in layouts if any(name in names for name in form.names_of(0)))
        return next(present, layouts[0])

    # -- experts -----------------------------------------------------------------------------

    def read_expert(self, ckpt: Checkpoint, layer: int, expert: int) -> ExpertWeights:
        """One expert in the checkpoint's dtype, on the CPU. Raises SurroundingsError (missing, quantized)."""
        return self._plain(ckpt, layer, expert).read(ckpt, expert)

    def read_experts(self, ckpt: Checkpoint, layer: int) -> ExpertWeights:
        """All experts of a layer, each field with a leading E, on the CPU. Raises SurroundingsError."""
        return self._plain(ckpt, layer).read_all(ckpt, self.experts_in(layer))

    def write_experts(self, part: PartWriter, ckpt: Checkpoint, layer: int, experts: Sequence[ExpertWeights]) -> None:
        """Replace all experts of a layer, in the checkpoint's dtype and form; surplus names are dropped."""
        self._plain(ckpt, layer).write(part, ckpt, self.experts_in(layer), experts)

    def keep_experts(self, part: PartWriter, ckpt: Checkpoint, layer: int, kept: Sequence[int]) -> None:
        """Drop all experts but `kept`, which are renumbered in the given order."""
        self._plain(ckpt, layer).keep(part, ckpt, self.experts_in(layer), kept)

    def _plain(self, ckpt: Checkpoint, layer: int, expert: int = 0) -> Layout:
        """The layer's layout, once its first tensor is known to be there and to hold plain numbers."""
        form = self.layout(ckpt, layer)
        for name in form.names_of(expert):
            if name not in ckpt:
                raise self._unreadable(ckpt, layer, name)
            if (dtype := ckpt.spec(name).dtype) not in _FLOATS:
                raise SurroundingsError(
                    f"experts are quantized (`{name}` is {dtype}) and cannot be read", hint=BF16_HINT
                )
        return form

    def _unreadable(self, ckpt: Checkpoint, layer: int, name: str) -> SurroundingsError:
        packed = f"{self.experts_module(layer)}.gate_up_proj_blocks"
        if packed in ckpt:
            return SurroundingsError(f"experts are quantized as MXFP4 (`{packed}`) and cannot be read", hint=BF16_HINT)
        if self.quantized:
            return SurroundingsError(f"experts are quantized ({self.quantized}) and cannot be read", hint=BF16_HINT)
        return SurroundingsError(f"tensor `{name}` is missing from the checkpoint", where=f"layer {layer}")

    def expert_forward(self, w: ExpertWeights, x_TD: Tensor) -> Tensor:
        """What the expert makes of tokens, unweighted: [T, D] -> [T, D]. Accepts a leading E."""
        return _affine(self.inner(w, x_TD), w.down_DF, w.down_bias_D)

    def inner(self, w: ExpertWeights, x_TD: Tensor) -> Tensor:
        """The gated activation before `down`: [T, D] -> [T, F]. Accepts a leading E."""
        gate, up = (
            _affine(x_TD, w.gate_FD, w.gate_bias_F),
            _affine(x_TD, w.up_FD, w.up_bias_F),
        )
        return self.gate_and_up(gate, up)

    def gate_and_up(self, gate: Tensor, up: Tensor) -> Tensor:
        """The gated activation [..., F] from the two projections."""
        if self.row.gated == "clamped":
            limit, alpha = self.values["swiglu_limit"], self.values["swiglu_alpha"]
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return gate * torch.sigmoid(gate * alpha) * (up + 1)
        name = self.row.activation or self.values["hidden_act"]
        if name not in _ACTIVATIONS:
            raise SurroundingsError(f"activation `{name}` of config.json is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name](gate) * up

    # -- router ------------------------------------------------------------------------------

    def router_names(self, layer: int, names: Container[str]) -> dict[str, RouterTensor]:
        """Router tensors that are on disk, by name. A model saved with in-memory names is recognised."""
        found = {}
        for tensor in self._router_rows():
            disk, memory = (
                f"{self.disk_block(layer)}.{tensor.disk}",
                f"{self.moe_block(layer)}.{tensor.memory}",
            )
            found[memory if memory in names and disk not in names else disk] = tensor
        return {name: tensor for name, tensor in found.items() if name in names}

    def _router_rows(self) -> list[RouterTensor]:
        return [t for t in self.row.router_tensors if t.only_if is None or self.values[t.only_if]]

    def router_tensors(self, ckpt: Checkpoint, layer: int) -> dict[str, int]:
        """{on-disk name: axis of E} for weight, linear bias and correction bias."""
        return {name: tensor.axis for name, tensor in self.router_names(layer, ckpt).items()}

    def router_role(self, ckpt: Checkpoint, layer: int, role: Literal["weight", "bias", "correction"]) -> str | None:
        """On-disk name of one of the router's tensors; None where the family has no such tensor."""
        return next((n for n, t in self.router_names(layer, ckpt).items() if t.role == role), None)

    def keep_router_rows(self, part: PartWriter, ckpt: Checkpoint, layer: int, kept: Sequence[int]) -> None:
        """Keep these rows of every router tensor, in the given order and untouched dtype."""
        for name, axis in self.router_tensors(ckpt, layer).items():
            rows = ckpt.get(name).index_select(axis, torch.tensor(kept, dtype=torch.int64))
            part.put(name, rows.contiguous())

    def route(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Routing:
        """Weights [T, k] and experts [T, k] as the model computes them. `bias_E`: the correction bias."""
        return route(logits_TE, bias_E, self.rule)

    def router_logits(self, ckpt: Checkpoint, layer: int, x_TD: Tensor) -> Tensor:
        """Logits of every router row for inputs of the experts, float32 [T, rows], on x's device."""
        weight, bias = (self.router_role(ckpt, layer, role) for role in ("weight", "bias"))
        weight_ED = ckpt.get(weight).to(x_TD.device).float()  # type: ignore[arg-type]
        return _affine(x_TD.float(), weight_ED, None if bias is None else ckpt.get(bias).to(x_TD.device).float())

    def route_tokens(self, ckpt: Checkpoint, layer: int, x_TD: Tensor) -> Routing:
        """Where inputs of the experts go, as `route` says; experts are router rows."""
        correction = self.router_role(ckpt, layer, "correction")
        bias_E = None if correction is None else ckpt.get(correction).to(x_TD.device)
        return self.route(self.router_logits(ckpt, layer, x_TD), bias_E)

    # -- the rest of the checkpoint ----------------------------------------------------------

    def shared_names(self, layer: int) -> tuple[str, ...]:
        """Weights of the shared experts, gate, up, down; empty without."""
        if not (self.row.shared and self.facts.shared_width):
            return ()
        return tuple(f"{self.disk_block(layer)}.{self.row.shared}.{p}.weight" for p in PER_EXPERT)

    def linears(self, ckpt: Checkpoint) -> Iterable[Linear]:
        """Every weight that multiplies, in the checkpoint's order; MTP layers and embeddings left out."""
        return self.linears_in({name: ckpt.spec(name) for name in ckpt.names()})

    def linears_in(self, specs: Mapping[str, TensorSpec]) -> Iterator[Linear]:
        stacked = {
            linear.name: linear
            for layer in self.facts.moe_layers
            for linear in _stacks(self.layout(specs, layer), layer)
        }
        for name, spec in specs.items():
            layer = _layer_of(name)
            if name in stacked:
                yield stacked[name]
            elif len(spec.shape) != 2 or not name.endswith(".weight") or self.is_extra(name):
                continue
            elif name.endswith("lm_head.weight"):
                yield Linear(name, "head", None)
            elif layer is not None:
                yield Linear(name, self._role(name, layer), layer)

    def _role(self, name: str, layer: int) -> Role:
        below = name.removeprefix(f"model.layers.{layer}.")
        blocks = {f"{self.row.disk_block}.", f"{self.row.block}."}
        block = next((b for b in blocks if below.startswith(b)), None)
        if block is None:
            return "attention"
        rest = below.removeprefix(block)
        if rest.startswith("experts."):
            return "expert"
        if self.row.shared and rest.startswith(f"{self.row.shared}."):
            return "shared"
        routers = {t.disk for t in self.row.router_tensors} | {t.memory for t in self.row.router_tensors}
        return "router" if rest in routers or rest == "shared_expert_gate.weight" else "dense"

    def is_extra(self, name: str) -> bool:
        """Whether a tensor belongs to multi-token-prediction layers, which transformers does not run."""
        layer = _layer_of(name)
        return (layer is not None and layer >= self.facts.layers) or any(
            segment.startswith("mtp") for segment in name.split(".")
        )

    def extra_tensors(self, ckpt: Checkpoint) -> list[str]:
        """Names outside the known layers: multi-token-prediction (MTP) layers of released checkpoints."""
        return [name for name in ckpt.names() if self.is_extra(name)]

    def drop_mtp(self, part: PartWriter, ckpt: Checkpoint) -> None:
        """Leave out the MTP layers: their experts keep the old count, and nothing calibrates them."""
        for name in self.extra_tensors(ckpt):
            part.drop(name, "MTP layer")

    # -- does the file agree with the config? ------------------------------------------------

    def expected(self, names: Container[str], layer: int) -> Shapes:
        """Every tensor of an MoE block with the shape that the config asks for, in this layout."""
        facts = self.facts
        shapes = dict(self.layout(names, layer).shapes(self.widths_in(layer), facts.hidden))
        for tensor in self._router_rows():
            disk, memory = (
                f"{self.disk_block(layer)}.{tensor.disk}",
                f"{self.moe_block(layer)}.{tensor.memory}",
            )
            name = memory if memory in names and disk not in names else disk
            rows = facts.router_rows
            shapes[name] = (rows, facts.hidden) if tensor.role == "weight" else (1,) * tensor.axis + (rows,)
        wide = (facts.shared_width, facts.hidden)
        shapes |= dict(zip(self.shared_names(layer), (wide, wide, wide[::-1]), strict=False))
        if str(layer) in (self.config.get(ALIAS_KEY) or {}):
            shapes[self.alias_name(layer)] = (facts.router_rows,)
        return shapes

    def accounting(self, ckpt: Checkpoint) -> list[SurroundingsError]:
        """What is wrong with the MoE layers on disk: missing tensors, shapes or counts unlike the config's.

        Nothing is said of checkpoints quantized by others, whose tensors have other names and shapes.
        """
        if self.quantized:
            return []
        names = set(ckpt.names())
        found = [problem for layer in self.facts.moe_layers for problem in self._layer_problems(ckpt, names, layer)]
        return [*self._surplus_layers(names), *found]

    def _surplus_layers(self, names: set[str]) -> Iterator[SurroundingsError]:
        """Layers beyond the config's are MTP layers where family or config know such; elsewhere the two differ."""
        declared = any(value and ("mtp" in key or "nextn" in key) for key, value in self.config.items())
        layers = 1 + max((layer for name in names if (layer := _layer_of(name)) is not None), default=-1)
        if layers > self.facts.layers and not self.row.mtp_keys and not declared:
            yield SurroundingsError(
                f"config.json says {self.facts.layers} layers, the checkpoint has {layers}",
                hint="config.json and the weights are of different models",
            )

    def _layer_problems(self, ckpt: Checkpoint, names: set[str], layer: int) -> Iterator[SurroundingsError]:
        experts, form = self.experts_in(layer), self.layout(names, layer)
        if isinstance(form, PerExpert) and (found := _experts_on_disk(form, names, experts)) not in (0, experts):
            surplus = f"`{form.names_of(experts)[0]}` exists: " if found > experts else ""
            yield SurroundingsError(
                f"{surplus}config.json says {experts} experts, the checkpoint has {found}",
                where=f"layer {layer}",
                hint="config.json and the weights are of different models",
            )
        for name, shape in self.expected(names, layer).items():
            if name not in names:
                yield self._unreadable(ckpt, layer, name)
            elif (got := ckpt.spec(name).shape) != shape:
                yield SurroundingsError(
                    f"`{name}` has shape {list(got)}, config.json asks for {list(shape)}",
                    where=f"layer {layer}",
                    hint="config.json and the weights are of different models",
                )

    def check(self, ckpt: Checkpoint) -> None:
        """Raise the first problem of `accounting`, with the number of all."""
        problems = self.accounting(ckpt)
        if problems:
            first, more = problems[0], len(problems) - 1
            text = first.message + (f" (and {more} more)" if more else "")
            raise SurroundingsError(text, where=first.where, hint=first.hint)


def one_group(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with group-limited routing ended: every token may use every expert. Unchanged where there is none."""
    grouped = Family(config).facts.groups > 1
    return {**config, "n_group": 1, "topk_group": 1} if grouped else dict(config)


def keep_problem(facts: ModelFacts, keep: int) -> Problem | None:
    """Why `keep` experts a layer cannot work for this routing, or None. The hint: the nearest legal count."""
    message = _keep_message(facts, keep)
    if message is None:
        return None
    legal = [n for n in range(1, facts.experts + 1) if _keep_message(facts, n) is None]
    nearest = min(legal, key=lambda n: (abs(n - keep), n), default=None)
    return Problem("keep", message, hint=None if nearest is None else f"use `keep: {nearest}`")


def _keep_message(facts: ModelFacts, keep: int) -> str | None:
    groups, top_k = facts.groups, facts.top_k
    pairs = TABLE[facts.model_type].group_score == "top2"
    if keep < 1:
        return f"`keep` must be at least 1, got {keep}"
    if keep > facts.experts:
        return f"`keep` must be at most the model's {facts.experts} experts, got {keep}"
    if keep < top_k:
        return f"the router picks {top_k} experts per token, only {keep} would be left"
    if keep % groups:
        return f"`keep` must be a multiple of the router's {groups} groups (`n_group`), got {keep}"
    if pairs and keep // groups < 2:
        block = "the router" if groups == 1 else f"each of the router's {groups} groups"
        return f"{block} needs at least 2 experts, `keep: {keep}` leaves {keep // groups}"
    reachable = facts.groups_used * (keep // groups)
    if groups > 1 and reachable < top_k:
        return (
            f"the router picks {top_k} experts per token from {facts.groups_used} of {groups} groups, "
            f"`keep: {keep}` leaves {reachable} there"
        )
    return None


def without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy that asks for no multi-token-prediction layers (left out, transformers expects one)."""
    new = copy.deepcopy(dict(config))
    keys = TABLE[config["model_type"]].mtp_keys
    for key in (*keys, "num_nextn_predict_layers"):
        if key in new:
            new[key] = 0
    if keys and not any(key in new for key in keys):
        new[keys[0]] = 0
    return new


def alias_config(config: Mapping[str, Any], counts: Mapping[int, int]) -> dict[str, Any]:
    """The config of a model whose layers keep their router rows but share `counts[layer]` merged experts."""
    new = without_mtp(config)
    new[ALIAS_KEY] = {str(layer): count for layer, count in sorted(counts.items())}
    return new


def linears_of(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> list[Linear]:
    """Every weight that multiplies, from specs alone (`Family.linears` without a checkpoint)."""
    return list(family_of(config).linears_in(specs))


def _stacks(form: Layout, layer: int) -> list[Linear]:
    """The 3-D weights of a stacked layout."""
    if not isinstance(form, InStacks):
        return []
    return [Linear(name, "expert", layer, form.form.transposed) for name in form.names_of(0)[:2]]


def _experts_on_disk(form: PerExpert, names: set[str], experts: int) -> int:
    """How many experts a layer has, if they are numbered from 0; `experts` when one in between is damaged."""

    def there(expert: int) -> bool:
        return not names.isdisjoint(form.names_of(expert))

    count = next(e for e in range(1 << 20) if not there(e))
    return experts if any(there(e) for e in range(count + 1, experts)) else count


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2].isdigit() else None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] by weight [out, in], or both with a leading E."""
    y = x @ weight.mT
    return y if bias is None else y + (bias if bias.dim() == 1 else bias[:, None])
