"""Bits of experts found by evolution, judged by what the whole model then says (EvoPress).

A generation makes `offspring` plans that differ from the best one in a few experts, one a level up for one a level
down, and judges them by KL(source || rounded model) on calibration text: all on a little, the best on more, the last
step beside their parent. Nothing is taken as additive, so errors that grow together are seen. It starts from the plan
of an `allocate/...` stage above, which it can then only improve on its own text; without one, from one number of bits
for all where `average` is one of `bits`, else from the best of `starts` random plans.

Cost: a generation judges `offspring` x the first step's tokens and so on; with the defaults, those published, 150
generations are 150 million tokens. All plans of a step go through the layers in one sweep (`engine.mixes`): a layer is
read and rounded once for all of them. Texts are drawn anew for each generation from the calibration's samples; a step
takes as many whole samples as its tokens fill, at least one, and all of them when it asks for more than there are.

Rounding is to nearest on the symmetric grid that `quantize/...` writes; the published search chooses among matrices
quantized by GPTQ, so that its errors are those of GPTQ. Its units are single matrices; ours are experts.

Source: arXiv 2410.14649 (EvoPress, section 3 and appendix on quantization); schedule of its released search.

- run: allocate/evopress
  with: {average: 2.5, bits: [2, 3, 4], generations: 30, offspring: 16, steps: [[4, 2048], [1, 8192]]}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.random import Generator
from pydantic import Field, PositiveInt

from moecli.core.artifacts import Artifact, BitPlan, CalibrationText, Checkpoint, Packed
from moecli.core.context import Context
from moecli.core.errors import MoecliError, Problem
from moecli.core.model import ModelFacts
from moecli.core.stage import RunSetting, stage
from moecli.engine.data import batches_of
from moecli.engine.mixes import divergences
from moecli.families import family_of
from moecli.methods.allocate import Allocate, plan_of, report, to_nearest
from moecli.ops import budget as ops_budget
from moecli.ops import evolve

Steps = Annotated[
    tuple[Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)], ...], Field(strict=False, min_length=1)
]


class EvoPress(Allocate):
    """Options of `allocate/evopress`."""

    scope: Literal["model"] = "model"
    """Bits move between layers."""
    solver: Literal["evolution"] = "evolution"
    """No additive costs, so no other."""
    generations: PositiveInt = 150
    """Rounds of the search. Each is kept, so that a longer search goes on where a shorter one ended."""
    offspring: PositiveInt = 128
    """Plans that a generation tries."""
    steps: Steps = tuple(tuple(step) for step in evolve.QUANTIZATION)
    """[survivors, tokens] of each step of a generation's selection; the last one leaves one."""
    starts: PositiveInt = 16
    """Random plans to start from the best of, where there is no other start."""
    group_size: PositiveInt = 128
    """Inputs that share a scale; that of the `quantize/...` stage below."""
    shrink: bool = False
    """Search each scale as `shrink` of the `quantize/...` stage below does."""
    batch_size: Annotated[PositiveInt, RunSetting()] = 8
    """Sequences per forward pass."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        yield from super().problems(model)
        if self.steps[-1][0] != 1:
            yield Problem("steps", f"the last step must leave one survivor, got {self.steps[-1][0]}",
                          hint=f"write `[1, {self.steps[-1][1]}]`")  # fmt: skip
        if self.servable == "hf":
            yield Problem("servable", "one number of bits for all experts leaves nothing to search",
                          hint="write `bits` in the `quantize/...` stage alone")  # fmt: skip


@stage("allocate/evopress", version=1)
def evopress(opt: EvoPress, text: CalibrationText, model: Checkpoint, plan: BitPlan | None, ctx: Context) -> BitPlan:
    search = _Search(opt, text, model, ctx)
    first = parent = search.start(plan)
    found: list[_Generation] = []
    for number in ctx.track(range(opt.generations), "generations"):
        found.append(search.generation(number, parent))
        parent = found[-1].parent
    moved = sum(first[item] != parent[item] for item in parent)
    ctx.note(
        f"{len(found)} generations changed the bits of {moved} of {len(parent)} experts; on the last one's text "
        f"the plan is {found[-1].fitness:.4g} nats a token from the source (KL)"
    )
    chart = {
        "title": "Search for bits", "x_label": "generation", "y_label": "KL to the source, nats a token",
        "caption": "Of the best plan and its parent, each generation on text of its own.",
        "series": [
            {"name": "best", "x": list(range(len(found))), "y": [one.fitness for one in found]},
            {"name": "parent", "x": list(range(len(found))), "y": [one.before for one in found]},
        ],
    }  # fmt: skip
    made = plan_of(parent)
    report(made, ctx, [chart])
    return made


class _Generation(Artifact):
    """Item -> bits of the best plan, its KL and its parent's."""

    def __init__(self, parent: Mapping[str, int], fitness: float, before: float) -> None:
        self.parent, self.fitness, self.before = dict(parent), fitness, before

    def pack(self) -> Packed:
        return Packed({}, {"parent": self.parent, "fitness": self.fitness, "before": self.before})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls(**packed.meta)


