"""How many bits each routed expert gets: what every `allocate/...` method shares. Nothing is quantized here.

A method says what each number of bits costs each expert; a solver of `ops.budget` chooses one for each, least cost in
all, so that their mean is at most `average`. All experts of a model have as many weights, so means over experts are
means over weights; scales, attention and shared experts are not counted. The plan is carried out by a `quantize/...`
stage below, whose own `bits` then holds for everything else.

What has to read the result (`servable`) is a constraint of the problem: transformers knows one number of bits for all
experts, vLLM one for each layer. Families that keep a layer's experts in one tensor get one for each layer always.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moecli.core.artifacts import Artifact, BitPlan, CalibrationText, Checkpoint, Packed
from moecli.core.context import Context
from moecli.core.errors import MoecliError, Problem, StageFailed
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.core.stage import Options
from moecli.engine.backward import BackLayer
from moecli.engine.rounding import COMPENSATED_BY, Rounding, compensated, one_by_one
from moecli.engine.sweep import SweptLayer
from moecli.families import family_of
from moecli.ops import budget
from moecli.ops.pack import dequantize, quantize_rtn
from moecli.ops.precision import asymmetric, bits_problem

Costs = Mapping[int, Sequence[Mapping[int, float]]]
"""{layer: for each expert {bits: cost}}, every expert with all of the levels that are allowed"""
Share = Literal["expert", "layer", "model"]
"""What has bits of its own."""

SOLVERS: Mapping[str, Callable[[budget.Problem], budget.Solution]] = {
    "dp": budget.dynamic, "milp": budget.integer_program, "greedy": budget.greedy,
}  # fmt: skip
READERS: Mapping[str, tuple[str, tuple[int, ...]]] = {"hf": ("transformers", (2, 3, 4, 8)), "vllm": ("vLLM", (4, 8))}
"""Who `servable` names, and the bits that it takes for experts: transformers has other codes for 1 bit, vLLM takes
these without a backend of their own."""

_WEIGHTS = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
"""Share of an expert's weights that gate and up are, and that its down projection is."""


