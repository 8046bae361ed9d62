"""Gradients one decoder layer at a time: all text goes through every layer, then back from the last to the first.

    swept = backward_sweep(checkpoint, batches, device=device)
    for layer in swept:                  # optional: the way there, with everything `sweep` offers
        layer.observe(collectors(["h2"]))
    for layer in swept.back():           # last layer first
        if layer.is_moe:
            stats = layer.observe(collectors(["gh2"]))

The loss is the next-token cross entropy of the model in eval mode, in natural logarithms, summed over all positions
whose next token exists and is no padding: summed, so that it does not matter what is in one batch, and no auxiliary
router loss. Tokens that statistics leave out are part of the loss all the same. Gradients are those of activations;
weights get none.

The hidden states before every layer are kept: on the device while there is room, then in page-locked CPU memory, then
in mapped files. On the way back each layer runs again with grad, one micro-batch at a time, so a graph holds one
micro-batch in one layer. The head runs in chunks of tokens: logits of all tokens never exist at once. Embedding and
head are resident at the start and between the two ways; layers are read once each way.

Gradients of hidden states are kept in the model's dtype, as in training. float16 is refused: its range is too small for
them. Products and roundings on the way back are those of `engine.pullback`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from moecli.core.artifacts import Checkpoint, LayerStats
from moecli.core.errors import StageFailed, UsageError
from moecli.core.model import ModelFacts
from moecli.engine.collectors import Collector, Grouped, collectors
from moecli.engine.data import Batch
from moecli.engine.fetch import fetched
from moecli.engine.flow import Flow, moved
from moecli.engine.fused import inner_of
from moecli.engine.loader import Loader
from moecli.engine.memory import (
    DEVICE_SHARE,
    HOST_SHARE,
    Plan,
    Shelf,
    Sizes,
    _free_in_memory,
    _free_on_device,
    plan_for,
    sizes_of,
)
from moecli.engine.probe import run_experts, update
from moecli.engine.pullback import Routed, differentiable
from moecli.engine.ranks import ALONE, Ranks, combined
from moecli.engine.sweep import Sweep, SweptLayer, Track, _shape
from moecli.families import adapter

HEAD_BYTES = 512 << 20
"""Largest logits held at a time, counted in fp32; their gradient takes as much again, twice."""
GRAPH_FACTOR = 3
"""A layer's activations with grad, in activations of a plain pass, estimated from above."""
IGNORED = -100
SHOWN = frozenset({"outputs", "inner", "slope", "gradients"})
"""What collectors may need on the way back."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that hidden states between the layers may take on the device and in CPU memory; the rest goes to files."""

    device: int
    memory: int


def backward_sweep(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    track: Track | None = None,
    plan: Plan | None = None,
    room: Room | None = None,
    ranks: Ranks = ALONE,
    statistics: Sequence[str] = (),
) -> BackwardSweep:
    """A sweep that can go back. Arguments are those of `engine.sweep.sweep`; `plan` and `room` overrule what is made
    from free memory.

    UsageError for float16, SurroundingsError when the checkpoint does not fit its own config.
    """
    show = track or (lambda items, label: items)
    return BackwardSweep(checkpoint, tuple(batches), torch.device(device), dtype, show, plan, room, ranks, statistics)


