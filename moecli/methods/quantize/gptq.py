"""Round weights so that each layer's outputs change least, column by column, all experts of a layer at once (GPTQ).

H = mean of x x^T over the inputs of a matrix; what rounding a column loses is made good by the columns behind it.
Scales and layout are those of `quantize/rtn`: max|w| / ((2^bits - 1) / 2) per group, of the weights as they were
(static groups), columns in the order of falling diagonal of H (`act_order`), which needs no `g_idx`. Layers are
quantized in order and each sees what the quantized ones before it make; all matrices of one layer are calibrated on its
unquantized form, or with `true_sequential` attention first, then gate and up, then down.

Which inputs an expert is calibrated on (`hessian`): `routed` its own tokens, `affinity` its own tokens weighted by the
router's weight (MoEQuant, arXiv 2505.03804), `all` every token of the layer for gate and up. An expert with few tokens
is never zeroed and never silently rounded. With n tokens, C inputs, m = C / 4, per matrix:

    own     n >= max(m, 256)       its own H
    mixed   32 <= n                n / (n + m) of its own H and m / (n + m) of the layer's mean H
    pooled  n < 32                 the layer's mean H
    rtn     H is not finite, or has no Cholesky factor at 100 times the damping: rounded to nearest

For down projections the layer's mean is over the inputs of all experts' down projections. Counts of each class are in
the report, as `classes` by layer.

With an `allocate/...` stage above, each routed expert has the bits that it decided; experts of a layer that have as
many are rounded together.

`asymmetric: 0.25` is GPTAQ: what quantized layers before a matrix have done to its inputs is made good too, towards
what the unquantized model gives it for the same token (`ops.gptq`). Experts see the tokens that the quantized layers
send them, and x~ is what the unquantized model has there, for down through the same unquantized expert. The ladder's
shares hold for D as they do for H. The unquantized model runs beside, layer by layer: twice the hidden states, and each
pass of a layer runs both. On CUDA rounding then runs without its kernel, and sums of D expert by expert.

Source: arXiv 2210.17323; GPTAQ is arXiv 2504.02692, whose code has 0.25. The ladder for experts with few tokens is
ours. Columns whose input was always zero are rounded, where published code sets them to zero.

- run: quantize/gptq
  with: {bits: 4, group_size: 128}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import Artifact, BitPlan, CalibrationText, Checkpoint, LayerStats, Packed, PartWriter
from moecli.core.context import Context
from moecli.core.errors import StageFailed
from moecli.core.stage import RunSetting, stage
from moecli.engine.beside import Beside, HDrift, InputDrifts, XDrift, XDriftPool
from moecli.engine.collectors import Collector, collectors
from moecli.engine.data import batches_of
from moecli.engine.linears import InputGrams
from moecli.engine.memory import free_bytes
from moecli.engine.sweep import Sweep, SweptLayer, sweep
from moecli.families import Linear, family_of
from moecli.io.formats import packed_names, put_packed_stack, put_words
from moecli.methods.quantize import Packing, Quantize
from moecli.ops.gptq import DAMPS, factor, pull, solve
from moecli.ops.ladder import ladder
from moecli.ops.pack import dequantize, group_scale, pack_rows, unpack_rows

SLAB_BYTES = 8 << 30
"""Held for the experts that are solved together, at most: weights in fp32, damped Hessians and their factors."""


class Gptq(Quantize):
    """Options of `quantize/gptq`."""

    hessian: Literal["routed", "affinity", "all"] = "routed"
    """Inputs that routed experts are calibrated on."""
    act_order: bool = True
    """Round columns by falling diagonal of H, in place of their own order."""
    damp: Annotated[float, Field(gt=0)] = 0.01
    """Share of H's mean diagonal that is added to its diagonal."""
    shrink: bool = False
    """Search each scale among 80 smaller ones for the least |error|^2.4, in place of the largest weight's."""
    asymmetric: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the drift of inputs that columns make good (GPTAQ's alpha); 0 leaves it out."""
    true_sequential: bool = False
    """Calibrate each part of a layer behind the quantized parts before it; takes two more passes a layer."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""


@stage("quantize/gptq", version=1)
def gptq(opt: Gptq, text: CalibrationText, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> Checkpoint:
    packing = Packing(opt, model.config, {name: model.spec(name) for name in model.names()}, plan and plan.pairs())
    classes: dict[str, dict[str, int]] = {}
    held = [*_grams(opt, "in"), *_grams(opt, "out")]
    batches, sweeps = batches_of(text, opt.batch_size), 2 if opt.asymmetric else 1
    swept = sweep(model, batches, device=ctx.device, track=ctx.track, sweeps=sweeps, statistics=held)
    whole = sweep(model, batches, device=ctx.device, plan=swept.plan) if opt.asymmetric else None
    with ctx.writer(model, config=packing.config()) as out:
        for layer, other in _side_by_side(swept, whole):
            name = f"layer-{layer.index:03d}"
            work = _Layer(opt, layer, packing, model, other)

            def write(part: PartWriter, work: _Layer = work, name: str = name) -> None:
                work.quantize(part)
                ctx.part(f"classes-{name}", Classes, lambda: work.classes)

            finished = out.has_part(name)
            out.part(name, write)
            if finished:
                work.take(out.read_part(name))
            layer.rewrite(work.dense)
            work.dense.clear()
            classes[str(layer.index)] = dict(
                ctx.part(f"classes-{name}", Classes, lambda work=work: work.classes).counts
            )
    for line in swept.report():
        ctx.note(line)
    _report(classes, ctx)
    packing.report(ctx)
    return out.checkpoint


def _side_by_side(swept: Sweep, whole: Sweep | None) -> Iterator[tuple[SweptLayer, SweptLayer | None]]:
    """Layers of the model that is quantized, each with that of the unquantized one where it runs beside."""
    if whole is None:
        yield from ((layer, None) for layer in swept)
    else:
        yield from zip(swept, whole, strict=True)


def _report(classes: Mapping[str, Mapping[str, int]], ctx: Context) -> None:
    ctx.record("classes", classes)
    total = sum((Counter(counts) for counts in classes.values()), Counter())
    unusual = {name: count for name, count in total.items() if name != "own"}
    if unusual:
        words = ", ".join(f"{count} {name}" for name, count in sorted(unusual.items()))
        ctx.note(f"of {total.total()} matrices {total['own']} were calibrated on their own tokens alone; {words}")


class Classes(Artifact):
    """How many matrices of a layer were calibrated how."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)

    def pack(self) -> Packed:
        return Packed({}, {"counts": self.counts})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(packed.meta["counts"])


class Stack(NamedTuple):
    """Matrices that are quantized together: one, or those of all experts."""

    names: Sequence[str]
    """On-disk name of each matrix, or of the one tensor that holds all of them."""
    linear: Linear
    """The first of them."""


class Hessians(NamedTuple):
    """H of each matrix of some stacks, one for all of them where it is the same."""

    value_ECC: Tensor
    classes: Sequence[str]
    drift_ECC: Tensor | None = None
    """D of the same scale, for GPTAQ"""


class _Layer:
    """One layer: its stacks, their Hessians, and what they become."""

    def __init__(
        self, opt: Gptq, layer: SweptLayer, packing: Packing, model: Checkpoint, other: SweptLayer | None = None
    ) -> None:
        self._opt, self._layer, self._model, self._bits, self._other = opt, layer, model, packing.bits, other
        linears = [linear for linear in packing.targets if linear.layer == layer.index]
        self._specs = {linear.name: model.spec(linear.name) for linear in linears}
        self._others = [linear for linear in linears if linear.role != "expert"]
        self._experts = _stacks([linear for linear in linears if linear.role == "expert"], model, layer.index)
        self.dense: dict[str, Tensor] = {}
        """New values by on-disk name."""
        self._counts: Counter[str] = Counter()

    @property
    def classes(self) -> Classes:
        return Classes(self._counts)

    def quantize(self, part: PartWriter) -> None:
        for others, projections in self._phases():
            grams, drifts, stats = self._observed(others, projections)
            for leader, names in grams.sharing().items():
                stacks = [Stack([x.name], x) for x in others if x.name in names]
                drift_ECC = None if drifts is None else drifts.matrix(leader)[None]
                self._solve(part, stacks, Hessians(grams.matrix(leader)[None], ["own"], drift_ECC))
            for linear in others:
                if not any(linear.name in names for names in grams.sharing().values()):
                    raise StageFailed(
                        f"nothing went into `{linear.name}`", where=f"layer {self._layer.index}",
                        hint="quantize with `quantize/rtn`",
                    )  # fmt: skip
            for projection in projections:
                self._solve(part, self._experts[projection], self._hessians(projection, stats))
            if self._opt.true_sequential:
                self._layer.rewrite(self.dense)

    def _phases(self) -> list[tuple[list[Linear], list[str]]]:
        """Linears and projections of experts that are calibrated in one pass."""
        projections = [p for p in ("in", "out") if self._experts.get(p)]
        if not self._opt.true_sequential:
            return [(self._others, projections)]
        attention = [x for x in self._others if x.role == "attention"]
        rest = [x for x in self._others if x.role != "attention"]
        return [(attention, []), (rest, projections[:1]), ([], projections[1:])]

    def _observed(
        self, others: Sequence[Linear], projections: Sequence[str]
    ) -> tuple[InputGrams, InputDrifts | None, LayerStats | None]:
        """One pass over the layer for the matrices of a phase."""
        modules = {x.name: self._layer.linear(x.name) for x in others}
        inputs, wanted, drifts = [InputGrams(self._layer, modules)], [], None
        for projection in projections:
            wanted += _grams(self._opt, projection)
        with ExitStack() as hooks:
            routed = collectors(wanted)
            if self._other is not None:
                beside = Beside(self._layer, self._other, modules)
                hooks.enter_context(beside.watching())
                drifts = InputDrifts(self._layer, modules, beside)
                inputs.append(drifts)
                routed += _drifts(self._opt, projections, beside)
            for each in inputs:
                hooks.enter_context(each.watching())
            if projections:
                return inputs[0], drifts, self._layer.observe([*inputs, *routed], on_device=True)
            self._layer.watch(lambda: [each.start(None, None) for each in inputs])
            return inputs[0], drifts, None

    def _hessians(self, projection: str, stats: LayerStats) -> Hessians:
        """H of every expert for its inputs (`in`: gate and up) or what is inside (`out`: down), by the ladder."""
        drifting = self._other is not None
        if projection == "in" and self._opt.hessian == "all":
            drift_ECC = stats["x_drift_pool"] / stats.tokens if drifting else None
            return Hessians(stats["x_cov_pool"] / stats.tokens, ["own"], drift_ECC)
        total_ECC = stats[_grams(self._opt, projection)[-1]]
        device = total_ECC.device
        count_E = stats.count_E.to(device)
        weight_E = stats.gate_sum_E.to(device).float() if self._opt.hessian == "affinity" else count_E.float()

        def mixed(total_ECC: Tensor, pool: str) -> Hessians:
            if projection == "in":
                pool_CC = stats[pool][0] / stats.tokens
            else:
                pool_CC = total_ECC.sum(0) / weight_E.sum().clamp(min=1e-30)
            return Hessians(*ladder(total_ECC, weight_E, count_E, pool_CC))

        found = mixed(total_ECC, "x_cov_pool")
        if not drifting:
            return found
        drift_ECC = stats["x_drift" if projection == "in" else "h_drift"]
        return found._replace(drift_ECC=mixed(drift_ECC, "x_drift_pool").value_ECC)

    def _solve(self, part: PartWriter, stacks: Sequence[Stack], hessians: Hessians) -> None:
        """Codes of stacks that share their Hessians: matrices with as many bits together, so many at a time that
        SLAB_BYTES are not exceeded, nor half of the memory that is free."""
        weights = [self._weights(stack) for stack in stacks]
        count, _, columns = weights[0].shape
        rows = max(weight.shape[1] for weight in weights)
        shared = len(hessians.value_ECC) == 1
        # A half more than damped Hessian and factor, and than weights in two orders, for what is taken in between.
        room = min(SLAB_BYTES, free_bytes(hessians.value_ECC.device) // 2)
        square = 10 if hessians.drift_ECC is None else 22
        step = max(1, room // (square * columns * columns * (not shared) + 12 * rows * columns))
        classes = [*hessians.classes] * (count if shared else 1)
        found = pull_ECC = None
        for bits, members in self._alike(stacks[0], count).items():
            coded: list[list[tuple[Tensor, Tensor]]] = [[] for _ in stacks]
            for some in (members[start : start + step] for start in range(0, len(members), step)):
                if found is None or not shared:
                    some_ECC = hessians.value_ECC if shared else _of(hessians.value_ECC, some)
                    found = factor(some_ECC, self._opt.damp, self._opt.act_order)
                    if hessians.drift_ECC is not None:
                        drift_ECC = hessians.drift_ECC if shared else _of(hessians.drift_ECC, some)
                        pull_ECC = pull(drift_ECC, found, self._opt.asymmetric)
                    failed = (found.tries_E == len(DAMPS)).tolist() * (count if shared else 1)
                    for bad, expert in zip(failed, range(count) if shared else some, strict=True):
                        classes[expert] = "rtn" if bad else classes[expert]
                for weight_ERC, pieces in zip(weights, coded, strict=True):
                    some_ERC = _of(weight_ERC, some)
                    scale_ERG = group_scale(some_ERC, bits, self._opt.group_size, self._opt.shrink)
                    use = found if len(found.order_EC) == len(some) else found.expanded(len(some))
                    pulled = None if pull_ECC is None else pull_ECC.expand(len(some), -1, -1)
                    pieces.append((solve(some_ERC, scale_ERG, use, bits, pulled).codes_ERC, scale_ERG))
            for stack, pieces in zip(stacks, coded, strict=True):
                codes_ERC, scale_ERG = (torch.cat(some) for some in zip(*pieces, strict=True))
                self._put(part, stack, members, codes_ERC, scale_ERG)
        self._counts.update(classes * len(stacks))

    def _alike(self, stack: Stack, count: int) -> dict[int, Sequence[int]]:
        """{bits: the matrices of a stack that get as many}; stacks that share their Hessians agree."""
        if len(stack.names) == 1:
            return {self._bits[stack.names[0]]: range(count)}
        found: dict[int, list[int]] = {}
        for index, name in enumerate(stack.names):
            found.setdefault(self._bits[name], []).append(index)
        return {bits: range(count) if len(some) == count else some for bits, some in found.items()}

    def _weights(self, stack: Stack) -> Tensor:
        """[E, R, C] on the device"""
        found = [self._layer.tensor(name) for name in stack.names]
        if found[0].dim() == 3:
            return found[0].mT if stack.linear.transposed else found[0]
        return torch.stack(found)

    def _put(
        self, part: PartWriter, stack: Stack, members: Sequence[int], codes_ERC: Tensor, scale_ERG: Tensor
    ) -> None:
        """Write these members of a stack, all of them where it is one tensor."""
        bits, transposed = self._bits[stack.names[members[0] if len(stack.names) > 1 else 0]], stack.linear.transposed
        words_ERW = pack_rows(codes_ERC, bits)
        dense_ERC = dequantize(codes_ERC, scale_ERG)
        if len(self._specs[stack.linear.name].shape) == 3:
            shape = self._specs[stack.linear.name].shape
            put_packed_stack(part, stack.names[0], words_ERW, scale_ERG, shape, bits, transposed)
            self.dense[stack.names[0]] = dense_ERC.mT if transposed else dense_ERC
            return
        names = [stack.names[member] for member in members]
        for name, words, scale, dense in zip(names, words_ERW, scale_ERG, dense_ERC, strict=True):
            put_words(part, name, words, scale, codes_ERC.shape[1:], bits)
            self.dense[name] = dense

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The new values from what an earlier run has written."""
        stacks = [Stack([x.name], x) for x in self._others] + [s for some in self._experts.values() for s in some]
        for stack in stacks:
            transposed = stack.linear.transposed
            for name in stack.names:
                packed, scale, _ = packed_names(name)
                shape = self._specs[stack.linear.name].shape
                columns = shape[-2] if transposed else shape[-1]
                dense = dequantize(unpack_rows(tensors[packed], self._bits[name], columns), tensors[scale])
                self.dense[name] = dense.mT if transposed else dense


def _of(value_EXX: Tensor, members: Sequence[int]) -> Tensor:
    """These matrices: a view where they lie side by side, else a copy."""
    if isinstance(members, range):
        return value_EXX[members.start : members.stop]
    return value_EXX[torch.tensor(members, device=value_EXX.device)]


def _grams(opt: Gptq, projection: str) -> list[str]:
    """Statistics that hold the Gram matrices of these inputs, each expert's last."""
    weighted = "g" if opt.hessian == "affinity" else ""
    own = [f"{weighted}x_cov"] if opt.hessian != "all" else []
    return ["x_cov_pool", *own] if projection == "in" else [f"{weighted}h_cov"]


def _drifts(opt: Gptq, projections: Sequence[str], beside: Beside) -> list[Collector]:
    """Collectors of D for these projections of routed experts."""
    weighted, found = opt.hessian == "affinity", []
    if "in" in projections:
        found += [XDriftPool(beside), *([XDrift(beside, weighted)] if opt.hessian != "all" else [])]
    return [*found, HDrift(beside, weighted)] if "out" in projections else found


def _stacks(linears: Sequence[Linear], model: Checkpoint, layer: int) -> dict[str, list[Stack]]:
    """Stacks of a layer's experts by what they are fed: the layer's input (`in`) or what is inside (`out`)."""
    if not linears:
        return {}
    family = family_of(model.config)
    by_name = {linear.name: linear for linear in linears}
    form = family.layout(by_name, layer)
    if len(model.spec(linears[0].name).shape) == 3:
        gate_up, down = form.names_of(0)[:2]
        return {"in": [Stack([gate_up], by_name[gate_up])], "out": [Stack([down], by_name[down])]}
    of_experts = [form.names_of(e) for e in range(family.experts_in(layer))]
    gate, up, down = ([names[i] for names in of_experts] for i in range(3))
    stacks = [Stack(names, by_name[names[0]]) for names in (gate, up, down)]
    return {"in": stacks[:2], "out": stacks[2:]}