class _Search:
    """The problem, and what judges its choices. Everything random hangs on the seed and the generation's number."""

    def __init__(self, opt: EvoPress, text: CalibrationText, model: Checkpoint, ctx: Context) -> None:
        self._opt, self._text, self._model, self._ctx = opt, text, model, ctx
        share = opt.share(model.config, {name: model.spec(name) for name in model.names()})
        family, nothing = family_of(model.config), dict.fromkeys(opt.levels(), 0.0)
        cost = {layer: [nothing] * family.experts_in(layer) for layer in family.facts.moe_layers}
        [self._problem] = opt.split(cost, share, opt.at_least == "upper_two")
        settings = opt.model_dump(mode="json", exclude={"generations", "batch_size"})
        values = {"model": ctx.input_keys["model"], "text": text.digest, "seed": ctx.seed, **settings}
        self._key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]

    def start(self, plan: BitPlan | None) -> evolve.Choice:
        """MoecliError for a plan that the options do not allow."""
        found = self._given(plan) if plan is not None else self._plain()
        self._key += "-" + hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
        return found

    def _given(self, plan: BitPlan) -> dict[str, int]:
        hint = "allocate both with the same `average`, `bits` and `servable`"
        choice = {}
        for layer, pairs in plan.pairs().items():
            for expert, (inward, outward) in enumerate(pairs):
                if inward != outward:
                    raise MoecliError("a plan with other bits for down projections cannot be a start here",
                                      where=f"layer {layer}, expert {expert}")  # fmt: skip
                choice[f"{layer}.{expert}"] = inward
        if choice.keys() != {item.id for item in self._problem.items}:
            raise MoecliError("the plan above is for other layers or experts than the model's",
                              hint="put the `allocate/...` stages below those that change experts")  # fmt: skip
        if any(bits not in self._opt.levels() for bits in choice.values()) or not self._problem.allows(choice):
            raise MoecliError("the plan above is not one that these options allow", hint=hint)
        return choice

    def _plain(self) -> dict[str, int]:
        opt, items = self._opt, self._problem.items
        same = {item.id: int(opt.average) for item in items}
        if opt.average in opt.levels() and self._problem.allows(same):
            return same
        rng = np.random.default_rng([self._ctx.seed, _START])
        some = [self._random(rng) for _ in range(opt.starts)]
        value = self._ctx.shared_part(
            f"start-{self._key}", _Generation, lambda: _best(some, self._judge(some, opt.steps[0][1], rng))
        )
        return value.parent

    def _random(self, rng: Generator) -> dict[str, int]:
        """The cheapest allowed choice, and random units a level up as long as one fits."""
        some, budget = ops_budget.units(self._problem), self._problem.budget
        choice = dict(ops_budget.dynamic(self._problem).choice)
        left = budget - self._problem.cost(choice)
        open_units = list(range(len(some)))
        while open_units:
            unit = some[index := int(rng.choice(open_units))]
            keys = [level.key for level in unit.levels]
            place = keys.index(choice[unit.members[0].id])
            more = unit.levels[place + 1].cost - unit.levels[place].cost if place + 1 < len(keys) else left + 1
            if more > left:
                open_units.remove(index)
                continue
            left -= more
            choice |= {item.id: keys[place + 1] for item in unit.members}
        return choice

    def generation(self, number: int, parent: evolve.Choice) -> _Generation:
        def make() -> _Generation:
            rng = np.random.default_rng([self._ctx.seed, number])
            steps = [evolve.Step(*step) for step in self._opt.steps]
            judge = partial(self._judge, rng=rng)
            found = evolve.generation(self._problem, parent, judge, steps, self._opt.offspring, rng)
            return _Generation(found.parent, found.fitness, found.before)

        return self._ctx.shared_part(f"evopress-{self._key}-{number}", _Generation, make)

    def _judge(self, choices: Sequence[evolve.Choice], tokens: int, rng: Generator) -> list[float]:
        text, opt = self._text, self._opt
        count = min(len(text.ids), max(1, tokens // text.ids.shape[1]))
        rows = torch.from_numpy(np.sort(rng.choice(len(text.ids), count, replace=False)))
        some = batches_of(CalibrationText(text.ids[rows], text.mask[rows], ""), opt.batch_size)
        mixes = [by_layer(choice, self._model) for choice in choices]
        rounding = to_nearest(opt.group_size, opt.shrink)
        return divergences(self._model, some, mixes, rounding=rounding, device=self._ctx.device)


_START = 1 << 31
"""In the place of a generation's number."""


def _best(some: Sequence[Mapping[str, int]], value: Sequence[float]) -> _Generation:
    best = min(range(len(some)), key=lambda index: (value[index], index))
    return _Generation(some[best], value[best], value[best])


def by_layer(choice: Mapping[str, int], model: Checkpoint) -> dict[int, list[int]]:
    """{MoE layer: bits of each stored expert}"""
    family = family_of(model.config)
    return {i: [choice[f"{i}.{expert}"] for expert in range(family.experts_in(i))] for i in family.facts.moe_layers}