class BackwardSweep(Sweep):
    """Iterate it, or go `back` at once, which does what is left of the way there first.

    `loss` and `targets` are known as soon as the way back has begun.
    """

    loss: float
    """Cross entropy in nats, summed over `targets` tokens of all ranks."""
    targets: int

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype | None,
        track: Track,
        plan: Plan | None,
        room: Room | None,
        ranks: Ranks,
        statistics: Sequence[str],
    ) -> None:
        super().__init__(checkpoint, batches, device, dtype, track, plan or Plan("memory", 1, False, 0), ranks=ranks)
        if self._model.dtype == torch.float16:
            raise UsageError("gradients leave the range of float16", hint="set `model` to a bfloat16 copy of it")
        text, batches = self._flow.text, ranks.split(batches)
        sizes = sizes_of(self._model, self._checkpoint.facts, batches, statistics)
        with_graph = replace(sizes, sequence=GRAPH_FACTOR * sizes.sequence)
        self.plan = plan or plan_for(with_graph, device, processes=ranks.local_size)
        self._flow.shelf.close()
        self._flow = Flow(batches, device, self.plan, text)
        self._flow.shelf.close()
        self._flow.shelf = self._kept = Kept(device, room or room_for(with_graph, self.plan, device, ranks.local_size))
        self._states: list[list[Tensor]] = []

    def _layer(self, index: int, loader: Loader) -> Iterator[SweptLayer]:
        self._states.append(self._flow.hidden)
        yield from super()._layer(index, loader)

    def back(self) -> Iterator[BackLayer]:
        """The layers from the last to the first, each with the gradient of its output at hand."""
        if not self._started:
            for _ in self:
                pass
        if self._done < len(self):
            raise RuntimeError(f"{self._done} of {len(self)} layers have run; the way back needs all")
        if len(self._states) < len(self):
            raise RuntimeError("a sweep goes back once; make a new one")
        shelf = Shelf(self.plan.home, self._device, self.plan.states)
        loader = Loader(
            self._model, self._checkpoint, self._names, self._device, self.plan.ahead, step=-1,
            ranks=self._flow.text.ranks,
        )  # fmt: skip
        try:
            self._from_the_head(shelf)
            for index in self._track(range(len(self))[::-1], "layers, backward"):
                yield from self._layer_back(index, loader)
        finally:
            loader.close()
            self._states.clear()
            self._kept.close()
            shelf.close()

    def report(self) -> list[str]:
        where = f"; between layers {self._kept}" if self._device.type != "cpu" or self._kept.files else ""
        return [line + where if line == str(self.plan) else line for line in super().report()]

    def _layer_back(self, index: int, loader: Loader) -> Iterator[BackLayer]:
        module = loader.load(index).requires_grad_(False)
        try:
            layer = BackLayer(
                index, module, self._checkpoint.facts, self._flow, self._states_before(index),
                lambda: self._halve(index),
            )  # fmt: skip
            yield layer
            self._flow.advance(layer.made())
        finally:
            loader.free(index)
            del self._states[index:]

    def _states_before(self, index: int) -> Callable[[], list[Tensor]]:
        """What the layer was fed, by micro-batches as they are now: these may have been halved since."""

        def states() -> list[Tensor]:
            pieces: list[Tensor] = []
            sizes = iter([batch.input_ids.shape[0] for batch in self._flow.batches])
            for state in self._states[index]:
                start = 0
                while start < len(state):
                    size = next(sizes)
                    pieces.append(state[start : start + size])
                    start += size
            return pieces

        return states

    def _from_the_head(self, shelf: Shelf) -> None:
        """The loss, and its gradient at the end of the last layer in the place of the hidden states."""
        adapter.load_outside(self._model, self._checkpoint, self._names, self._device)
        self._model.requires_grad_(False)
        final, self._flow.hidden, self._flow.shelf = self._flow.hidden, [], shelf
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self.targets, made = 0, []
        try:
            for index, (batch, state) in enumerate(zip(self._flow.batches, final, strict=True)):
                wanted = next_tokens(batch)
                self.targets += int((wanted != IGNORED).sum())
                loss, slope = self._head(state.to(self._device), wanted.to(self._device))
                total += loss
                made.append(shelf.put(index, slope))
        finally:
            adapter.free_outside(self._model, self._names)
        del final
        self._flow.advance(made)
        both = torch.stack([total, torch.tensor(float(self.targets), dtype=torch.float64, device=total.device)])
        self._flow.text.ranks.combine([(both, "sum")])
        self.loss, self.targets = float(both[0]), int(both[1])
        if self.targets == 0:
            raise StageFailed(
                "no token of the calibration text has a next one", hint="write `tokens_per_sample: 2` or more"
            )
        if not math.isfinite(self.loss):
            raise StageFailed(
                "the loss on the calibration text is not a number", hint="check the model with `moecli verify`"
            )

    def _head(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of a micro-batch [B, S, D] with targets [B, S], and its gradient."""
        per_chunk = max(1, HEAD_BYTES // (4 * self._checkpoint.facts.vocab))
        slope = torch.zeros_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for row in range(len(hidden)):
            for start in range(0, hidden.shape[1], per_chunk):
                part = (row, slice(start, start + per_chunk))
                leaf = hidden[part].detach().requires_grad_()
                with torch.enable_grad():
                    logits = self._logits_of(leaf)
                    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    loss = functional.cross_entropy(exact, wanted[part], reduction="sum", ignore_index=IGNORED)
                (slope[part],) = torch.autograd.grad(loss, leaf)
                total += loss.detach()
        return total, slope


class BackLayer:
    """One decoder layer on the way back, with its weights, what it was fed, and the gradient of what it made. Valid
    until the loop goes on.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        facts: ModelFacts,
        flow: Flow,
        states: Callable[[], list[Tensor]],
        halve: Callable[[], bool],
    ) -> None:
        self.index, self.module = index, module
        self._flow, self._states, self._halve = flow, states, halve
        self.parts = adapter.moe_parts(module)
        self.is_moe = self.parts is not None
        self.shape = _shape(self.parts.experts, facts, 0) if self.parts else None
        self._made: list[Tensor] | None = None

    def observe(self, some: Iterable[Collector] = (), *, on_device: bool = False) -> LayerStats:
        """Statistics of gradients over all batches, and others that take no more than tokens, routes and what is inside
        an expert; counts and gate sums are always among them. Those that need the `slope` are shown it beside what a
        forward sweep shows. `on_device` leaves them where they were made. The layer may be observed again; it runs
        without a way back where no statistic needs one.

        StageFailed for a dense layer, or experts whose way back is unknown; ValueError for a statistic that takes more.
        """
        if self.parts is None:
            raise StageFailed(f"layer {self.index} has no experts to observe")
        always = collectors(("count", "gate_sum"))
        wanted = {c.name: c for c in some if c.name not in ("count", "gate_sum")}
        for collector in wanted.values():
            if missing := collector.needs - SHOWN:
                raise ValueError(f"`{collector.name}` needs {', '.join(sorted(missing))}, which the way back lacks")
        self._within_memory(lambda: self._run(always, list(wanted.values())))
        text = self._flow.text
        found = combined([*always, *wanted.values()], text.ranks)
        if not on_device:
            found = {name: fetched(value) for name, value in found.items()}
        return LayerStats(text.tokens, found.pop("count"), found.pop("gate_sum"), found)

    def output_grads(self) -> list[Tensor]:
        """dl/d(output of the layer) of each batch, [B, S, D], where it waits; 0 on padding. Its square is what
        gradient-weighted quantization errors are weighted with.
        """
        self._flow.shelf.settle()
        return self._flow.joined(self._flow.hidden)

    def input_grads(self) -> list[Tensor]:
        """dl/d(input of the layer) of each batch, [B, S, D]."""
        made = self.made()
        self._flow.shelf.settle()
        return self._flow.joined(made)

    def made(self) -> list[Tensor]:
        """`input_grads`, one for each micro-batch, perhaps still on their way."""
        if self._made is None:
            self._within_memory(lambda: self._run([], []))
        assert self._made is not None
        return self._made

    def _within_memory(self, work: Callable[[], None]) -> None:
        """As `SweptLayer` does: begin again with half as many sequences when the device's memory does not suffice."""
        while True:
            self._made = None
            try:
                work()
                return
            except torch.OutOfMemoryError:
                pass  # what the failed pass holds is free only after this clause
            if not self._halve():
                raise StageFailed(
                    "out of memory with one sequence at a time",
                    where=f"layer {self.index}, backward",
                    hint="lower `tokens_per_sample`, or use a device with more memory",
                )

    def _run(self, always: Sequence[Collector], wanted: Sequence[Collector]) -> None:
        for collector in (*always, *wanted):
            collector.start(self.shape, self._flow.device)
        seen, made = self._flow.text.first, []
        pulled = [collector for collector in wanted if "gradients" in collector.needs]
        grouped = [*always, *(collector for collector in wanted if "gradients" not in collector.needs)]
        sloped = any("slope" in collector.needs for collector in wanted)
        ahead = bool(wanted) and not (pulled or sloped)
        with differentiable(self.module, self.parts, keep=bool(pulled)) as routed:
            for i, state in enumerate(self._states()):
                if ahead:
                    self._ahead(i, state)
                else:
                    made.append(self._flow.shelf.put(i, self._pull(i, state)))
                if always and routed is not None:
                    rows, slope = self._flow.run(self.index, i).rows, self._flow.here(i) if sloped else None
                    seen += self._update(grouped, pulled, routed, rows, seen, slope)
        self._made = None if ahead else made

    @torch.no_grad()
    def _ahead(self, index: int, state: Tensor) -> None:
        args, kwargs = moved(self._flow.run(self.index, index).arguments, self._flow.device)
        self.module(state.to(self._flow.device, non_blocking=True), *args, **kwargs)

    def _pull(self, index: int, state: Tensor) -> Tensor:
        args, kwargs = moved(self._flow.run(self.index, index).arguments, self._flow.device)
        leaf = state.to(self._flow.device, non_blocking=True).detach().requires_grad_()
        with torch.enable_grad():
            out = self.module(leaf, *args, **kwargs)
        (slope,) = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaf, self._flow.here(index))
        return slope

    @torch.no_grad()
    def _update(
        self, grouped: Sequence[Collector], wanted: Sequence[Collector], routed: Routed, rows: Tensor | None, seen: int,
        slope: Tensor | None,
    ) -> int:  # fmt: skip
        """Feed the collectors with tokens that statistics count (`rows`; None: all); returns their number."""
        if wanted:
            pulled = routed.take()
            pulled = pulled if rows is None else pulled.only(rows)
            for collector in wanted:
                collector.update(pulled)
        hidden, choice, index, weight = (x if rows is None else x.index_select(0, rows) for x in routed.seen)
        if slope is not None:
            slope = slope.reshape(-1, slope.shape[-1])
            slope = slope if rows is None else slope.index_select(0, rows)
        experts = self.parts.experts
        some = Grouped(
            shape=self.shape, hidden_TD=hidden, index_Tk=index, weight_Tk=weight, choice_Tk=choice,
            alias_E=routed.alias_E, token_T=torch.arange(seen, seen + len(hidden)), slope_TD=slope,
            run_experts=lambda x_SD, expert_S: run_experts(experts, x_SD, expert_S),
            run_inner=lambda x_SD, expert_S: inner_of(experts, x_SD, expert_S),
        )  # fmt: skip
        update(grouped, some)
        return len(hidden)


