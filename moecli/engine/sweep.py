"""Run a model one decoder layer at a time: every batch goes through layer i before layer i+1 is read.

    swept = sweep(checkpoint, batches, device=device)
    for layer in swept:
        if layer.is_moe:
            stats = layer.observe(collectors(["gean_sum"]))   # looks, as often as wanted; inputs do not move
            layer.replace(new_weights)                        # optional: what later layers see
    logits = list(swept.logits())                             # optional: final norm and head

Hidden states and logits are bit for bit those of the whole model: layers run as the stock modules, with the
arguments the model itself hands them. How the arguments are found: the decoder layers are replaced by
recorders that return their input, and the decoder runs once per batch. The final norm and the head run the
same way, with the true last hidden state put in at the last layer, so no code here knows a family.

Memory on the device: one layer's weights plus the activations of one batch; hidden states stay there too
when they fit, else on the CPU. Embeddings and head are resident only at the start and the end.

On CUDA in bf16 the routed experts run once, in our own grouped pass that keeps their un-gated outputs
(`engine.fused`, with the tolerance it states). Elsewhere, and for experts of another layout, un-gated outputs are
computed by the stock experts module on tokens sorted by expert, with one slot of weight 1, which holds for
every family (biases, clamps, interleaving): a statistic that needs them then runs the routed experts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint, LayerStats
from moecli.core.errors import StageFailed
from moecli.core.model import ModelFacts
from moecli.engine.collectors import Collector, Grouped, LayerShape, collectors, needs_of
from moecli.engine.data import Batch
from moecli.engine.fused import FusedLayer, fused
from moecli.engine.loader import Loader
from moecli.families import adapter
from moecli.families.alias import ALIAS_MAP

CHUNK_BYTES = 256 << 20
"""Largest expert output held at a time, counted in fp32."""

Track = Callable[[Sequence[int], str], Iterable[int]]


def sweep(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    track: Track | None = None,
) -> Sweep:
    """Iterate over the decoder layers of `checkpoint` while `batches` flow through them.

    `dtype` defaults to the checkpoint's. `track(items, label)` shows progress. SurroundingsError when the
    checkpoint does not fit its own config.
    """
    return Sweep(checkpoint, tuple(batches), torch.device(device), dtype, track or (lambda items, label: items))


class Sweep:
    """One pass over the layers: iterate it once, then `logits` may be asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype | None,
        track: Track,
    ) -> None:
        checkpoint = adapter.dense(checkpoint)
        self._checkpoint, self._batches, self._device, self._track = checkpoint, batches, device, track
        self._model = _quiet_routers(adapter.empty_model(checkpoint.config, dtype))
        self._names = adapter.tensor_map(self._model, checkpoint)
        self._home = _home(self._model, batches, device)
        self._hidden: list[Tensor] = []
        self._started, self._done = False, 0

    def __len__(self) -> int:
        return len(self._names.layers)

    def __iter__(self) -> Iterator[SweptLayer]:
        if self._started:
            raise RuntimeError("a sweep runs once; make a new one")
        self._started = True
        runs = self._record()
        loader = Loader(self._model, self._checkpoint, self._names, self._device, ahead=True)
        try:
            for index in self._track(range(len(self)), "layers"):
                yield from self._layer(index, loader, runs)
        finally:
            loader.close()

    def _layer(self, index: int, loader: Loader, runs: _Runs) -> Iterator[SweptLayer]:
        module = loader.load(index)
        try:
            layer = SweptLayer(
                index,
                module,
                self._checkpoint.facts,
                self._hidden,
                runs.of(index),
                self._device,
                self._home,
            )
            yield layer
            self._hidden = layer.outputs()
        finally:
            loader.free(index)
        self._done = index + 1

    def logits(self) -> Iterator[Tensor]:
        """Logits [B, S, vocabulary] of each batch, on the device, after all layers have run."""
        if self._done < len(self):
            raise RuntimeError(f"{self._done} of {len(self)} layers have run; logits need all")
        adapter.load_outside(self._model, self._checkpoint, self._names, self._device)
        try:
            for batch, hidden in zip(self._batches, self._hidden, strict=True):
                yield self._finish(batch, hidden.to(self._device))
        finally:
            adapter.free_outside(self._model, self._names)

    @torch.no_grad()
    def _record(self) -> _Runs:
        """Embed every batch and note what each layer is called with."""
        adapter.load_outside(self._model, self._checkpoint, self._names, self._device)
        runs = _Runs(self._batches, self._device, self._home)
        for batch in self._batches:
            recorders = [_Recorder(layer) for layer in adapter.decoder_layers(self._model)[1]]
            with _Replaced(self._model, self._names.prefix, recorders):
                self._model.base_model(**_inputs(batch, self._device), use_cache=False)
            self._hidden.append(recorders[0].hidden.to(self._home))
            runs.add([recorder.arguments for recorder in recorders])
        adapter.free_outside(self._model, self._names)
        return runs

    @torch.no_grad()
    def _finish(self, batch: Batch, hidden_BSD: Tensor) -> Tensor:
        layers = adapter.decoder_layers(self._model)[1]
        recorders = [_Recorder(layer) for layer in layers]
        recorders[-1].answer = hidden_BSD
        with _Replaced(self._model, self._names.prefix, recorders):
            return self._model(**_inputs(batch, self._device), use_cache=False).logits


