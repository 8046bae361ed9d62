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

Memory: one layer's weights (two while the next is read ahead), the hidden states of all tokens twice, and the
activations of one micro-batch; where they lie and how large it is, `engine.memory` decides. When the device runs
out all the same, the layer is done again with half as many sequences at a time. Embeddings and head are resident
only at the start and the end.

On CUDA in bf16 the routed experts run once, in our own grouped pass that keeps their un-gated outputs
(`engine.fused`, with the tolerance it states). Elsewhere, and for experts of another layout, un-gated outputs are
computed by the stock experts module on tokens sorted by expert, with one slot of weight 1, which holds for
every family (biases, clamps, interleaving): a statistic that needs them then runs the routed experts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint, LayerStats
from moecli.core.errors import StageFailed
from moecli.core.model import ModelFacts
from moecli.engine.collectors import CATALOGUE, Collector, Grouped, LayerShape, collectors, needs_of
from moecli.engine.data import Batch
from moecli.engine.fetch import fetched
from moecli.engine.flow import Flow, Recorder, Replaced, Text, inputs, moved
from moecli.engine.fused import FusedLayer, fused, inner_of, outputs_of
from moecli.engine.loader import Loader
from moecli.engine.memory import Plan, plan_for, sizes_of
from moecli.engine.ranks import ALONE, Ranks, combined
from moecli.families import adapter
from moecli.families.alias import ALIAS_MAP

CHUNK_BYTES = 256 << 20
"""Largest expert output held at a time, counted in fp32."""

Track = Callable[[Sequence[int], str], Iterable[int]]
T = TypeVar("T")


def sweep(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    track: Track | None = None,
    plan: Plan | None = None,
    sweeps: int = 1,
    ranks: Ranks = ALONE,
    statistics: Sequence[str] = (),
) -> Sweep:
    """Iterate over the decoder layers of `checkpoint` while `batches` flow through them.

    `dtype` defaults to the checkpoint's. `track(items, label)` shows progress. `plan` overrules the one made from free
    memory, of which each of `sweeps` that run side by side may use its share; `statistics` names those that will be
    observed, for which it leaves room. SurroundingsError when the checkpoint does not fit its own config, or a layer
    with its statistics not the device.

    With several `ranks` each runs its block of the batches, and all observe the statistics of all.
    """
    show = track or (lambda items, label: items)
    return Sweep(checkpoint, tuple(batches), torch.device(device), dtype, show, plan, sweeps, ranks, statistics)


