"""What methods share that change the matrices of routed experts one by one: which there are, statistics of their
inputs, writing them back, zeros, factors. Shared experts, dense layers, routers and biases are left alone. It stands
beside the kinds: `slim/__init__.py` is about channels, and these methods drop none.

E experts, R output rows, C inputs of a matrix: [F, D] for gate and up, [D, F] for down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from moecli.core.artifacts import Artifact, Checkpoint, ExpertWeights, LayerStats, Packed, PartWriter
from moecli.core.context import Context
from moecli.core.errors import Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options
from moecli.engine.collectors import collectors
from moecli.engine.sweep import SweptLayer
from moecli.families import family_of
from moecli.families.products import factor_config, forecast_factors, plain_experts
from moecli.io.factors import FACTORS_KEY, put_factors
from moecli.ops.lowrank import Factored, truncated
from moecli.ops.moments import Moments, moments
from moecli.ops.sparsity import Compare, Pattern, Sparsity, dropped, has_pattern, kept

MATRICES: Mapping[str, str] = {"gate_FD": "x", "up_FD": "x", "down_DF": "h"}
"""Fields of ExpertWeights and what goes into them: x the layer's input, h the gated activation."""
GRAMS = ("x_cov", "x_cov_pool", "h_cov")
SLAB_BYTES = 2 << 30
"""Memory of the matrices that are worked on at a time, with what is made of them."""


class Counts(Artifact):
    """Numbers of one layer that the report adds up; kept beside the layer, for a run that goes on."""

    def __init__(self, counts: Mapping[str, float]) -> None:
        self.counts = dict(counts)

    def pack(self) -> Packed:
        return Packed({}, {"counts": self.counts})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(packed.meta["counts"])


