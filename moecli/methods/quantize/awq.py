"""Round weights after scaling up the inputs that come large, where the scaling can be taken up exactly (AWQ).

Q(W diag(s)) diag(1/s): inputs with a large s lose less. What makes the inputs takes up 1/s:

* a norm, for everything that it feeds: queries, keys and values; the router, gate and up of all experts and of shared
  experts. One s for all of them; the router's columns are scaled too, so that routing stays as it is.
* the rows of an expert's up, for its down: one s for each expert. Not where the activation clamps up, nor for experts
  that one tensor holds. Values, which feed the output projection of attention, are left alone: heads share them.

Scales are powers of two (`ops.awq`), so nothing but rounding changes a bit: each layer runs once more with its scaled
weights before they are rounded, and scales that do not give the same bits (a norm whose output something else reads, or
that adds 1 to its weight) are taken back and counted in the report. s is the best of 21 candidates, none at all among
them, by the summed squared error of what the matrices make of their inputs, from Gram matrices; published code runs the
block for each candidate. Experts with few tokens lean on the others' inputs, as with `compensate/...`.

`form: packed` rounds to nearest with the scale of the largest weight, as `quantize/rtn`; layers see what quantized ones
before them make. `form: scaled` leaves that to a stage below, such as `quantize/gptq` with the same bits.

Source: arXiv 2306.00978; which inputs share a scale in a model of experts, as llm-compressor has it.

- run: quantize/awq
  with: {bits: 4, group_size: 128}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import PositiveInt
from torch import Tensor

from moecli.core.artifacts import Artifact, BitPlan, CalibrationText, Checkpoint, LayerStats, Packed, PartWriter
from moecli.core.context import Context
from moecli.core.model import ModelSketch
from moecli.core.stage import RunSetting, stage
from moecli.engine.collectors import collectors
from moecli.engine.data import batches_of
from moecli.engine.linears import EXPERTS, Feeds, InputGrams, InputSizes
from moecli.engine.sweep import SweptLayer, sweep
from moecli.families import Linear, family_of
from moecli.io.formats import packed_names, put_packed, put_packed_stack
from moecli.methods.quantize import KEPT, Packing, Quantize
from moecli.methods.scaling import ScaledLayer, Scales
from moecli.ops.awq import candidates, rounded, weight_sizes
from moecli.ops.correction import output_energy, pooled
from moecli.ops.pack import dequantize, pack_rows, quantize_rtn, unpack_rows

SLAB_BYTES = 2 << 30
"""float64 matrices of experts held at a time."""
STATISTICS = ("x_abs", "x_cov", "h_abs", "h_cov")


class Awq(Quantize):
    """Options of `quantize/awq`."""

    form: Literal["packed", "scaled"] = "packed"
    """`packed` rounds and packs; `scaled` writes the scaled weights as they are, for a `quantize/...` stage below."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def forecast(self, model: ModelSketch) -> ModelSketch:
        packed = super().forecast(model)
        return model if self.form == "scaled" else packed