class Sweep:
    """One pass over the layers: iterate it once, then `logits` may be asked for.

    `plan` is what was decided about memory, `notes` what happened to it on the way; both are lines for a report.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype | None,
        track: Track,
        plan: Plan | None,
        sweeps: int = 1,
        ranks: Ranks = ALONE,
        statistics: Sequence[str] = (),
    ) -> None:
        text = Text.of(batches, ranks)
        batches = ranks.split(batches)
        checkpoint = adapter.dense(checkpoint)
        self._checkpoint, self._device, self._track = checkpoint, device, track
        self._model = _quiet_routers(adapter.empty_model(checkpoint.config, dtype))
        self._names = adapter.tensor_map(self._model, checkpoint)
        sizes = sizes_of(self._model, checkpoint.facts, batches, statistics)
        self.plan = plan or plan_for(sizes, device, sweeps, ranks.local_size)
        self.notes: list[str] = []
        self._flow = Flow(batches, device, self.plan, text)
        self._started, self._done = False, 0
        self._routes: Routes | None = None

    def __len__(self) -> int:
        return len(self._names.layers)

    def __iter__(self) -> Iterator[SweptLayer]:
        if self._started:
            raise RuntimeError("a sweep runs once; make a new one")
        self._started = True
        self._flow.hidden = self._record(keep=True)
        self._flow.shelf.turn()
        loader = Loader(
            self._model, self._checkpoint, self._names, self._device, self.plan.ahead, ranks=self._flow.text.ranks
        )
        try:
            for index in self._track(range(len(self)), "layers"):
                yield from self._layer(index, loader)
        finally:
            loader.close()
            if self._done < len(self):
                self._flow.shelf.close()

    def _layer(self, index: int, loader: Loader) -> Iterator[SweptLayer]:
        module = loader.load(index)
        try:
            layer = SweptLayer(
                index, module, self._checkpoint.facts, self._flow, loader, lambda: self._halve(index), self._routes
            )
            yield layer
            self._flow.advance(layer.made())
            self._routes = layer.routes
        finally:
            loader.free(index)
        self._done = index + 1

    def report(self) -> list[str]:
        """What a reader of the run should know: the plan where there was a choice, and what came of it."""
        chosen = self._device.type != "cpu" or self.plan.home != "memory"
        return [*([str(self.plan)] if chosen else []), *self.notes]

    def logits(self) -> Iterator[Tensor]:
        """Logits [B, S, vocabulary] of each batch, on the device, after all layers have run."""
        if self._done < len(self):
            raise RuntimeError(f"{self._done} of {len(self)} layers have run; logits need all")
        adapter.load_outside(self._model, self._checkpoint, self._names, self._device)
        try:
            held: list[Tensor] = []
            for index, source in enumerate(self._flow.sources):
                held.append(self._finish(index))
                if self._flow.sources[index + 1 : index + 2] != [source]:
                    yield held[0] if len(held) == 1 else torch.cat(held)
                    held = []
        finally:
            adapter.free_outside(self._model, self._names)

    @property
    def flow(self) -> Flow:
        """The micro-batches and their hidden states; after all layers have run, those after the last one."""
        return self._flow

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from hidden states after the last layer to logits, [N, D] -> [N, vocabulary], on the device.

        Rows may be of any positions: final norm and head treat each by itself. It is for those who cannot hold the
        logits of a whole batch.
        """
        if self._done < len(self):
            raise RuntimeError(f"{self._done} of {len(self)} layers have run; logits need all")
        adapter.load_outside(self._model, self._checkpoint, self._names, self._device)
        try:
            yield torch.no_grad()(self._logits_of)
        finally:
            adapter.free_outside(self._model, self._names)

    def _logits_of(self, hidden_ND: Tensor) -> Tensor:
        recorders = [Recorder(layer) for layer in adapter.decoder_layers(self._model)[1]]
        recorders[-1].answer = hidden_ND[None]
        ids = torch.zeros(1, len(hidden_ND), dtype=torch.int64, device=self._device)
        with Replaced(self._model, self._names.prefix, recorders):
            return self._model(input_ids=ids, use_cache=False).logits[0]

    def _halve(self, index: int) -> bool:
        """Half as many sequences at a time after the device ran out of memory; False when there is one only."""
        if not self._flow.halve():
            return False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        now = self._flow.sequences
        self.notes.append(
            f"layer {index} ran out of memory; from there at most {now} sequence{'s' * (now > 1)} at a time"
        )
        self._record(keep=False)
        return True

    @torch.no_grad()
    def _record(self, keep: bool) -> list[Tensor]:
        """Embed every micro-batch and note what each layer is called with; the embeddings if `keep`."""
        adapter.load_outside(self._model, self._checkpoint, self._names, self._device)
        hidden = []
        for index, batch in enumerate(self._flow.batches):
            recorders = [Recorder(layer) for layer in adapter.decoder_layers(self._model)[1]]
            with Replaced(self._model, self._names.prefix, recorders):
                self._model.base_model(**inputs(batch, self._device), use_cache=False)
            if keep:
                hidden.append(self._flow.shelf.put(index, recorders[0].hidden))
            self._flow.add([recorder.arguments for recorder in recorders])
        adapter.free_outside(self._model, self._names)
        return hidden

    @torch.no_grad()
    def _finish(self, index: int) -> Tensor:
        layers = adapter.decoder_layers(self._model)[1]
        recorders = [Recorder(layer) for layer in layers]
        recorders[-1].answer = self._flow.here(index)
        with Replaced(self._model, self._names.prefix, recorders):
            return self._model(**inputs(self._flow.batches[index], self._device), use_cache=False).logits


