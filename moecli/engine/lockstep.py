"""Two models over one text, layer by layer side by side, so that neither is whole in memory.

    pair = Lockstep(source, model, windows, batch_size=8, device=device)
    for layer, found in pair.layers(make):      # `make(layer)` gives an object with `add(source, original, propagated)`
        ...
    scores = pair.scores()                      # of each window, both heads on the same rows

Each layer runs three times: the source's on its own hidden states, and the model's on the source's (*original*
inputs: what the layer's weights alone change) and on its own (*propagated*: with all that changed before it). What is
compared are the positions that a window scores, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import StageFailed
from moecli.engine.fused import fused
from moecli.engine.scorer import Sequences, Window, parts, pieces, rows_per_piece
from moecli.engine.sweep import SweptLayer, Track, sweep
from moecli.ops.scoring import divergence


class Pass(NamedTuple):
    """One layer on T tokens. What is None the layer does not have, or does not show."""

    output_TD: Tensor
    """The residual stream after the layer"""
    block_TD: Tensor | None = None
    """What the MoE block adds to the stream"""
    index_Tk: Tensor | None = None
    """int64, router rows"""
    weight_Tk: Tensor | None = None
    logits_TE: Tensor | None = None
    """float32, of all router rows, before any score function or correction"""


class Comparison(Protocol):
    """Takes the three passes of one layer, some tokens at a time."""

    def add(self, source: Pass, original: Pass, propagated: Pass) -> None: ...


C = TypeVar("C", bound=Comparison)


class PairScores(NamedTuple):
    """Of one window, on the CPU, float32 [T] except where said."""

    source_T: Tensor
    """log-probability of each target"""
    model_T: Tensor
    divergence_T: Tensor
    """KL(source || model) in nats over the vocabulary"""
    same_T: Tensor
    """bool: both find the same token most likely"""


class Lockstep:
    """Iterate `layers` once, then ask for `scores`. StageFailed when the two do not have the same layers, width and
    vocabulary.
    """

    def __init__(
        self,
        source: Checkpoint,
        model: Checkpoint,
        windows: Sequence[Window],
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        track: Track | None = None,
    ) -> None:
        for name in ("layers", "hidden", "vocab"):
            before, after = getattr(source.facts, name), getattr(model.facts, name)
            if before != after:
                raise StageFailed(f"the models differ in `{name}`: {before} and {after}; they cannot be compared")
        self._windows, self._sequences = windows, Sequences.of(windows, share=False)
        batches = self._sequences.batches(batch_size)
        self._source = sweep(source, batches, device=device, dtype=dtype, track=track, sweeps=2)
        self._model = sweep(model, batches, device=device, dtype=dtype, plan=self._source.plan)
        self._piece = max(1, rows_per_piece(source.facts.vocab) // 2)

    def layers(self, make: Callable[[int], C]) -> Iterator[tuple[int, C]]:
        """(layer, what `make` gave for it and was shown all tokens)."""
        for source, model in zip(self._source, self._model, strict=True):
            yield source.index, self._within_memory(source, model, make)

    def report(self) -> list[str]:
        """Lines for a report, as of a sweep."""
        return self._source.report()

    def _within_memory(self, source: SweptLayer, model: SweptLayer, make: Callable[[int], C]) -> C:
        """One layer; when the device's memory does not suffice, again with half as many sequences at a time."""
        while True:
            found = make(source.index)
            try:
                self._compare(source, model, found)
                return found
            except torch.OutOfMemoryError:
                pass  # what the failed pass holds is free only after this clause
            if not (self._source._halve(source.index) and self._model._halve(source.index)):
                raise StageFailed(
                    "out of memory with one sequence at a time",
                    where=f"layer {source.index}",
                    hint="lower `window`, or use a device with more memory",
                )

    @torch.no_grad()
    def _compare(self, source: SweptLayer, model: SweptLayer, found: Comparison) -> None:
        first: list[Tensor] = []
        second: list[Tensor] = []
        before, after = self._source.flow, self._model.flow
        with ExitStack() as stack:
            for layer in (source, model):
                stack.enter_context(fused(layer.module, layer.parts, keep=False))
            one, two = (stack.enter_context(_Watch(layer)) for layer in (source, model))
            start = 0
            for index, batch in enumerate(before.batches):
                stop = start + len(batch.input_ids)
                rows = self._sequences.rows(start, stop, batch.input_ids.shape[1]).to(before.device)
                hidden = before.here(index)
                output = source._forward(index, hidden)
                original = two.seen(model._forward(index, hidden), rows)
                reached = model._forward(index, after.here(index))
                found.add(one.seen(output, rows), original, two.seen(reached, rows))
                first.append(before.shelf.put(index, output))
                second.append(after.shelf.put(index, reached))
                start = stop
        source.settle(first)
        model.settle(second)

    @torch.no_grad()
    def scores(self) -> list[PairScores]:
        """Of each window, in the order given, after all layers have run."""
        found: list[PairScores] = []
        with self._source.head() as source, self._model.head() as model:
            for (start, stop, before_BSD), (_, _, after_BSD) in zip(
                parts(self._source), parts(self._model), strict=True
            ):
                rows = self._sequences.rows(start, stop, before_BSD.shape[1]).to(before_BSD.device)
                wanted = [self._windows[index].targets for [index] in self._sequences.windows[start:stop]]
                target_R = torch.cat([torch.tensor(some) for some in wanted]).to(rows.device)
                values = [
                    _scores(source(before_BSD.flatten(0, 1)[some]), model(after_BSD.flatten(0, 1)[some]),
                            target_R[first : first + len(some)])
                    for first, some in pieces(rows, self._piece)
                ]  # fmt: skip
                counts = [len(some) for some in wanted]
                columns = [torch.cat(column).cpu().split(counts) for column in zip(*values, strict=True)]
                found += [PairScores(*some) for some in zip(*columns, strict=True)]
        for swept in (self._source, self._model):
            swept.flow.shelf.close()
        order = [index for [index] in self._sequences.windows]
        return [some for _, some in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _scores(source_RV: Tensor, model_RV: Tensor, target_R: Tensor) -> PairScores:
    p, q = source_RV.float().log_softmax(-1), model_RV.float().log_softmax(-1)
    at = target_R[:, None]
    return PairScores(p.gather(1, at)[:, 0], q.gather(1, at)[:, 0], divergence(p, q), p.argmax(-1) == q.argmax(-1))


class _Watch:
    """Hooks on one layer: what its MoE block gets from the router and what it makes."""

    def __init__(self, layer: SweptLayer) -> None:
        self._parts, self._rows = layer.parts, layer.shape.rows if layer.shape else 0
        self._hooks = ExitStack()
        self._latest: dict[str, Tensor] = {}

    def __enter__(self) -> _Watch:
        if self._parts is not None:
            self._on(self._parts.experts.register_forward_pre_hook(self._see_experts, with_kwargs=True))
            self._on(self._parts.router.register_forward_hook(self._see_router))
            self._on(self._parts.block.register_forward_hook(self._see_block))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._latest.clear()

    def _on(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _see_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, self._latest["index_Tk"], self._latest["weight_Tk"] = [*args, *kwargs.values()]

    def _see_router(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Logits come first or last: they stand at the end opposite the integers."""
        values = out if isinstance(out, tuple) else (out,)
        logits = values[0] if values[0].is_floating_point() else values[-1]
        if logits.shape[-1] == self._rows:
            self._latest["logits_TE"] = logits.float()

    def _see_block(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._latest["block_TD"] = out[0] if isinstance(out, tuple) else out

    def seen(self, output: Tensor, rows: Tensor) -> Pass:
        """The pass that has just run, at these rows."""
        seen = {"output_TD": output, **self._latest}
        self._latest = {}
        return Pass(**{name: value.reshape(-1, value.shape[-1])[rows] for name, value in seen.items()})