class Allocate(Options):
    """Options of a method that gives experts bits."""

    average: Annotated[float, Field(gt=0)]
    """Mean bits of the routed experts' weights, at most. Scales come on top: 16 / `group_size` bits a weight."""
    bits: Annotated[tuple[Literal[1, 2, 3, 4, 8], ...], Field(strict=False, min_length=1)] = (2, 3, 4)
    """Numbers of bits that an expert may get."""
    scope: Literal["layer", "model"] = "model"
    """`layer` keeps `average` in every layer, `model` over all of them together."""
    at_least: Literal["upper_two", "none"] = "none"
    """`upper_two`: in every layer one expert or more at the largest of `bits` and one at the next."""
    servable: Literal["research", "vllm", "hf"] = "research"
    """`research`: any mix. `vllm`: one number of bits a layer, 4 or 8, as vLLM's fused experts want it. `hf`: one for
    all experts of the model, 2 or more. A mix of layers is exported as `compact` all the same, for stock transformers
    would read the folder that vLLM reads wrongly; who asks the `quantize/...` stage for `servable: vllm` as well gets
    one number of bits only."""
    solver: Literal["dp", "milp", "greedy"] = "dp"
    """`dp` and `milp` (HiGHS) are exact, `greedy` walks convex hulls and says how far from the best it may be."""

    def levels(self) -> list[int]:
        """Numbers of bits that are allowed, ascending."""
        known = READERS[self.servable][1] if self.servable in READERS else self.bits
        return sorted({bits for bits in self.bits if bits in known})

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        levels, experts = self.levels(), model.experts
        if model.quantized:
            hint = "put this stage above the `quantize/...` stage"
            yield Problem("", f"the model is quantized already ({model.quantized})", hint=hint)
        elif not levels:
            reader, known = READERS[self.servable]
            words = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
            yield Problem("bits", f"{reader} takes experts of {words} bits, `bits` has none of them",
                          hint=f"write `bits: {list(known)}`")  # fmt: skip
        elif self.average > levels[-1]:
            message = f"`average` must be at most the largest number of bits allowed, {levels[-1]}, got {self.average}"
            yield Problem(
                "average", message, hint=f"write `average: {float(levels[-1])}`, or a larger number in `bits`"
            )
        elif self.at_least != "none" and (problem := self._at_least_problem(levels, experts)):
            yield problem
        elif self.servable == "hf" and self.scope == "layer":
            yield Problem("scope", "one number of bits for the whole model cannot be chosen layer by layer",
                          hint="write `scope: model`")  # fmt: skip
        elif experts * self.average < (least := sum(self._smallest(experts))):
            more = " with `at_least`" if self.at_least != "none" else ""
            message = f"`average` must be at least {_up(least / experts)}{more}, got {self.average}"
            yield Problem("average", message, hint=f"write `average: {_up(least / experts)}`")

    def _at_least_problem(self, levels: Sequence[int], experts: int) -> Problem | None:
        if self.servable != "research":
            return Problem("at_least", "experts that share their bits cannot have one at each of the upper two",
                           hint="write `at_least: none`")  # fmt: skip
        if self.solver == "greedy":
            return Problem("solver", "`greedy` knows no `at_least`", hint="write `solver: dp`, or `at_least: none`")
        if len(levels) > experts:
            return Problem("at_least", f"a layer has {experts} experts only", hint="write `at_least: none`")
        return None

    def _smallest(self, experts: int) -> list[int]:
        """Bits of a layer's experts when they are as few as allowed."""
        levels = self.levels()
        upper = levels[-2:] if self.at_least == "upper_two" else []
        return [*upper, *[levels[0]] * (experts - len(upper))]

    def share(self, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Share:
        """What has bits of its own in this model, by `servable` and by how it stores experts.

        MoecliError when `at_least` is asked of experts that share theirs.
        """
        if self.servable != "research":
            return "model" if self.servable == "hf" else "layer"
        family = family_of(config)
        form = family.layout(specs, family.facts.moe_layers[0])
        if form.names_of(0) != form.names_of(1):
            return "expert"
        if self.at_least != "none":
            raise MoecliError(
                "a layer's experts lie in one tensor here and share their bits, so `at_least` cannot be kept",
                hint="write `at_least: none`",
            )
        return "layer"

    def forecast(self, model: ModelSketch) -> ModelSketch:
        share, family = self.share(model.config, model.specs), family_of(model.config)
        # Any errors that fall ever more slowly: the plan is as large as `average` allows. They differ by expert and by
        # layer, as measured ones do: `average` may be one of `bits`, and the plan is a mix all the same.
        cost = {
            layer: [
                {bits: -place * e * math.sqrt(bits) for bits in self.levels()}
                for e in range(1, family.experts_in(layer) + 1)
            ]
            for place, layer in enumerate(family.facts.moe_layers, 1)
        }
        choice = _together(budget.greedy(problem) for problem in self.split(cost, share, False))
        return replace(model, planned_bits=plan_of(choice).pairs())

    def split(self, cost: Costs, share: Share, upper_two: bool) -> list[budget.Problem]:
        """The problems to solve: one, or one for each layer."""
        parts = [cost] if self.scope == "model" else [{layer: experts} for layer, experts in cost.items()]
        return [
            bits_problem(part, math.floor(self.average * sum(map(len, part.values())) + 1e-9), share, upper_two)
            for part in parts
        ]


def _up(value: float) -> float:
    """To three places, upwards."""
    return math.ceil(value * 1000 - 1e-6) / 1000


def solve(cost: Costs, opt: Allocate, model: Checkpoint, ctx: Context) -> BitPlan:
    """Each expert's bits at the least cost; what came of it is recorded. MoecliError: see `solved`."""
    share = opt.share(model.config, {name: model.spec(name) for name in model.names()})
    if share == "layer" and opt.servable == "research":
        ctx.note("a layer's experts lie in one tensor: each layer has one number of bits")
    plan = plan_of(solved(opt.split(cost, share, opt.at_least == "upper_two"), opt, ctx))
    report(plan, ctx)
    return plan


def solved(problems: Sequence[budget.Problem], opt: Allocate, ctx: Context) -> dict[str, int]:
    """The bits of each item, and a note of what they cost.

    MoecliError when the solver cannot take a problem of this size.
    """
    solutions = []
    for problem in problems:
        try:
            solutions.append(SOLVERS[opt.solver](problem))
        except ValueError as reason:
            raise MoecliError(str(reason), hint="write `solver: milp`") from reason
    error, bound = (math.fsum(getattr(found, name) for found in solutions) for name in ("error", "bound"))
    proven = f"at most {error - bound:.3g} above the least possible" if error > bound else "the least possible"
    ctx.note(f"cost {error:.6g}, {proven}")
    return _together(solutions)


def _together(solutions: Iterable[budget.Solution]) -> dict[str, int]:
    return {item: bits for found in solutions for item, bits in found.choice.items()}


def plan_of(choice: Mapping[str, int]) -> BitPlan:
    """The plan of a choice, in which an expert is called "<layer>.<expert>" and all of its matrices are alike."""
    layers: dict[int, dict[int, int]] = {}
    for item, bits in choice.items():
        layer, expert = map(int, item.split("."))
        layers.setdefault(layer, {})[expert] = bits
    return BitPlan({
        layer: torch.tensor([of_expert[expert] for expert in range(len(of_expert))])[:, None].repeat(1, 2)
        for layer, of_expert in layers.items()
    })  # fmt: skip


def report(plan: BitPlan, ctx: Context, charts: Sequence[Mapping[str, Any]] = ()) -> None:
    """The histogram of bits, and their mean by layer; `charts` come after it."""
    counts = Counter(pair for pairs in plan.pairs().values() for pair in pairs)
    mean = {layer: float(bits_E2.double().mean(0) @ _WEIGHTS) for layer, bits_E2 in plan.items()}
    each = [(" and ".join(map(str, dict.fromkeys(pair))), count) for pair, count in sorted(counts.items())]
    average = sum(mean[layer] * len(bits_E2) for layer, bits_E2 in plan.items()) / counts.total()
    words = ", ".join(f"{count} have {bits}" for bits, count in each)
    ctx.note(f"bits of {counts.total()} routed experts: {words}; {average:.3f} on average")
    ctx.record("bits", {str(layer): bits_E2.tolist() for layer, bits_E2 in plan.items()})
    ctx.record("charts", [{
        "title": "Bits of experts", "x_label": "layer", "y_label": "mean bits of a weight",
        "caption": "Mean number of bits of a layer's routed experts, scales not counted.",
        "series": [{"name": "planned", "x": list(mean), "y": list(mean.values())}],
    }, *charts])  # fmt: skip


# --- costs from errors ----------------------------------------------------------------------------


class Measured(Artifact):
    """Errors by layer: float64 [E, numbers of bits]."""

    def __init__(self, layers: Mapping[int, Tensor]) -> None:
        self.layers = dict(layers)

    def pack(self) -> Packed:
        return Packed({str(layer): error_EB for layer, error_EB in self.layers.items()}, {"layers": list(self.layers)})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls({layer: packed.tensors[str(layer)] for layer in packed.meta["layers"]})


class Measuring(Allocate):
    """Options of a method that measures what rounding does."""

    group_size: PositiveInt = 128
    """Inputs that share a scale where errors are measured; that of the `quantize/...` stage below."""
    grid: Literal["symmetric", "asymmetric"] = "symmetric"
    """Where errors are measured: `symmetric` is the grid that `quantize/...` writes, `asymmetric` that of the published
    code, which has a zero point."""
    shrink: bool = False
    """Search each scale as `shrink` of the `quantize/...` stage below does, which helps fewer bits more."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """What errors are those of: weights rounded to the nearest, as published, or what GPTQ makes of them on this text,
    as `quantize/gptq` below does. That takes another pass of each layer and a solution for each of `bits`."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        named = {"model width": model.hidden, "expert width": model.expert_width}
        if wrong := [f"{name} {width}" for name, width in named.items() if width % self.group_size]:
            message = f"`group_size` {self.group_size} does not divide the {' and the '.join(wrong)}"
            fits = next((g for g in (128, 64, 32, 16) if not any(w % g for w in named.values())), None)
            yield Problem("group_size", message, hint=f"write `group_size: {fits}`" if fits else None)
        more = [name for name, asked in (("shrink", self.shrink), ("rounding", self.rounding == "gptq")) if asked]
        if self.grid == "asymmetric" and more:
            yield Problem(more[0], "the grid of published code is here for rounding to the nearest alone",
                          hint=f"write `grid: symmetric`, or leave `{more[0]}` out")  # fmt: skip

    def held(self) -> tuple[str, ...]:
        """Statistics of a layer that `rounding_of` holds."""
        return COMPENSATED_BY if self.rounding == "gptq" else ()

    def rounding_of(self, layer: SweptLayer | BackLayer) -> Rounding:
        """What the errors of this layer's experts are those of."""
        if self.rounding == "gptq":
            return compensated(layer, self.group_size, self.shrink)
        if self.grid == "asymmetric":
            return one_by_one(lambda weight_NK, bits: asymmetric(weight_NK, bits, self.group_size))
        return to_nearest(self.group_size, self.shrink)


def to_nearest(group_size: int, shrink: bool = False) -> Rounding:
    """On the grid that `quantize/rtn` writes."""
    return one_by_one(lambda weight_NK, bits: dequantize(*quantize_rtn(weight_NK, bits, group_size, shrink)))


def measured(
    make: Callable[[], Mapping[int, Tensor]], opt: Measuring, text: CalibrationText, ctx: Context, **settings: Any
) -> dict[int, list[dict[int, float]]]:
    """{layer: for each expert {bits: error}} from what `make` measures, [E, levels]; kept for recipes that ask for
    another average. `settings` say what else decides the errors.

    StageFailed when one is not a number.
    """
    grid = {"bits": opt.levels(), **opt.model_dump(include={"group_size", "grid", "shrink", "rounding"})}
    values = {"model": ctx.input_keys["model"], "text": text.digest, **grid, **settings}
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
    found = ctx.shared_part(f"errors-{key}", Measured, lambda: Measured(make())).layers
    for layer, error_EB in found.items():
        if not torch.isfinite(error_EB).all():
            expert = int((~torch.isfinite(error_EB)).any(-1).nonzero()[0])
            raise StageFailed("the error of rounding is not a number", where=f"layer {layer}, expert {expert}",
                              hint="check the model with `moecli verify`")  # fmt: skip
    return {i: [dict(zip(opt.levels(), row, strict=True)) for row in e.tolist()] for i, e in found.items()}