class SweptLayer:
    """One decoder layer with its weights loaded and its inputs at hand. Valid until the loop goes on.

    `module` is the stock decoder layer, `shape` the sizes of its routed part (None for a dense layer).
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        facts: ModelFacts,
        hidden: Sequence[Tensor],
        runs: Sequence[_Run],
        device: torch.device,
        home: torch.device,
    ) -> None:
        self.index, self.module, self._facts = index, module, facts
        self._inputs, self._runs, self._device, self._home = hidden, runs, device, home
        self._outputs: list[Tensor] | None = None
        self._look()

    def _look(self) -> None:
        self.parts = adapter.moe_parts(self.module)
        self.is_moe = self.parts is not None
        self.shape = _shape(self.parts.experts, self._facts) if self.parts else None

    def observe(self, some: Iterable[Collector] = ()) -> LayerStats:
        """Statistics of all batches through the weights as they are now; counts and gate sums are always
        among them.

        One sparse forward pass. What the layer is fed stays as it is, so a layer may be observed again,
        before and after `replace`. StageFailed for a dense layer, or when a statistic reads what the layer
        does not show.
        """
        if self.parts is None:
            raise StageFailed(f"layer {self.index} has no experts to observe")
        always = {c.name: c for c in collectors(("count", "gate_sum"))}
        wanted = {**always, **{c.name: c for c in some}}
        tokens = self._observe(list(wanted.values()))
        found = {name: value for c in wanted.values() for name, value in c.result().items()}
        return LayerStats(tokens, found.pop("count"), found.pop("gate_sum"), found)

    def replace(self, state: Mapping[str, Tensor]) -> None:
        """New values for parameters or buffers, named inside the layer (`mlp.experts.down_proj`); later
        layers see them.

        Values are cast to the parameter's dtype. KeyError for an unknown name, ValueError for another shape.
        """
        slots = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, value in state.items():
            if slots[name].shape != value.shape:
                raise ValueError(f"`{name}` is {list(slots[name].shape)}, got {list(value.shape)}")
        for name, value in state.items():
            _assign(self.module, name, value.detach().to(slots[name].device, slots[name].dtype))
        self._outputs = None

    def edit(self, change: Callable[[nn.Module], None]) -> None:
        """Let `change` do anything to the module, such as storing fewer experts; later layers see the
        result.
        """
        change(self.module)
        self._look()
        self._outputs = None

    def outputs(self) -> list[Tensor]:
        """What the layer makes of each batch, [B, S, D], computed once for the weights as they are now."""
        if self._outputs is None:
            with fused(self.module, self.parts, keep=False):
                self._outputs = [self._forward(i).to(self._home) for i in range(len(self._inputs))]
        return self._outputs

    @torch.no_grad()
    def _forward(self, batch: int) -> Tensor:
        args, kwargs = _moved(self._runs[batch].arguments, self._device)
        out = self.module(self._inputs[batch].to(self._device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def _observe(self, wanted: Sequence[Collector]) -> int:
        for collector in wanted:
            collector.start(self.shape, self._device)
        needs, tokens, outputs = needs_of(wanted), 0, []
        with fused(self.module, self.parts, keep="outputs" in needs) as fast:
            for i, run in enumerate(self._runs):
                with _Probe(self.module, self.parts, needs, self.index) as probe:
                    outputs.append(self._forward(i).to(self._home))
                seen = probe.tokens(run.rows, tokens, self.shape, fast)
                tokens += seen.tokens
                _update(wanted, seen)
                del probe, seen  # before the next batch: they hold several activations
        self._outputs = outputs
        return tokens


# --- what an observed layer shows -----------------------------------------------------------------


class _Probe:
    """Hooks on one MoE layer: the three inputs of `experts` (the same in every version and family), their
    sum, and, when asked for, the router's logits and the residual stream.
    """

    def __init__(self, layer: nn.Module, parts: adapter.MoeParts, needs: frozenset[str], index: int) -> None:
        self._layer, self._parts, self._needs, self._index = layer, parts, needs, index
        self._norms: list[tuple[Tensor, Tensor]] = []
        self.logits: Tensor | None = None
        self.residual: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> _Probe:
        experts = self._parts.experts
        self._on(experts.register_forward_hook(self._see_experts, with_kwargs=True))
        if "logits" in self._needs:
            self._on(self._parts.router.register_forward_hook(self._see_router))
        if "residual" in self._needs:
            self._on(self._parts.block.register_forward_pre_hook(self._see_block, with_kwargs=True))
            for child in self._layer.children():
                self._on(child.register_forward_hook(self._see_child, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._norms.clear()

    def _on(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _see_experts(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        hidden, index, weight = [*args, *kwargs.values()]
        self.hidden, self.index, self.weight = _rows(hidden), _rows(index), _rows(weight)
        self.routed = _rows(out)

    def _see_router(self, module: nn.Module, args: tuple, out: Any) -> None:
        """Logits come first or last, never next to weights alone: they stand at the end opposite the
        integers.
        """
        values = out if isinstance(out, tuple) else (out,)
        last = not values[0].is_floating_point()
        self.logits = _rows(values[-1] if last else values[0])

    def _see_child(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        inputs = [*args, *kwargs.values()]
        if isinstance(out, Tensor) and inputs and isinstance(inputs[0], Tensor):
            self._norms.append((inputs[0], out))

    def _see_block(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The stream is the input of the norm whose output the block takes."""
        taken = next(iter([*args, *kwargs.values()]))
        self.residual = next((before for before, after in self._norms if after is taken), None)

    def tokens(self, rows: Tensor | None, seen: int, shape: LayerShape, fast: FusedLayer) -> Grouped:
        """The batch's tokens without padding; `seen` tokens came before."""
        self._refuse_blind(shape)
        pick = (lambda x: x) if rows is None else (lambda x: x.index_select(0, rows))
        experts = self._parts.experts
        hidden = pick(self.hidden)
        index, weight = _coalesced(experts, pick(self.index), pick(self.weight))
        scale = getattr(self._layer, "residual_multiplier", 1.0)
        coalesced, visits = hasattr(experts, ALIAS_MAP), fast.take()
        return Grouped(
            shape=shape, hidden_TD=hidden, index_Tk=index, weight_Tk=weight,
            token_T=torch.arange(seen, seen + len(hidden), device=hidden.device),
            run_experts=lambda x_SD, expert_S: _run_experts(experts, x_SD, expert_S),
            coalesced=coalesced,
            logits_TE=None if self.logits is None else pick(self.logits),
            residual_TD=None if self.residual is None else pick(_rows(self.residual)),
            routed_TD=pick(self.routed) if scale == 1 else pick(self.routed) * scale,
            visits=visits,
            place_Tk=None if visits is None else pick(visits.groups.place_Tk),
            whole=rows is None and not coalesced,
            sum_experts=None if fast.experts is None else fast.sum_all,
        )  # fmt: skip

    def _refuse_blind(self, shape: LayerShape) -> None:
        where = f"layer {self._index}"
        if "logits" in self._needs and (self.logits is None or self.logits.shape[-1] != shape.rows):
            raise StageFailed(
                f"the router does not show the logits of its {shape.rows} rows",
                where=where,
                hint="leave `prob_sum` and `logit_gram` out of `statistics`",
            )
        if "residual" in self._needs and self.residual is None:
            raise StageFailed(
                "no norm feeds the MoE block, so its input cannot be compared with the stream",
                where=where,
                hint="leave `easy` out of `statistics`",
            )