def added(some: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name."""
    total: dict[str, float] = {}
    for counts in some:
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    return total


def keep_counts(ctx: Context, layer: int, counts: Mapping[str, float]) -> None:
    """Put a layer's counts beside what was written of it."""
    ctx.part(f"counts-layer-{layer:03d}", Counts, lambda: Counts(counts))


def kept_counts(ctx: Context, layer: int) -> dict[str, float]:
    """The counts of a layer that was written, now or by an earlier run."""
    return ctx.part(f"counts-layer-{layer:03d}", Counts, _not_there).counts


def _not_there() -> Counts:
    raise RuntimeError("a part went missing while the stage ran")


def slabs(experts: int, bytes_each: int) -> Iterator[slice]:
    """Experts to work on at a time so that SLAB_BYTES are not exceeded."""
    step = max(1, SLAB_BYTES // bytes_each)
    yield from (slice(start, start + step) for start in range(0, experts, step))


def write_matrices(
    part: PartWriter, model: Checkpoint, layer: int, experts: ExpertWeights, new: Mapping[str, Tensor]
) -> None:
    """Write a layer's experts with these matrices, [E, R, C] by field, in place of their own."""
    changed = experts._replace(**new)
    some = [ExpertWeights(*(None if v is None else v[e] for v in changed)) for e in range(len(changed.gate_FD))]
    family_of(model.config).write_experts(part, model, layer, some)


class Heard(PartWriter):
    """A part that remembers what was put, for a sweep whose later layers shall see it."""

    def __init__(self, part: PartWriter) -> None:
        self._part = part
        self.values: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self.values[name] = tensor
        self._part.put(name, tensor)

    def rename(self, name: str, parent_name: str) -> None:
        self._part.rename(name, parent_name)

    def drop(self, name: str, reason: str) -> None:
        self._part.drop(name, reason)


def input_moments(layer: SweptLayer, into: str, found: LayerStats) -> Moments:
    """Mean of x x^T (`into` "x") or h h^T ("h") over the tokens routed to each expert, float32 [E, C, C] on the device.

    Experts with few tokens: `ops.moments`; for x they lean on the mean over all tokens of the layer. StageFailed when
    inputs were not finite.
    """
    pool_CC = found["x_cov_pool"][0] / max(found.tokens, 1) if into == "x" else None
    try:
        if pool_CC is not None and not bool(torch.isfinite(pool_CC).all()):
            raise ValueError("sums over the inputs of the experts hold values that are not numbers")
        return moments(found[f"{into}_cov"], found.count_E, pool_CC)
    except ValueError as problem:
        raise StageFailed(
            str(problem), where=f"layer {layer.index}", hint="`moecli verify MODEL` checks the weights"
        ) from problem


def observed_grams(layer: SweptLayer) -> LayerStats:
    """Sums that `input_moments` reads, left on the device."""
    return layer.observe(collectors(GRAMS), on_device=True)


def note_moments(total: Mapping[str, float], ctx: Context) -> None:
    """A line for the report when some experts had too few tokens: from counts `own`, `mixed`, `unseen`, of inputs."""
    if total.get("mixed") or total.get("unseen"):
        ctx.note(
            f"of {total['own'] + total['mixed'] + total['unseen']} second moments of experts' inputs {total['own']} "
            f"are of their own tokens alone, {total['mixed']} had fewer than two tokens an input and lean on the "
            f"layer's inputs (down: on equal ones), {total['unseen']} had no token"
        )


# -- zeros


class Sparse(Options):
    """Options of a method that sets weights of the routed experts to zero. Shapes and bytes stay as they are."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] | Literal["1:2", "1:4", "2:4", "4:8"] = 0.5
    """Part of the weights that becomes zero, or `"2:4"`: of each 4 consecutive inputs of an output 2 stay."""

    @property
    def zeros(self) -> Sparsity:
        """The sparsity as a value."""
        if isinstance(self.sparsity, float):
            return self.sparsity
        keep, of = self.sparsity.split(":")
        return Pattern(int(keep), int(of))

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        zeros, widths = self.zeros, {"model width": model.hidden, "expert width": model.expert_width}
        if not isinstance(zeros, Pattern):
            if dropped(least := min(widths.values()), zeros) == 0:
                yield Problem("sparsity", f"{zeros:g} of a row of {least} weights is less than one",
                              hint=f"write `sparsity: {math.ceil(1000 / least) / 1000:g}` or more")  # fmt: skip
        elif wrong := [f"{name} {width}" for name, width in widths.items() if width % zeros.of]:
            yield Problem("sparsity", f"groups of {zeros.of} do not divide the {' and the '.join(wrong)}",
                          hint=f"write `sparsity: {zeros.part:g}`")  # fmt: skip

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return plain_experts(model)


class Scored(Sparse):
    """Options of a method that drops the weights of lowest score and leaves the others as they are."""

    compare: Compare = "output"
    """Among which weights the lowest scores go: those of one `output`, or of a whole `matrix`. N:M has its groups."""


def drop_weights(
    model: Checkpoint, square: Mapping[int, Mapping[str, Tensor]], seen: Mapping[int, Tensor], opt: Scored, ctx: Context
) -> Checkpoint:
    """Write the model with the weights of lowest score |W_ij| sqrt(s_j) set to zero in every routed expert.

    `square` is {layer: {"x": [E, D], "h": [E, F]}}, the s of each matrix's inputs, and `seen` bool [E]: experts that
    saw no token are ranked by |W_ij|, and counted in the report. StageFailed when an s is not finite or of another
    model.
    """
    family = family_of(model.config)
    with ctx.writer(model) as out:
        for layer in ctx.track(model.facts.moe_layers, "dropping weights"):

            def write(part: PartWriter, layer: int = layer) -> None:
                experts, new = family.read_experts(model, layer), {}
                for field, into in MATRICES.items():
                    weight_ERC = getattr(experts, field)
                    s_EC = checked_inputs(square[layer][into], weight_ERC, into, layer)
                    s_EC = torch.where(seen[layer][:, None], s_EC, torch.ones_like(s_EC))
                    new[field] = _without_lowest(weight_ERC, s_EC.sqrt(), opt, ctx.device)
                keep_counts(ctx, layer, write_zeros(part, model, layer, experts, new, opt))

            out.part(f"layer-{layer:03d}", write)
    unseen = sum(int((~seen_E).sum()) for seen_E in seen.values())
    if unseen:
        experts = sum(len(seen_E) for seen_E in seen.values())
        ctx.note(f"{unseen} of {experts} experts saw no calibration token; their weights were ranked by size")
    report_zeros(model, opt, ctx)
    return out.checkpoint


def checked_inputs(square_EC: Tensor, weight_ERC: Tensor, into: str, layer: int) -> Tensor:
    """Sums of squares of a matrix' inputs; StageFailed when they are of another model, or no numbers."""
    wanted = (weight_ERC.shape[0], weight_ERC.shape[2])
    if tuple(square_EC.shape) != wanted:
        raise StageFailed(
            f"the statistics are of {square_EC.shape[0]} experts with {square_EC.shape[1]} inputs, the model has "
            f"{wanted[0]} with {wanted[1]}",
            where=f"layer {layer}", hint="put a `calibrate/statistics` stage right above this one",
        )  # fmt: skip
    if not bool(torch.isfinite(square_EC).all()):
        expert, channel = (~torch.isfinite(square_EC)).nonzero()[0].tolist()
        raise StageFailed(f"sums over input {channel} of expert {expert} ({into}) are not numbers",
                          where=f"layer {layer}", hint="`moecli verify MODEL` checks the weights")  # fmt: skip
    return square_EC


def _without_lowest(weight_ERC: Tensor, norm_EC: Tensor, opt: Scored, device: torch.device) -> Tensor:
    pieces = []
    for some in slabs(len(weight_ERC), 24 * weight_ERC[0].numel()):
        weight = weight_ERC[some].to(device)
        score = weight.float().abs() * norm_EC[some].to(device, torch.float32)[:, None]
        pieces.append(weight.masked_fill(~kept(score, opt.zeros, opt.compare), 0).to(weight_ERC.device))
    return torch.cat(pieces)


def write_zeros(
    part: PartWriter, model: Checkpoint, layer: int, experts: ExpertWeights, new: Mapping[str, Tensor], opt: Sparse
) -> dict[str, int]:
    """Write the matrices; how many `weights` they have and how many are `zeros`. N:M is checked on what is written."""
    rounded = {field: value.to(getattr(experts, field)) for field, value in new.items()}
    if isinstance(opt.zeros, Pattern) and not all(has_pattern(value, opt.zeros) for value in rounded.values()):
        raise RuntimeError(f"layer {layer} is not {opt.sparsity} sparse")
    write_matrices(part, model, layer, experts, rounded)
    return {"weights": sum(v.numel() for v in rounded.values()),
            "zeros": sum(int((v == 0).sum()) for v in rounded.values())}  # fmt: skip


def report_zeros(model: Checkpoint, opt: Sparse, ctx: Context) -> None:
    """What part of each layer's routed experts is zero, from what was written."""
    each = {layer: kept_counts(ctx, layer) for layer in model.facts.moe_layers}
    ctx.record("sparsity", {str(i): counts["zeros"] / counts["weights"] for i, counts in each.items()})
    total = added(each.values())
    pattern = f", {opt.sparsity} in every row" if isinstance(opt.sparsity, str) else ""
    ctx.note(
        f"{total['zeros']} of {total['weights']} weights of routed experts are zero "
        f"({total['zeros'] / total['weights']:.2%}{pattern}); they take as many bytes as before, in memory too"
    )


# -- factors


class LowRank(Options):
    """Options of a method that replaces the matrices of routed experts by products of thin ones."""

    form: Literal["compact", "expanded"] = "compact"
    """`compact` stores the factors and runs them, which takes `import moecli` or `trust_remote_code` to load;
    `expanded` multiplies them out: loads everywhere and computes the same, but takes no byte less."""

    def shape(self, experts: int, outputs: int, inputs: int) -> dict[str, Any]:
        """`rank`, `base` and `rows` of a matrix."""
        raise NotImplementedError

    def forecast(self, model: ModelSketch) -> ModelSketch:
        if self.form == "expanded":
            return plain_experts(model)
        return forecast_factors(model, partial(self.shape, model.facts.experts))


def rank_problem(kept: float, taken: float, model: ModelFacts) -> Iterator[Problem]:
    """Factors that hold `kept` of a matrix' numbers, less `taken` that something else holds, have a rank below 1."""
    outputs, inputs = model.expert_width, model.hidden
    least = (outputs + inputs) / (outputs * inputs) + taken
    if kept < least:
        shared = f", {taken:.3g} of them the shared ones" if taken else ""
        yield Problem(
            "kept", f"factors of rank 1 hold {least:.3g} of the numbers of {outputs} x {inputs} matrices{shared}",
            hint=f"write `kept: {math.ceil(1000 * least) / 1000:g}` or more" if least < 1 else None,
        )  # fmt: skip


def write_factored(
    model: Checkpoint, layers: Iterable[Any], make: Callable[[Any, ExpertWeights], tuple[dict[str, Factored],
    dict[str, float]]], opt: LowRank, ctx: Context,
) -> Checkpoint:  # fmt: skip
    """Write the model with the matrices of each MoE layer as `make(layer, experts)` factors them.

    `make` gives factors by field of ExpertWeights, and counts for the report: `lost` and `total`, squared errors and
    squares of outputs, and those of `note_moments`. `layers` are indices, or swept layers, in which those without
    experts are passed over.
    """
    family, compact = family_of(model.config), opt.form == "compact"
    choose = partial(opt.shape, model.facts.experts)
    config = factor_config(model.config, set(model.names()), choose) if compact else model.config
    with ctx.writer(model, config=config) as out:
        for layer in layers:
            index = layer if isinstance(layer, int) else layer.index
            if index not in model.facts.moe_layers:
                continue

            def write(part: PartWriter, layer: Any = layer, index: int = index) -> None:
                experts = family.read_experts(model, index)
                found, counts = make(layer, experts)
                stored = {field: factors.to(getattr(experts, field)) for field, factors in found.items()}
                if compact:
                    entry = config[FACTORS_KEY][str(index)]
                    for field, projection in zip(MATRICES, entry["projections"], strict=True):
                        put_factors(part, entry, projection["name"], stored[field])
                else:
                    write_matrices(part, model, index, experts, {f: v.expanded() for f, v in stored.items()})
                held = sum(v.numel() for factors in stored.values() for v in factors if v is not None)
                weights = sum(getattr(experts, field).numel() for field in stored)
                keep_counts(ctx, index, {**counts, "held": held, "weights": weights})

            out.part(f"layer-{index:03d}", write)
    _report_factors(model, opt, ctx)
    return out.checkpoint


def _report_factors(model: Checkpoint, opt: LowRank, ctx: Context) -> None:
    each = {layer: kept_counts(ctx, layer) for layer in model.facts.moe_layers}
    error = {layer: math.sqrt(c["lost"] / c["total"]) if c["total"] else 0.0 for layer, c in each.items()}
    ctx.record("relative_error", {str(layer): value for layer, value in error.items()})
    total = added(each.values())
    note_moments(total, ctx)
    low, high = min(error.values()), max(error.values())
    ctx.note(
        f"factors hold {total['held']} numbers for {total['weights']} ({total['held'] / total['weights']:.1%}); what "
        f"matrices make of their inputs is off by {low:.2%} to {high:.2%} by layer (root of the mean square)"
    )
    if opt.form == "expanded":
        ctx.note("the factors are multiplied out: the model takes as many bytes as before")


def whitened(
    layer: SweptLayer, experts: ExpertWeights, base: Callable[[Tensor, Tensor], Tensor | None], rank: int,
    device: torch.device,
) -> tuple[dict[str, Factored], dict[str, float]]:  # fmt: skip
    """Factors of this rank of all matrices of a layer, nearest on its tokens as they flow now, and counts for the
    report. `base(weights [E, O, I], tokens of each expert)` is a matrix [O, I] that is taken off before, or None.
    """
    seen, found, counts = observed_grams(layer), {}, []
    for into in ("x", "h"):
        inputs = input_moments(layer, into, seen)
        counts.append({"own": inputs.own, "mixed": inputs.mixed, "unseen": inputs.unseen})
        for field in (field for field, of in MATRICES.items() if of == into):
            weight_EOI = getattr(experts, field)
            off_OI, pieces = base(weight_EOI, seen.count_E), []
            off_OI = None if off_OI is None else off_OI.to(weight_EOI)  # as it is stored
            outputs, columns = weight_EOI.shape[1:]
            for some in slabs(len(weight_EOI), 8 * (4 * columns**2 + 3 * outputs**2 + 6 * outputs * columns)):
                weight, moment = weight_EOI[some].to(device).double(), inputs.value_ECC[some].double()
                cut = truncated(weight if off_OI is None else weight - off_OI.to(device), rank, moment)
                total = float(((weight @ moment) * weight).sum())
                counts.append({"lost": float(cut.lost_E.sum()), "total": total})
                pieces.append([factor.to(weight_EOI) for factor in (cut.left_EOr, cut.right_ErI)])
            left, right = (torch.cat(some) for some in zip(*pieces, strict=True))
            found[field] = Factored(left, right, off_OI)
    return found, added(counts)