def next_tokens(batch: Batch) -> Tensor:
    """int64 [B, S]: the token after each position, `IGNORED` where either is padding or there is none."""
    wanted = torch.full_like(batch.input_ids, IGNORED)
    both = (batch.attention_mask[:, :-1] != 0) & (batch.attention_mask[:, 1:] != 0)
    wanted[:, :-1] = batch.input_ids[:, 1:].where(both, IGNORED)
    return wanted


# --- hidden states between the layers -------------------------------------------------------------


def room_for(sizes: Sizes, plan: Plan, device: torch.device, processes: int) -> Room:
    """What is left of the memory that is free now, beside the layers, one micro-batch with its graph and the gradients
    that `plan` holds. CPU memory is shared by so many processes.
    """
    memory = int(HOST_SHARE * _free_in_memory()) // processes
    memory -= 2 * sizes.states if plan.home in ("memory", "pinned") else 0
    if device.type != "cuda":
        return Room(0, max(0, memory))
    room = int(DEVICE_SHARE * _free_on_device(device))
    room -= sizes.statistics + (2 if plan.ahead else 1) * sizes.layer + plan.sequences * sizes.sequence
    room -= 3 * HEAD_BYTES + (2 * sizes.states if plan.home == "device" else 0)
    return Room(max(0, room), max(0, memory))