def _update(wanted: Sequence[Collector], seen: Grouped) -> None:
    """Chunks are as large as their outputs allow: k of them per token, or all E. Outputs that the layer's own pass left
    need no chunks.
    """
    heavy = [c for c in wanted if "all_experts" in c.needs]
    light = [c for c in wanted if "all_experts" not in c.needs]
    slots, experts = seen.index_Tk.shape[1], seen.shape.experts
    for some, held, outputs_per_token in (
        (light, seen.visits is not None, slots),
        (heavy, seen.sum_experts is not None, experts),
    ):
        for chunk in _chunks(seen, outputs_per_token, held) if some else ():
            for collector in some:
                collector.update(chunk)


def _chunks(seen: Grouped, outputs_per_token: int, held: bool) -> Iterator[Grouped]:
    if held:
        yield seen
        return
    size = max(1, CHUNK_BYTES // (outputs_per_token * seen.hidden_TD.shape[1] * 4))
    per_token = ("hidden_TD", "index_Tk", "weight_Tk", "token_T", "logits_TE", "residual_TD", "routed_TD")
    for start in range(0, seen.tokens, size):
        values = {name: getattr(seen, name) for name in per_token}
        cut = {name: v if v is None else v[start : start + size] for name, v in values.items()}
        yield Grouped(shape=seen.shape, run_experts=seen.run_experts, coalesced=seen.coalesced, **cut)


def _run_experts(experts: nn.Module, x_SD: Tensor, expert_S: Tensor) -> Tensor:
    """Un-gated y of each row by the stock module: one slot of weight 1. Alias modules are entered below
    their map.
    """
    stock = getattr(type(experts), "stock", type(experts))
    one = torch.ones(len(x_SD), 1, dtype=x_SD.dtype, device=x_SD.device)
    index_S1 = expert_S.clamp(max=experts.num_experts - 1).long()[:, None]
    return stock.forward(experts, x_SD, index_S1, one)


def _coalesced(experts: nn.Module, index_Tk: Tensor, weight_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Router rows to stored experts: slots of a token on the same expert become one, with the sum of the
    weights.
    """
    alias_E = getattr(experts, ALIAS_MAP, None)
    if alias_E is None:
        return index_Tk, weight_Tk
    index_Tk = alias_E[index_Tk]
    first_Tk = (index_Tk[:, :, None] == index_Tk[:, None, :]).int().argmax(-1)
    slot_k = torch.arange(index_Tk.shape[1], device=index_Tk.device)
    summed_Tk = torch.zeros_like(weight_Tk).scatter_add_(1, first_Tk, weight_Tk)
    return index_Tk.where(first_Tk == slot_k, index_Tk.new_tensor(-1)), summed_Tk


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _shape(experts: nn.Module, facts: ModelFacts) -> LayerShape:
    alias_E = getattr(experts, ALIAS_MAP, None)
    rows = experts.num_experts if alias_E is None else len(alias_E)
    return LayerShape(experts.num_experts, rows, facts.hidden, facts.score)


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """A new tensor in the place of a parameter or buffer; the old one may be somebody else's."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if last in owner._buffers:
        owner._buffers[last] = value
    else:
        owner._parameters[last] = nn.Parameter(value, requires_grad=False)


# --- recording what the layers are called with ----------------------------------------------------


class _Recorder(nn.Module):
    """Stands for a decoder layer: notes its arguments and returns its input, or `answer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.hidden, self.arguments = hidden, (args[1:], kwargs)
        return hidden if self.answer is None else self.answer


class _Replaced:
    """The decoder layers of a model, replaced for a while."""

    def __init__(self, model: nn.Module, path: str, layers: Sequence[nn.Module]) -> None:
        parent, _, self._name = path.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._mine, self._stock = nn.ModuleList(layers), getattr(self._parent, self._name)

    def __enter__(self) -> None:
        setattr(self._parent, self._name, self._mine)

    def __exit__(self, *exc: object) -> None:
        setattr(self._parent, self._name, self._stock)


@dataclass(frozen=True, slots=True)
class _Run:
    """One batch in one layer."""

    arguments: tuple[tuple, dict[str, Any]]
    rows: Tensor | None
    """Rows of [B*S] that are no padding; None when all are."""


class _Runs:
    """Arguments of every layer for every batch. Equal tensors are kept once: without padding all batches
    share them.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device, home: torch.device) -> None:
        self._rows = [_valid_rows(batch, device) for batch in batches]
        self._home = home
        self._batches: list[list[tuple[tuple, dict[str, Any]]]] = []
        self._known: dict[tuple, list[Tensor]] = {}

    def add(self, arguments: list[tuple[tuple, dict[str, Any]]]) -> None:
        seen: dict[int, Tensor] = {}
        self._batches.append([_mapped(layer, lambda t: self._shared(t, seen)) for layer in arguments])

    def of(self, layer: int) -> list[_Run]:
        return [_Run(batch[layer], rows) for batch, rows in zip(self._batches, self._rows, strict=True)]

    def _shared(self, tensor: Tensor, seen: dict[int, Tensor]) -> Tensor:
        if id(tensor) not in seen:
            known = self._known.setdefault((tensor.shape, tensor.dtype), [])
            mine = tensor.to(self._home)
            equal = next((other for other in reversed(known[-4:]) if torch.equal(other, mine)), None)
            if equal is None:
                known.append(mine)
            seen[id(tensor)] = mine if equal is None else equal
        return seen[id(tensor)]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _moved(arguments: tuple[tuple, dict[str, Any]], device: torch.device) -> tuple[tuple, dict[str, Any]]:
    return _mapped(arguments, lambda tensor: tensor.to(device))


def _valid_rows(batch: Batch, device: torch.device) -> Tensor | None:
    mask = batch.attention_mask.flatten() != 0
    return None if bool(mask.all()) else mask.nonzero().flatten().to(device)


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}


def _quiet_routers(model: Any) -> Any:
    """No router loss: it would ask the recorders for router logits."""
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
    return model


def _home(model: Any, batches: Sequence[Batch], device: torch.device) -> torch.device:
    """Where hidden states wait: on the device when inputs and outputs of a layer fit beside its weights,
    else the CPU.
    """
    if device.type != "cuda":
        return torch.device("cpu")
    layers = adapter.decoder_layers(model)[1]
    weights = 2 * max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    width = model.config.get_text_config().hidden_size
    states = 2 * sum(batch.input_ids.numel() for batch in batches) * width * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return device if weights + states < 0.6 * free else torch.device("cpu")
