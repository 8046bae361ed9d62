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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint, LayerStats
from moecli.core.errors import StageFailed
from moecli.core.model import ModelFacts
from moecli.engine.collectors import Collector, LayerShape, collectors, needs_of
from moecli.engine.data import Batch
from moecli.engine.fetch import fetched
from moecli.engine.flow import Flow, Recorder, Replaced, Text, inputs, moved
from moecli.engine.fused import fused
from moecli.engine.loader import Loader
from moecli.engine.memory import Plan, plan_for, sizes_of
from moecli.engine.probe import Probe, update
from moecli.engine.ranks import ALONE, Ranks, combined
from moecli.families import adapter
from moecli.families.alias import ALIAS_MAP

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
        self.running = 0
        """Which micro-batch that is."""
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
                with Probe(self.module, self.parts, frozenset(), self.index) as probe:
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
        self.rows, self.running = run.rows, index
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
                with Probe(self.module, self.parts, needs, self.index) as probe:
                    outputs.append(self._flow.shelf.put(i, self._forward(i)))
                before_Tk = None if self._before is None else self._before.index_Tk[tokens - first :]
                seen = probe.tokens(self._flow.run(self.index, i).rows, tokens, self.shape, fast, before_Tk)
                tokens += seen.tokens
                routes.append(seen.index_Tk.to(torch.int16))
                update(wanted, seen)
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