class Kept(Shelf):
    """Hidden states that all stay: on the device, then in CPU memory, then in files, each until it is full."""

    def __init__(self, device: torch.device, room: Room) -> None:
        super().__init__("device" if device.type == "cuda" else "memory", device)
        self._left = {"device": room.device if device.type == "cuda" else 0, "memory": room.memory}
        self.held = {"device": 0, "memory": 0, "file": 0}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def files(self) -> int:
        """Bytes in files."""
        return self.held["file"]

    def __str__(self) -> str:
        words = {"device": "on the device", "memory": "in CPU memory", "file": "in files"}
        return ", ".join(f"{size / 2**30:.2f} GiB {words[home]}" for home, size in self.held.items() if size) or "none"

    def put(self, index: int, hidden: Tensor) -> Tensor:
        home = next((home for home, left in self._left.items() if left >= hidden.nbytes), "file")
        self.held[home] += hidden.nbytes
        if home in self._left:
            self._left[home] -= hidden.nbytes
        if home == "device" or (home == "memory" and not hidden.is_cuda):
            return hidden
        slot = self._mapped(hidden) if home == "file" else torch.empty_like(hidden, device="cpu", pin_memory=True)
        return slot.copy_(hidden, non_blocking=home == "memory")

    def turn(self) -> None:
        """Nothing is overwritten."""

    def settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        super().close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _mapped(self, like: Tensor) -> Tensor:
        """Memory over a file that has no name any more: its space is free when the tensor goes."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="moecli-states-")
        path = Path(self._scratch.name) / "state.bin"
        slot = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
        path.unlink()
        return slot