@stage("quantize/awq", version=1)
def awq(opt: Awq, text: CalibrationText, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> Checkpoint:
    packing = Packing(opt, model.config, {name: model.spec(name) for name in model.names()}, plan and plan.pairs())
    found: dict[int, Found] = {}
    swept = sweep(model, batches_of(text, opt.batch_size), device=ctx.device, track=ctx.track, statistics=STATISTICS)
    with ctx.writer(model, config=packing.config() if opt.form == "packed" else None) as out:
        for layer in swept:
            name = f"layer-{layer.index:03d}"
            work = _Layer(opt, layer, packing, model)

            def write(part: PartWriter, work: _Layer = work, name: str = name) -> None:
                work.choose()
                work.put(part)
                ctx.part(f"found-{name}", Found, lambda: work.found)

            finished = out.has_part(name)
            out.part(name, write)
            if finished:
                work.take(out.read_part(name))
            layer.rewrite(work.dense)
            found[layer.index] = ctx.part(f"found-{name}", Found, lambda work=work: work.found)
    for line in swept.report():
        ctx.note(line)
    _report(found, ctx)
    if opt.form == "packed":
        packing.report(ctx)
    return out.checkpoint


class Found(Artifact):
    """Of one layer, by what took the scales up: a norm's name, or `up` of all experts."""

    def __init__(self, loss: Mapping[str, Sequence[float]], taken_back: Sequence[str], classes: Mapping[str, int]):
        self.loss = {name: list(values) for name, values in loss.items()}
        """Squared output error of plain rounding, and of rounding with these scales."""
        self.taken_back = list(taken_back)
        self.classes = dict(classes)
        """Experts by how their inputs were come by, see `ops.correction.pooled`."""

    def pack(self) -> Packed:
        return Packed({}, {"loss": self.loss, "taken_back": self.taken_back, "classes": self.classes})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(**packed.meta)


def _report(found: Mapping[int, Found], ctx: Context) -> None:
    kept = {
        i: {name: v for name, v in layer.loss.items() if name not in layer.taken_back} for i, layer in found.items()
    }
    ctx.record("scaled", {str(i): {n: {"plain": a, "scaled": b} for n, (a, b) in v.items()} for i, v in kept.items()})
    ctx.record("classes", {str(i): layer.classes for i, layer in found.items()})
    pairs = [pair for layer in kept.values() for pair in layer.values() if pair[0] > 0]
    if pairs:
        share = sum(scaled / plain for plain, scaled in pairs) / len(pairs)
        ctx.note(f"scales leave {share:.1%} of the squared output error of plain rounding (mean of {len(pairs)})")
    lost = [f"layer {i}: {name}" for i, layer in found.items() for name in layer.taken_back]
    if lost:
        ctx.note(f"{len(lost)} sets of scales were taken back, for they changed what the layer computes ({lost[0]})")
    total = sum((Counter(layer.classes) for layer in found.values()), Counter())
    if any(name != "own" for name in total):
        words = ", ".join(f"{count} {name}" for name, count in sorted(total.items()))
        ctx.note(f"inputs of experts, by how they were come by: {words}")


class _Fed(NamedTuple):
    """Matrices and the second moments of their inputs: a projection of all experts, or one matrix."""

    names: Sequence[str]
    transposed: bool
    gram_ECC: Tensor


class _Layer(ScaledLayer):
    """One layer: its scales, and what becomes of its weights: scaled, and rounded where they are packed."""

    def __init__(self, opt: Awq, layer: SweptLayer, packing: Packing, model: Checkpoint) -> None:
        super().__init__(layer, model)
        self._opt, self._bits = opt, packing.bits
        self._targets = [x for x in packing.targets if x.layer == layer.index]
        self._loss: dict[str, tuple[float, float]] = {}
        self._classes: Counter[str] = Counter()

    @property
    def found(self) -> Found:
        return Found(self._loss, self.taken_back, self._classes)

    # -- scales

    def choose(self) -> None:
        """Choose scales and put them into `dense`, as far as the layer computes the same bits with them."""
        rounded_too = [x.name for x in self.others if self._bits[x.name] != KEPT]
        feeds = Feeds(self.layer, self.modules(self.norms()), self.modules([x.name for x in self.others]))
        grams, sizes = (kind(self.layer, self.modules(rounded_too)) for kind in (InputGrams, InputSizes))
        with feeds.watching(), grams.watching(), sizes.watching():
            stats = self._observed(grams, sizes)
        before = self.layer.outputs()[0].clone()
        found = self.scale(list(self._chosen(feeds, grams, sizes, stats)), before)
        self._loss = {scales.name: scales.loss for scales in found}

    def _observed(self, grams: InputGrams, sizes: InputSizes) -> LayerStats | None:
        if self.layer.is_moe:
            return self.layer.observe([grams, sizes, *collectors(STATISTICS)], on_device=True)

        def start() -> None:
            grams.start(None, None)
            sizes.start(None, None)

        self.layer.watch(start)
        return None

    def _chosen(self, feeds: Feeds, grams: InputGrams, sizes: InputSizes, stats: LayerStats | None) -> Iterator[Scales]:
        leaders = {name: leader for leader, names in grams.sharing().items() for name in names}
        stacks, moments = self.stacks(), {}
        if stats is not None:
            for into in ("x", "h"):
                moments[into], classes = pooled(stats[f"{into}_cov"], stats.count_E)
                self._classes.update(classes)
        for norm in dict.fromkeys(feeds.norm_of.values()):
            fed = [x.name for x in self.others if feeds.norm_of.get(x.name) == norm]
            matrices = [_Fed([name], False, grams.matrix(leaders[name])[None]) for name in fed if name in leaders]
            size_C = sizes.vector(leaders[matrices[0].names[0]]) if matrices else None
            experts = [s for s in stacks if s.into == "x"] if feeds.norm_of.get(EXPERTS) == norm else []
            if experts:
                matrices += [_Fed(s.names, s.transposed, moments["x"]) for s in experts]
                size_C = stats["x_abs"].sum(0) / stats.count_E.sum().clamp(min=1)
            if size_C is None:
                continue
            weight_C = sum(self._sizes(f).sum(0) for f in matrices) / sum(len(f.gram_ECC) for f in matrices)
            scale_1C, loss = self._best(matrices, size_C[None], weight_C[None])
            values = self.of_norm(norm, feeds, experts, scale_1C[0])
            yield Scales(norm.removesuffix(".weight"), loss, values)
        if len(stacks) == 3 and family_of(self.model.config).row.gated != "clamped":
            up, down = stacks[1:]
            matrices = [_Fed(down.names, False, moments["h"])]
            scale_EF, loss = self._best(matrices, pooled(stats["h_abs"], stats.count_E)[0], self._sizes(matrices[0]))
            values = {name: 1 / scale_F[:, None] for name, scale_F in zip(up.names, scale_EF, strict=True)}
            yield Scales("up", loss, values | dict(zip(down.names, scale_EF, strict=True)))

    def _best(self, matrices: Sequence[_Fed], size_EC: Tensor, weight_EC: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """The scales [E, C] of least error, for each row of `size_EC` by itself; a single row is for all matrices.
        Squared errors of plain rounding and with them.
        """
        scales_QEC = torch.stack(list(candidates(size_EC, weight_EC)))
        loss_QE = sum(self._losses(fed, scales_QEC) for fed in matrices)
        least_E, best_E = loss_QE.min(0)
        chosen_EC = scales_QEC[best_E, torch.arange(len(best_E), device=best_E.device)]
        return chosen_EC, (float(loss_QE[0].sum()), float(least_E.sum()))

    def _losses(self, fed: _Fed, scales_QEC: Tensor) -> Tensor:
        """Squared output errors with each candidate, [Q, E], or [Q, 1] where all matrices have the same scales."""
        count, columns = fed.gram_ECC.shape[:2]
        bits_E = [self._bits[name] for name in fed.names] * (count // len(fed.names))
        step = max(1, SLAB_BYTES // (32 * columns * max(columns, *self.specs[fed.names[0]].shape)))
        pieces = []
        for start in range(0, count, step):
            some = slice(start, start + step)
            weight_ERC, gram_ECC = self.values(fed.names, fed.transposed, some), fed.gram_ECC[some]
            widths = {bits: [i for i, own in enumerate(bits_E[some]) if own == bits] for bits in set(bits_E[some])}
            each = []
            for scale_EC in scales_QEC:
                scale_EC = scale_EC.expand(count, -1)[some]
                lost_ERC = torch.zeros_like(weight_ERC, dtype=torch.float32)
                for bits, at in widths.items():  # experts may have bits of their own
                    if bits != KEPT:
                        left = rounded(weight_ERC[at], scale_EC[at], bits, self._opt.group_size)
                        lost_ERC[at] = left.float() - weight_ERC[at].float()
                each.append(output_energy(lost_ERC, gram_ECC))
            pieces.append(torch.stack(each))
        loss_QE = torch.cat(pieces, 1)
        return loss_QE.sum(1, keepdim=True) if scales_QEC.shape[1] == 1 else loss_QE

    def _sizes(self, fed: _Fed) -> Tensor:
        """[E, C]"""
        return weight_sizes(self.values(fed.names, fed.transposed), self._opt.group_size)

    # -- writing

    def put(self, part: PartWriter) -> None:
        """Write the layer, rounded where it is packed."""
        packed = {x.name for x in self._targets} if self._opt.form == "packed" else set()
        for name, value in self.dense.items():
            if name not in packed:
                part.put(name, value)
        for linear in self._targets if packed else []:
            name, bits = linear.name, self._bits[linear.name]
            value = self.now(name)
            codes, scale = quantize_rtn(value.mT if linear.transposed else value, bits, self._opt.group_size)
            if value.dim() == 2:
                put_packed(part, name, codes, scale, bits)
            else:
                words = pack_rows(codes, bits)
                put_packed_stack(part, name, words.cpu(), scale.cpu(), value.shape, bits, linear.transposed)
            self._take(linear, codes, scale)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The new values from what an earlier run has written."""
        self.dense = {name: value for name, value in tensors.items() if name in self.specs}
        for linear in self._targets if self._opt.form == "packed" else []:
            words, scale, _ = packed_names(linear.name)
            shape = self.specs[linear.name].shape
            columns = shape[-2] if linear.transposed else shape[-1]
            self._take(linear, unpack_rows(tensors[words], self._bits[linear.name], columns), tensors[scale])

    def _take(self, linear: Linear, codes: Tensor, scale: Tensor) -> None:
        dense = dequantize(codes, scale)
        self.dense[linear.name] = dense.mT if linear.transposed else dense