class SweptLayer:
    """One decoder layer with its weights loaded and its inputs at hand. Valid until the loop goes on.

    `module` is the stock decoder layer, `shape` the sizes of its routed part (None for a dense layer), `routes` where
    its tokens went when it last ran, or those of the MoE layer before.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        facts: ModelFacts,
        flow: Flow,
        loader: Loader,
        halve: Callable[[], bool],
        before: Routes | None = None,
    ) -> None:
        self.index, self.module, self._facts = index, module, facts
        self._flow, self._loader, self._halve = flow, loader, halve
        self.rows: Tensor | None = None
        """Positions of the tokens in the micro-batch that runs, flat; None: all. For hooks on parts of `module`."""
        self._outputs: list[Tensor] | None = None
        self._before, self.routes = before, before
        self._look()

    def _look(self) -> None:
        self.parts = adapter.moe_parts(self.module)
        self.is_moe = self.parts is not None
        before = 0 if self._before is None else self._before.experts
        self.shape = _shape(self.parts.experts, self._facts, before) if self.parts else None

    def observe(self, some: Iterable[Collector] = (), *, on_device: bool = False) -> LayerStats:
        """Statistics of all batches through the weights as they are now, in CPU memory; counts and gate sums are always
        among them. `on_device` leaves them where they were made, for those who use them and forget them.

        One sparse forward pass. What the layer is fed stays as it is, so a layer may be observed again,
        before and after `replace`. StageFailed for a dense layer, or when a statistic reads what the layer
        does not show.
        """
        if self.parts is None:
            raise StageFailed(f"layer {self.index} has no experts to observe")
        always = {c.name: c for c in collectors(("count", "gate_sum"))}
        wanted = {**always, **{c.name: c for c in some}}
        self._within_memory(lambda: self._observe(list(wanted.values())))
        found = combined(list(wanted.values()), self._flow.text.ranks, self._flow.text.here > 0)
        if not on_device:
            found = {name: fetched(value) for name, value in found.items()}
        return LayerStats(self._flow.text.tokens, found.pop("count"), found.pop("gate_sum"), found)

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

    def tensor(self, name: str) -> Tensor:
        """A weight of this layer by its on-disk name, on the device, as it is now; not to be written to. It is that of
        the checkpoint where the family stores it in another form than it runs it.
        """
        return self._loader.tensor(self.index, name)

    def linear(self, name: str) -> nn.Module:
        """The part of `module` that multiplies with a weight, by the weight's on-disk name."""
        return self._loader.linear(name)

    def rewrite(self, values: Mapping[str, Tensor]) -> None:
        """New values for weights by their on-disk names; later layers see them. Shapes stay as they are.

        All changes of a layer go in one call where the family stores weights in another form than it runs them.
        """
        self._loader.put(self.index, values)
        self._outputs = None

    def edit(self, change: Callable[[nn.Module], None]) -> None:
        """Let `change` do anything to the module, such as storing fewer experts; later layers see the
        result.
        """
        change(self.module)
        self._look()
        self._outputs = None

    def outputs(self) -> list[Tensor]:
        """What the layer makes of each batch, [B, S, D], computed once for the weights as they are now. Valid until
        the loop goes on.
        """
        made = self.made()
        self._flow.shelf.settle()
        return self._flow.joined(made)

    def watch(self, start: Callable[[], None]) -> None:
        """Run the layer, dense or not, for the hooks that were put on its parts; `start` is called before, and again
        whenever memory did not suffice and the pass begins anew.
        """

        def run() -> list[Tensor]:
            start()
            return self._run()

        self._outputs = self._within_memory(run)

    def made(self) -> list[Tensor]:
        """`outputs`, one for each micro-batch, perhaps still on their way."""
        if self._outputs is None:
            self._outputs = self._within_memory(self._run)
        return self._outputs

    def settle(self, outputs: list[Tensor]) -> None:
        """What the layer makes of each micro-batch, on the shelf, made elsewhere with the weights as they are now."""
        self._outputs = outputs
        self.routes = None if self.is_moe else self._before

    def _within_memory(self, work: Callable[[], T]) -> T:
        """Do the work; when the device's memory does not suffice, with half as many sequences at a time."""
        while True:
            self._outputs = None
            try:
                return work()
            except torch.OutOfMemoryError:
                pass  # what the failed pass holds is free only after this clause
            if not self._halve():
                raise StageFailed(
                    "out of memory with one sequence at a time",
                    where=f"layer {self.index}",
                    hint="lower `tokens_per_sample`, or use a device with more memory",
                )

    def _run(self) -> list[Tensor]:
        outputs, routes = [], []
        with fused(self.module, self.parts, keep=False):
            for i in range(len(self._flow.hidden)):
                with _Probe(self.module, self.parts, frozenset(), self.index) as probe:
                    outputs.append(self._flow.shelf.put(i, self._forward(i)))
                if self.is_moe:
                    routes.append(probe.route(self._flow.run(self.index, i).rows))
                del probe  # before the next batch: it holds several activations
        self._went(routes)
        return outputs

    def _went(self, routes: list[Tensor]) -> None:
        if self.is_moe:
            none = torch.empty(0, self.shape.slots, dtype=torch.int16, device=self._flow.device)
            self.routes = Routes(torch.cat([none, *routes]), self.shape.experts)

    @torch.no_grad()
    def _forward(self, index: int, hidden: Tensor | None = None) -> Tensor:
        """What the layer makes of a micro-batch: of its own input, or of `hidden` in its place."""
        run = self._flow.run(self.index, index)
        self.rows = run.rows
        args, kwargs = moved(run.arguments, self._flow.device)
        out = self.module(self._flow.here(index) if hidden is None else hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def _observe(self, wanted: Sequence[Collector]) -> None:
        for collector in wanted:
            collector.start(self.shape, self._flow.device)
        needs, tokens, outputs = needs_of(wanted), self._flow.text.first, []
        if "before" in needs and self._before is None and self.index != self._facts.moe_layers[0]:
            raise StageFailed("where the tokens went in the layer before is not known", where=f"layer {self.index}")
        first, routes = tokens, []
        with fused(self.module, self.parts, keep="outputs" in needs, inner="inner" in needs) as fast:
            for i in range(len(self._flow.hidden)):
                with _Probe(self.module, self.parts, needs, self.index) as probe:
                    outputs.append(self._flow.shelf.put(i, self._forward(i)))
                before_Tk = None if self._before is None else self._before.index_Tk[tokens - first :]
                seen = probe.tokens(self._flow.run(self.index, i).rows, tokens, self.shape, fast, before_Tk)
                tokens += seen.tokens
                routes.append(seen.index_Tk.to(torch.int16))
                _update(wanted, seen)
                del probe, seen  # before the next batch: they hold several activations
        self._outputs = outputs
        self._went(routes)


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the tokens of a layer went."""

    index_Tk: Tensor
    """int16, stored expert of each slot of every token in the order of the text; -1 is no visit"""
    experts: int
    """Stored experts of that layer."""


# --- what an observed layer shows -----------------------------------------------------------------


class _Probe:
    """Hooks on one MoE layer: the three inputs of `experts` (the same in every version and family), their
    sum, and, when asked for, the router's logits, the residual stream and what the block adds to it.
    """

    def __init__(self, layer: nn.Module, parts: adapter.MoeParts | None, needs: frozenset[str], index: int) -> None:
        self._layer, self._parts, self._needs, self._index = layer, parts, needs, index
        self._norms: list[tuple[Tensor, Tensor]] = []
        self.logits: Tensor | None = None
        self.residual: Tensor | None = None
        self.block: Tensor | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> _Probe:
        if self._parts is None:
            return self
        experts = self._parts.experts
        self._on(experts.register_forward_hook(self._see_experts, with_kwargs=True))
        if "logits" in self._needs:
            self._on(self._parts.router.register_forward_hook(self._see_router))
        if "block" in self._needs:
            self._on(self._parts.block.register_forward_hook(self._see_sum))
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

    def _see_sum(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.block = _rows(out[0] if isinstance(out, tuple) else out)

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

    def route(self, rows: Tensor | None) -> Tensor:
        """int16 [T, k], stored expert of each slot of the batch's tokens without padding."""
        index = self.index if rows is None else self.index.index_select(0, rows)
        weight = self.weight if rows is None else self.weight.index_select(0, rows)
        return _coalesced(self._parts.experts, index, weight)[0].to(torch.int16)

    def tokens(
        self, rows: Tensor | None, seen: int, shape: LayerShape, fast: FusedLayer, before_Tk: Tensor | None
    ) -> Grouped:
        """The batch's tokens without padding; `seen` tokens came before, and `before_Tk` starts with theirs."""
        self._refuse_blind(shape)
        pick = (lambda x: x) if rows is None else (lambda x: x.index_select(0, rows))
        experts = self._parts.experts
        hidden, choice = pick(self.hidden), pick(self.index)
        index, weight = _coalesced(experts, choice, pick(self.weight))
        scale = getattr(self._layer, "residual_multiplier", 1.0)
        alias_E, visits = getattr(experts, ALIAS_MAP, None), fast.take()
        run = outputs_of if fast.experts is not None else _run_experts
        return Grouped(
            shape=shape, hidden_TD=hidden, index_Tk=index, weight_Tk=weight,
            token_T=torch.arange(seen, seen + len(hidden)),
            run_experts=lambda x_SD, expert_S: run(experts, x_SD, expert_S),
            run_inner=lambda x_SD, expert_S: inner_of(experts, x_SD, expert_S),
            choice_Tk=choice, alias_E=alias_E,
            before_Tk=None if before_Tk is None else before_Tk[: len(hidden)],
            logits_TE=None if self.logits is None else pick(self.logits),
            residual_TD=None if self.residual is None else pick(_rows(self.residual)),
            routed_TD=pick(self.routed) if scale == 1 else pick(self.routed) * scale,
            block_TD=None if self.block is None else pick(self.block) if scale == 1 else pick(self.block) * scale,
            visits=visits,
            place_Tk=None if visits is None else pick(visits.groups.place_Tk),
            whole=rows is None and alias_E is None,
            sum_experts=None if fast.experts is None else fast.sum_all,
        )  # fmt: skip

    def _refuse_blind(self, shape: LayerShape) -> None:
        where = f"layer {self._index}"
        if "logits" in self._needs and (self.logits is None or self.logits.shape[-1] != shape.rows):
            raise StageFailed(
                f"the router does not show the logits of its {shape.rows} rows",
                where=where,
                hint=f"leave {_reading('logits')} out of `statistics`",
            )
        if "residual" in self._needs and self.residual is None:
            raise StageFailed(
                "no norm feeds the MoE block, so its input cannot be compared with the stream",
                where=where,
                hint=f"leave {_reading('residual')} out of `statistics`",
            )


def _reading(need: str) -> str:
    return ", ".join(f"`{name}`" for name, kind in CATALOGUE.items() if need in kind.needs)


def _update(wanted: Sequence[Collector], seen: Grouped) -> None:
    """Chunks are as large as what is made of them allows: k rows per token, or all E. What the layer's own pass left,
    and sums over tokens that it can take, need no chunks.
    """
    slots, experts, (hidden, width) = seen.index_Tk.shape[1], seen.shape.experts, (seen.shape.hidden, seen.shape.width)
    sums = [c for c in wanted if "all_sums" in c.needs]
    pairs = [c for c in wanted if "all_outputs" in c.needs]
    light = [c for c in wanted if c not in sums and c not in pairs]
    whole = seen.visits is not None or needs_of(light).isdisjoint({"outputs", "inner"})
    if seen.sum_experts is None:
        sums, pairs = [], [*sums, *pairs]
    for some, held, values_per_token in (
        (light, whole, slots * max(hidden, width)), (sums, True, 0), (pairs, False, experts * hidden),
    ):  # fmt: skip
        for chunk in _chunks(seen, values_per_token, held) if some else ():
            for collector in some:
                collector.update(chunk)


def _chunks(seen: Grouped, values_per_token: int, held: bool) -> Iterator[Grouped]:
    if held:
        yield seen
        return
    size = max(1, CHUNK_BYTES // (values_per_token * 4))
    none: dict[str, Any] = {"visits": None, "place_Tk": None, "whole": False, "sum_experts": None}
    for start in range(0, seen.tokens, size):
        values = {name: getattr(seen, name) for name in _PER_TOKEN}
        cut = {name: v if v is None else v[start : start + size] for name, v in values.items()}
        yield replace(seen, **cut, **none)


_PER_TOKEN = (
    "hidden_TD", "index_Tk", "weight_Tk", "token_T", "choice_Tk", "before_Tk", "logits_TE", "residual_TD", "routed_TD",
    "block_TD",
)  # fmt: skip


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


def _shape(experts: nn.Module, facts: ModelFacts, before: int) -> LayerShape:
    alias_E = getattr(experts, ALIAS_MAP, None)
    stored = experts.num_experts
    rows = stored if alias_E is None else len(alias_E)
    width = experts.down_proj.numel() // (stored * facts.hidden)
    return LayerShape(stored, rows, facts.hidden, facts.score, width, facts.top_k, before)


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """A new tensor in the place of a parameter or buffer; the old one may be somebody else's."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if last in owner._buffers:
        owner._buffers[last] = value
    else:
        owner._parameters[last] = nn.Parameter(value, requires_grad=False)


def _quiet_routers(model: Any) -> Any:
    """No router loss: it would ask the recorders for router logits."""
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
    return model
