"""Make good what compression lost, by a matrix of low rank beside each weight: what all methods of the kind share.

    dW = W - W_hat,   W_hat x  ->  W_hat x + B A x,   B A of rank r, least in sum over inputs of ||(dW - B A) x||^2

(`ops.correction`). Methods differ in what they know of the inputs x. W is that of `source`, which may be any earlier
checkpoint of the same shapes (`use: {source: ID}`: after pruning, the pruned one); W_hat that of the compressed model:
quantized, with weights or channels set to zero, or anything else that keeps names and shapes. Inputs are those of the
compressed model, with all layers before corrected already; within a layer all weights are corrected at once.

What is written (`form`):

* `adapter`: B and A beside the packed weights. Later stages of the run see the corrected weights; the exported folder
  holds the packed model as it was and, in `adapter/`, the factors as PEFT files, counted in its bytes. PEFT applies
  those of attention, shared experts and dense layers to the model as transformers loads it. Those of routed experts
  have a module each only in programs that keep experts apart; transformers fuses them.
* `merged`: W_hat + B A as ordinary dense weights, for research: all weights are dense then, those that are not
  corrected too, and the model is as large as before it was quantized.

Experts with few tokens lean on the inputs of all experts of the layer (`ops.correction.pooled`); how many do is in the
report, as are relative errors sqrt(sum ||(W - W') x||^2 / sum ||W x||^2) before and after, on the calibration inputs
with the method's own weighting, from the values as they are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import Artifact, CalibrationText, Checkpoint, LayerStats, Packed, PartWriter
from moecli.core.context import Context
from moecli.core.errors import MoecliError, Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.core.stage import Options, RunSetting
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of
from moecli.engine.linears import InputGrams
from moecli.engine.sweep import SweptLayer, sweep
from moecli.families import Linear, family_of, linears_of
from moecli.io.formats import (
    DenseView,
    corrected_weights,
    factor_names,
    format_of,
    packed_names,
    packed_weights,
    parts_of,
    schemes_of,
    unpacked_spec,
)
from moecli.ops.correction import corrected, correction, output_energy, pooled, sound_moments
from moecli.ops.pack import dequantize, pack_rows, rounded_again, unpack_rows

ROLES: Mapping[str, str] = {"expert": "experts", "shared": "shared", "attention": "attention", "dense": "attention"}
"""Role of a weight -> the word of `scope`."""
SLAB_BYTES = 2 << 30
"""float64 matrices of experts held at a time."""


class Compensate(Options):
    """Options of a method that corrects what compression lost."""

    rank: PositiveInt = 16
    """r. Two factors of rank 16 beside an expert's matrix of 768 x 2048 are 2.9 % of its weights."""
    scope: Annotated[tuple[Literal["experts", "shared", "attention"], ...], Field(min_length=1, strict=False)] = (
        "experts",
    )
    """Weights that are corrected; `attention` takes dense layers along."""
    form: Literal["adapter", "merged"] = "adapter"
    """`adapter` keeps the factors beside the packed weights; `merged` adds them up and writes dense weights."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        widths = {"model width": model.hidden, "expert width": model.expert_width}
        name, least = min(widths.items(), key=lambda item: item[1])
        if self.rank >= least:
            message = f"a correction of rank {self.rank} is no smaller than the weight: the {name} is {least}"
            yield Problem("rank", message, hint=f"write `rank: {max(1, least // 16)}`")
        if "shared" in self.scope and not model.shared_width:
            yield Problem("scope", "the model has no shared experts", hint="leave `shared` out")
        if self.form == "adapter" and model.quantized is None:
            yield Problem(
                "form", "no weights are packed that an adapter could lie beside",
                hint="write `form: merged`, or put this stage below a `quantize/...` stage",
            )  # fmt: skip

    def forecast(self, model: ModelSketch) -> ModelSketch:
        if not model.specs:
            return model
        if corrected_weights(model.specs):
            raise MoecliError("the model is corrected already", hint="leave one of the two `compensate/...` stages out")
        specs, schemes = dict(model.specs), schemes_of(model.config)
        packed = packed_weights(specs)
        # What a weight is called decides its role; its shape is known once its packed form is read.
        names = {**specs, **{name: specs[parts_of(name, specs)[0]] for name in packed}}
        linears = {linear.name: linear for linear in linears_of(model.config, names)}
        dense = {name: unpacked_spec(name, specs, schemes, linears[name].transposed) for name in packed}
        dense |= {n: replace(dense[n], dtype=model.facts.dtype) for n in packed if format_of(n, specs) == "mxfp4"}
        if self.form == "merged":
            for name in packed:
                for part in parts_of(name, model.specs):
                    del specs[part]
            config = {key: value for key, value in model.config.items() if key != "quantization_config"}
            facts = replace(model.facts, quantized=None)
            return replace(model, specs=specs | dense, config=config, facts=facts)
        for linear in self.chosen(linears.values(), packed):
            specs |= self.factor_specs(linear, dense[linear.name])
        return replace(model, specs=specs)

    def chosen(self, linears: Iterable[Linear], packed: set[str]) -> list[Linear]:
        """The weights that are corrected; beside weights that are not packed there is no adapter."""
        return [
            linear for linear in linears
            if ROLES.get(linear.role) in self.scope and (self.form == "merged" or linear.name in packed)
        ]  # fmt: skip

    def factor_specs(self, linear: Linear, dense: TensorSpec) -> dict[str, TensorSpec]:
        """What an adapter adds on disk. MoecliError for experts in one tensor."""
        if len(dense.shape) == 3:
            raise MoecliError(
                f"there is no adapter for experts that one tensor holds (`{linear.name}`)", hint="write `form: merged`"
            )
        rows, columns = dense.shape
        rank = min(self.rank, rows, columns)
        a, b = factor_names(linear.name)
        return {a: TensorSpec(dense.dtype, (rank, columns)), b: TensorSpec(dense.dtype, (rows, rank))}


class Inputs(NamedTuple):
    """What a method knows of inputs."""

    of_experts: Mapping[str, str]
    """Statistic that is collected of what goes into gate and up (`x`) and down (`h`): a sum over tokens."""
    expert_moment: Callable[[Tensor], Tensor]
    """Its mean [E, ...] -> G of each expert, [E, C, C] or [E, C]"""
    of_others: type[InputGrams]
    other_moment: Callable[[InputGrams, str], Tensor]
    """(what was collected, linear) -> G with a leading 1"""


def compensate(
    opt: Compensate, inputs: Inputs, text: CalibrationText, model: Checkpoint, source: Checkpoint, ctx: Context,
    *, renew: bool = False,
) -> Checkpoint:  # fmt: skip
    """The model with its weights corrected. With `renew` the compressed weights are rounded again, in their grid and
    with their zeros, after the correction is found: to what is nearest to W - B A.

    StageFailed when the two do not have the same experts and shapes, or weights are not finite.
    """
    before, dense = DenseView(source), DenseView(model)
    specs = {name: dense.spec(name) for name in dense.names()}
    packed = packed_weights(model.names())
    linears = linears_of(dense.config, specs)
    chosen = opt.chosen(linears, packed)
    _refuse_others(before, dense, chosen)
    _refuse_other_forms(model, chosen, packed, renew)
    merged = opt.form == "merged"
    if not merged:
        for linear in chosen:
            opt.factor_specs(linear, specs[linear.name])
    held = list(inputs.of_experts.values())
    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=held)
    found: dict[int, Found] = {}
    with ctx.writer(model, config=dense.config if merged else None) as out:
        for layer in swept:
            name = f"layer-{layer.index:03d}"
            mine = [linear for linear in chosen if linear.layer == layer.index]
            work = _Layer(opt, inputs, layer, mine, model, before, renew)

            def write(part: PartWriter, work: _Layer = work, name: str = name) -> None:
                work.correct()
                work.put(part, [x for x in linears if x.layer == work.index and x.name in packed])
                ctx.part(f"found-{name}", Found, lambda: work.found)

            finished = out.has_part(name)
            out.part(name, write)
            if finished:
                work.take(out.read_part(name))
            layer.rewrite(work.dense)
            found[layer.index] = ctx.part(f"found-{name}", Found, lambda work=work: work.found)
    for line in swept.report():
        ctx.note(line)
    _report(opt, found, ctx)
    return out.checkpoint


class Found(Artifact):
    """Of one layer: how inputs were come by, and energies of outputs by word of `scope`."""

    def __init__(self, classes: Mapping[str, int], energy: Mapping[str, Sequence[float]], factor_bytes: int) -> None:
        self.classes = dict(classes)
        """Matrices by class, see `ops.correction.pooled`."""
        self.energy = {name: list(values) for name, values in energy.items()}
        """Sums over inputs of ||W x||^2, ||(W - W_hat) x||^2, and the latter after the correction."""
        self.factor_bytes = factor_bytes

    def pack(self) -> Packed:
        return Packed({}, {"classes": self.classes, "energy": self.energy, "factor_bytes": self.factor_bytes})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(**packed.meta)


def _report(opt: Compensate, found: Mapping[int, Found], ctx: Context) -> None:
    total = sum((Counter(layer.classes) for layer in found.values()), Counter())
    ctx.record("classes", {str(index): layer.classes for index, layer in found.items()})
    errors = {
        str(index): {
            name: {"before": (lost / whole) ** 0.5, "after": (left / whole) ** 0.5}
            for name, (whole, lost, left) in layer.energy.items() if whole > 0
        }
        for index, layer in found.items()
    }  # fmt: skip
    ctx.record("output_error", errors)
    for word in opt.scope:
        pairs = [layer[word] for layer in errors.values() if word in layer]
        if pairs:
            before, after = (sum(pair[key] for pair in pairs) / len(pairs) for key in ("before", "after"))
            ctx.note(
                f"{word}: relative error of outputs {before:.2%} before and {after:.2%} after a correction of rank "
                f"{opt.rank} (mean of {len(pairs)} layers, calibration inputs as this method weighs them)"
            )
            if before == 0:
                ctx.note(f"{word}: the model has the weights of `source`, so there was nothing to correct")
    unusual = {name: count for name, count in total.items() if name != "own"}
    if unusual:
        words = ", ".join(f"{count} {name}" for name, count in sorted(unusual.items()))
        ctx.note(f"of {total.total()} matrices {total['own']} were corrected on their own tokens alone; {words}")
    if opt.form == "adapter":
        size = sum(layer.factor_bytes for layer in found.values())
        ctx.record("adapter_bytes", size)
        ctx.note(
            f"the factors take {size} bytes; stages below see the corrected weights, the folder `model` holds the "
            "packed ones and the factors in `adapter`"
        )
        if "experts" in opt.scope:
            ctx.note(
                "PEFT can add the factors of routed experts only where experts are modules of their own, which they "
                "are not in transformers"
            )
    else:
        ctx.note("`form: merged` writes all weights dense: the model is as large as before it was quantized")


def _refuse_others(before: DenseView, after: DenseView, chosen: Sequence[Linear]) -> None:
    """StageFailed unless the weights of both stand for the same things."""
    hint = "`use: {source: ID}` with the `id` of the stage whose experts were compressed"
    old, new = family_of(before.config), family_of(after.config)
    if old.model_type != new.model_type:
        raise StageFailed(f"the model is a `{new.model_type}`, its source a `{old.model_type}`", hint=hint)
    for layer in new.facts.moe_layers:
        there, here = old.experts_in(layer), new.experts_in(layer)
        if there != here:
            message = f"the source has {there} experts, the compressed model {here}"
            raise StageFailed(message, where=f"layer {layer}", hint=hint)
    for linear in chosen:
        name = linear.name
        if name not in before:
            raise StageFailed(f"the source has no `{name}`", where=f"layer {linear.layer}", hint=hint)
        there, here = list(before.spec(name).shape), list(after.spec(name).shape)
        if there != here:
            message = f"`{name}` is {there} in the source and {here} in the compressed model"
            raise StageFailed(message, where=f"layer {linear.layer}", hint=hint)


def _refuse_other_forms(model: Checkpoint, chosen: Sequence[Linear], packed: set[str], renew: bool) -> None:
    """StageFailed where weights are stored in a form that cannot be corrected like this."""
    specs = {name: model.spec(name) for name in model.names()}
    for linear in chosen:
        if linear.name not in packed and linear.name not in specs:
            raise StageFailed(
                f"`{linear.name}` is stored as factors, which are not corrected", where=f"layer {linear.layer}",
                hint="quantize the model first, or leave this stage out",
            )  # fmt: skip
        if renew and linear.name in packed and format_of(linear.name, specs) != "int":
            raise StageFailed(
                f"`{linear.name}` is packed as small floats; only integers are rounded again",
                where=f"layer {linear.layer}", hint="write `renew: false`",
            )  # fmt: skip


class _Stack(NamedTuple):
    """Matrices that are corrected together: one, or those of all experts."""

    names: Sequence[str]
    """On-disk name of each matrix, or of the one tensor that holds all of them."""
    linear: Linear
    """The first of them."""
    into: str
    """What goes in: `x` and `h` for experts, the linear that shares its input for others."""


class _New(NamedTuple):
    """What one matrix becomes."""

    weight_RC: Tensor
    """compressed and corrected"""
    b_Rr: Tensor
    a_rC: Tensor
    words_RW: Tensor | None
    """the packed words, where they are rounded again"""


class _Layer:
    """One layer: what its weights lost, and what they become."""

    def __init__(
        self, opt: Compensate, inputs: Inputs, layer: SweptLayer, linears: Sequence[Linear], model: Checkpoint,
        source: DenseView, renew: bool,
    ) -> None:  # fmt: skip
        self.index = layer.index
        self._opt, self._inputs, self._layer, self._model = opt, inputs, layer, model
        self._source, self._renew = source, renew
        self._others = [linear for linear in linears if linear.role != "expert"]
        self._experts = _stacks([linear for linear in linears if linear.role == "expert"], source, layer.index)
        self.dense: dict[str, Tensor] = {}
        """New values by on-disk name, corrected."""
        self._written: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._energy: dict[str, list[float]] = {}
        self._factor_bytes = 0

    @property
    def found(self) -> Found:
        return Found(self._counts, self._energy, self._factor_bytes)

    def correct(self) -> None:
        grams, stats = self._observed()
        for leader, names in grams.sharing().items():
            moment, [sound] = sound_moments(self._inputs.other_moment(grams, leader))
            for linear in self._others:
                if linear.name in names:
                    self._solve(_Stack([linear.name], linear, leader), moment, ["own" if sound else "plain"])
        for linear in self._others:
            if linear.name not in self.dense:
                raise StageFailed(
                    f"nothing went into `{linear.name}`", where=f"layer {self.index}",
                    hint="leave its part of the model out of `scope`",
                )  # fmt: skip
        if not self._experts:
            return
        moments = {}
        for into, statistic in self._inputs.of_experts.items():
            mean, classes = pooled(stats[statistic], stats.count_E)
            moments[into] = self._inputs.expert_moment(mean), classes
        for stack in self._experts:
            self._solve(stack, *moments[stack.into])

    def _observed(self) -> tuple[InputGrams, LayerStats | None]:
        """One pass over the layer as it is."""
        grams = self._inputs.of_others(self._layer, {x.name: self._layer.linear(x.name) for x in self._others})
        with grams.watching():
            if self._experts:
                wanted = collectors(self._inputs.of_experts.values())
                return grams, self._layer.observe([grams, *wanted], on_device=True)
            grams.start(None, torch.device("cpu"))
            if self._others:
                self._layer.watch(lambda: grams.start(None, torch.device("cpu")))
            return grams, None

    def _solve(self, stack: _Stack, moment_E: Tensor, classes: Sequence[str]) -> None:
        """Correct a stack, so many matrices at a time that SLAB_BYTES are not exceeded."""
        rows, columns = self._source.spec(stack.linear.name).shape[-2:]
        step = max(1, SLAB_BYTES // (8 * (6 * rows * columns + 3 * max(rows, columns) ** 2)))
        starts = range(0, len(moment_E), step)
        pieces = [self._solve_some(stack, slice(i, i + step), moment_E[i : i + step]) for i in starts]
        self._counts.update(classes)
        self._keep(stack, [one for piece in pieces for one in piece])

    def _solve_some(self, stack: _Stack, some: slice, moment_E: Tensor) -> Iterator[_New]:
        compressed_ERC, wanted_ERC = (self._values(stack, some, read) for read in (self._layer.tensor, self._read))
        dtype = torch.float64 if self._opt.form == "merged" else compressed_ERC.dtype
        lost_ERC = wanted_ERC.double() - compressed_ERC.double()
        if not bool(torch.isfinite(lost_ERC).all()):
            raise StageFailed(f"`{stack.linear.name}` or its like has values that are not finite",
                              where=f"layer {self.index}", hint="`moecli verify MODEL` checks the weights")  # fmt: skip
        found = correction(lost_ERC, moment_E, self._opt.rank)
        b_ERr, a_ErC = found.b_ERr.to(dtype), found.a_ErC.to(dtype)
        words: Sequence[Tensor | None] = [None] * len(b_ERr)
        if self._renew:
            rest_ERC = wanted_ERC.double() - b_ERr.double() @ a_ErC.double()
            compressed_ERC, words = self._renewed(stack, some, compressed_ERC, rest_ERC)
        fresh_ERC = corrected(compressed_ERC, b_ERr, a_ErC)
        left_ERC = wanted_ERC.double() - fresh_ERC.double()
        energy = self._energy.setdefault(ROLES[stack.linear.role], [0.0, 0.0, 0.0])
        for i, weight_ERC in enumerate((wanted_ERC, lost_ERC, left_ERC)):
            energy[i] += float(output_energy(weight_ERC, moment_E).sum())
        return map(_New, fresh_ERC, b_ERr, a_ErC, words)

    def _renewed(
        self, stack: _Stack, some: slice, compressed_ERC: Tensor, rest_ERC: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The compressed weights nearest to `rest_ERC` with the same scales and zeros, and their words if packed."""
        if packed_names(stack.names[0]).packed not in self._model:
            return torch.where(compressed_ERC == 0, 0, rest_ERC).to(compressed_ERC.dtype), [None] * len(rest_ERC)
        view = DenseView(self._model)
        names = stack.names if len(stack.names) == 1 else stack.names[some]
        bits = [view.bits(name) for name in names] * (len(rest_ERC) // len(names))
        scale_ERG = self._values(stack, some, lambda name: self._stored(packed_names(name).scale), packed=True)
        fresh_ERC, words = torch.empty_like(compressed_ERC), [None] * len(bits)
        for width in sorted(set(bits)):  # experts may have bits of their own
            at = [i for i, mine in enumerate(bits) if mine == width]
            codes = rounded_again(rest_ERC[at], scale_ERG[at], width).masked_fill(compressed_ERC[at] == 0, 0)
            fresh_ERC[at] = dequantize(codes, scale_ERG[at]).to(fresh_ERC)
            for i, packed in zip(at, pack_rows(codes, width), strict=True):
                words[i] = packed
        return fresh_ERC, words

    @property
    def _layer_device(self) -> torch.device:
        return next(self._layer.module.parameters()).device

    def _read(self, name: str) -> Tensor:
        return self._source.get(name, self._layer_device)

    def _stored(self, name: str) -> Tensor:
        return self._model.get(name, self._layer_device)

    def _values(self, stack: _Stack, some: slice, read: Callable[[str], Tensor], packed: bool = False) -> Tensor:
        """[E, R, C] on the device; what is `packed` has its inputs last in any case."""
        if len(stack.names) == 1:
            value = read(stack.names[0])
            if value.dim() == 2:
                return value[None]
            return (value.mT if stack.linear.transposed and not packed else value)[some]
        return torch.stack([read(name) for name in stack.names[some]])

    def _keep(self, stack: _Stack, each: Sequence[_New]) -> None:
        """Remember what becomes of a stack, for this run (`dense`) and for the disk."""
        if len(self._source.spec(stack.linear.name).shape) == 3:
            fresh = torch.stack([new.weight_RC for new in each])
            value = fresh.mT if stack.linear.transposed else fresh
            self.dense[stack.names[0]] = self._written[stack.names[0]] = value
            return
        for name, new in zip(stack.names, each, strict=True):
            self.dense[name] = new.weight_RC
            if self._opt.form == "merged":
                self._written[name] = new.weight_RC
                continue
            names = factor_names(name)
            self._written |= {names.a: new.a_rC, names.b: new.b_Rr}
            self._factor_bytes += new.a_rC.nbytes + new.b_Rr.nbytes
            if new.words_RW is not None:
                self._written[packed_names(name).packed] = new.words_RW

    def put(self, part: PartWriter, packed: Sequence[Linear]) -> None:
        """Write the layer; `packed` are all weights of it that are packed."""
        if self._opt.form == "merged":
            specs = {name: self._model.spec(name) for name in self._model.names()}
            for linear in packed:
                for name in parts_of(linear.name, specs):
                    if name != linear.name:
                        part.drop(name, "written dense, with its correction")
                if linear.name not in self._written:
                    part.put(linear.name, self._layer.tensor(linear.name))
        for name, value in self._written.items():
            part.put(name, value)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The new values from what an earlier run has written."""
        names = [x.name for x in self._others] + [name for stack in self._experts for name in stack.names]
        for name in names:
            if name in tensors:
                self.dense[name] = tensors[name]
                continue
            factors, packed = factor_names(name), packed_names(name)
            base = self._layer.tensor(name)
            if packed.packed in tensors:
                bits = DenseView(self._model).bits(name)
                codes = unpack_rows(tensors[packed.packed], bits, base.shape[-1])
                base = dequantize(codes, self._model.get(packed.scale)).to(base)
            self.dense[name] = corrected(base, tensors[factors.b].to(base.device), tensors[factors.a].to(base.device))


def _stacks(linears: Sequence[Linear], model: Checkpoint, layer: int) -> list[_Stack]:
    """Stacks of a layer's experts, with what goes into them."""
    if not linears:
        return []
    family = family_of(model.config)
    by_name = {linear.name: linear for linear in linears}
    form = family.layout(by_name, layer)
    if len(model.spec(linears[0].name).shape) == 3:
        gate_up, down = form.names_of(0)[:2]
        return [_Stack([gate_up], by_name[gate_up], "x"), _Stack([down], by_name[down], "h")]
    of_experts = [form.names_of(e) for e in range(family.experts_in(layer))]
    gate, up, down = ([names[i] for names in of_experts] for i in range(3))
    return [_Stack(n, by_name[n[0]], into) for n, into in ((gate, "x"), (up, "x"), (down, "h"))]
