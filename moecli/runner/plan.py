"""From a recipe to steps: which artifact feeds which, every key, what is done already, what it will cost.

Nothing here reads a weight: `config.json` and file headers are enough.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moecli.core.artifacts import (
    Artifact,
    BitPlan,
    CalibrationStats,
    CalibrationText,
    Checkpoint,
    Evaluation,
    ExpertPlan,
)
from moecli.core.errors import Diagnostic, MoecliError, Problem, RecipeError
from moecli.core.model import ModelSketch
from moecli.core.stage import Input, Options, RunSetting, SourcePath, Stage
from moecli.families import WIDTHS_KEY
from moecli.recipe.schema import Recipe, StageEntry, resolved_yaml
from moecli.runner import lookup
from moecli.runner.export import why_not_exported, why_not_stock

SOURCE = -1
"""Stands for the source model where a step's index is expected. An input called `source` is it, unless `use` says
otherwise.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of the plan, with its wiring resolved."""

    position: int
    """Index of the stage in the recipe; a baseline step shares it with the evaluation it belongs to."""
    label: str
    """`id` of the stage, or its name; " (source)" behind it for a baseline."""
    stage: Stage
    options: Options
    inputs: Mapping[str, int]
    """Parameter name -> index of the step that makes it, or SOURCE."""
    key: str
    identity: Mapping[str, Any]
    """What the key was made from, kept so that `status` can say what changed."""
    baseline: bool
    sketch: ModelSketch
    """The model after this step, without having read a weight."""

    @property
    def folder_name(self) -> str:
        return self.stage.name.replace("/", "-")

    @property
    def writes_weights(self) -> bool:
        return issubclass(self.stage.output, Checkpoint)


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe that can be run: every input found, every option checked against the model."""

    recipe: Recipe
    source_key: str
    """Key of the source model: id and revision, or a digest of a local folder's headers."""
    source: ModelSketch
    steps: tuple[Step, ...]
    options: tuple[Options, ...]
    """Of each stage of the recipe, with every default and every `auto` written out."""

    @property
    def final(self) -> int:
        """Index of the step whose checkpoint becomes `model/`, or SOURCE."""
        return max((i for i, step in enumerate(self.steps) if step.writes_weights), default=SOURCE)

    @property
    def export(self) -> str | None:
        """The form `model/` will have; None without one, or where headers were not at hand to say."""
        if self.final == SOURCE:
            return None
        if self.recipe.export != "auto":
            return self.recipe.export
        sketch = self.sketch_of(self.final)
        return "compact" if why_not_stock(sketch) else "stock" if sketch.specs else None

    @property
    def name(self) -> str | None:
        """What a run of it is called: the recipe's `name`, else its file's; None for one made in memory."""
        return self.recipe.name or Path(self.recipe.path).stem or None

    def resolved_recipe(self) -> str:
        """The recipe with every default and its name written out: run from elsewhere, it makes the same again."""
        return resolved_yaml(self.recipe.model_copy(update={"name": self.name}), self.options)

    def sketch_of(self, index: int) -> ModelSketch:
        return self.source if index == SOURCE else self.steps[index].sketch

    def key_of(self, index: int) -> str:
        return self.source_key if index == SOURCE else self.steps[index].key

    def label_of(self, index: int) -> str:
        return "source" if index == SOURCE else self.steps[index].label


def make_plan(recipe: Recipe, source: ModelSketch, source_key: str) -> Plan:
    """Resolve wiring and keys. Raises RecipeError with every problem found, in file order."""
    stages = [lookup.find(entry.run) for entry in recipe.stages]
    problems: list[Diagnostic] = []
    wiring = _wire(recipe, stages, problems)
    if problems:
        raise RecipeError(tuple(problems), recipe.path)
    options = _resolve_options([entry.options for entry in recipe.stages], stages, wiring)
    steps: list[Step] = []
    index_of: dict[int, int] = {SOURCE: SOURCE}
    keys: dict[str, int] = {}
    wrong: set[int] = set()
    for position, (entry, stage) in enumerate(zip(recipe.stages, stages, strict=True)):
        inputs = {name: index_of[origin] for name, origin in wiring[position].items()}
        label = entry.id or entry.run
        step = _step(position, label, stage, options[position], inputs, steps, source, source_key, recipe.seed)
        found = [] if _waits(step, steps, wrong) else list(_model_problems(recipe, step, steps))
        problems += found
        if found:
            wrong.add(position)
        if not problems:
            step, more = _forecast(recipe, step)
            problems += more
        original = _on_source(step, source, source_key, steps, recipe.seed) if stage.on_source_too else None
        if original is not None and original.key not in keys:
            keys[original.key] = len(steps)
            steps.append(original)
        index_of[position] = len(steps)
        keys[step.key] = len(steps)
        steps.append(step)
    if problems:
        raise RecipeError(tuple(problems), recipe.path)
    plan = Plan(recipe, source_key, source, tuple(steps), tuple(options))
    if plan.final != SOURCE and (problem := why_not_exported(plan.sketch_of(plan.final), recipe.export)):
        last = plan.steps[plan.final].position
        place = recipe.located.place("export") or recipe.located.place(f"stages.{last}.run")
        raise RecipeError((Diagnostic(problem.message, place, problem.hint),), recipe.path)
    return plan


def _wire(recipe: Recipe, stages: Sequence[Stage], problems: list[Diagnostic]) -> list[dict[str, int]]:
    """For each stage: parameter -> recipe position of its producer (SOURCE for the model itself)."""
    entries = recipe.stages
    ids: dict[str, int] = {}
    wiring: list[dict[str, int]] = []
    for position, (entry, stage) in enumerate(zip(entries, stages, strict=True)):
        problems += _use_problems(recipe, position, entry, stage, ids, stages)
        wired = {}
        for name, wanted in stage.inputs.items():
            named = entry.use.get(name)
            if named is not None and (named in ids or named == "source"):
                wired[name] = ids.get(named, SOURCE)
            elif (origin := SOURCE if name == "source" else _newest(wanted, stages[:position])) is not None:
                wired[name] = origin
            elif not wanted.optional and named is None:
                problems.append(_missing(recipe, position, entry, wanted))
        wiring.append(wired)
        if entry.id is not None:
            if entry.id == "source":
                place = recipe.located.place(f"stages.{position}.id")
                problems.append(Diagnostic("the id `source` is taken by the model itself", place, "choose another id"))
            ids[entry.id] = position
    return wiring


def _newest(wanted: Input, earlier: Sequence[Stage]) -> int | None:
    for position in reversed(range(len(earlier))):
        if issubclass(earlier[position].output, wanted.type):
            return position
    return SOURCE if issubclass(Checkpoint, wanted.type) else None


def _missing(recipe: Recipe, position: int, entry: StageEntry, wanted: Input) -> Diagnostic:
    place = recipe.located.place(f"stages.{position}.run")
    kinds = sorted({name.partition("/")[0] for name in lookup.names() if _makes(name, wanted.type)})
    line = f" above line {place.line}" if place else ""
    return Diagnostic(
        f"`{entry.run}` needs {wanted.type.__name__}",
        place,
        f"add a `{' or '.join(kinds)}/...` stage{line}" if kinds else None,
    )


def _makes(name: str, kind: type[Artifact]) -> bool:
    return issubclass(lookup.find(name).output, kind)


def _use_problems(
    recipe: Recipe,
    position: int,
    entry: StageEntry,
    stage: Stage,
    ids: Mapping[str, int],
    stages: Sequence[Stage],
) -> Iterator[Diagnostic]:
    for name, target in entry.use.items():
        path = f"stages.{position}.use.{name}"
        if name not in stage.inputs:
            known = ", ".join(f"`{n}`" for n in stage.inputs) or "nothing"
            yield Diagnostic(
                f"`{stage.name}` has no input `{name}`",
                recipe.located.place(path, key=True),
                f"it takes {known}",
            )
        elif target != "source" and target not in ids:
            known = ", ".join(f"`{n}`" for n in [*ids, "source"])
            yield Diagnostic(
                f"no earlier stage has the id `{target}`", recipe.located.place(path), f"known here: {known}"
            )
        else:
            made = Checkpoint if target == "source" else stages[ids[target]].output
            if not issubclass(made, stage.inputs[name].type):
                wanted = stage.inputs[name].type.__name__
                yield Diagnostic(
                    f"`{target}` makes {made.__name__}, but `{name}` must be {wanted}",
                    recipe.located.place(path),
                )


def _resolve_options(
    options: Sequence[Options], stages: Sequence[Stage], wiring: Sequence[Mapping[str, int]]
) -> list[Options]:
    """Tell each stage what the stages that read its artifact need."""
    needs: list[set[str]] = [set() for _ in stages]
    for stage, opt, wired in zip(stages, options, wiring, strict=True):
        for origin in wired.values():
            if origin != SOURCE:
                needs[origin].update(stage.needs(opt))
    return [opt.resolve(tuple(sorted(wanted))) for opt, wanted in zip(options, needs, strict=True)]


def _step(
    position: int, label: str, stage: Stage, options: Options, inputs: Mapping[str, int],
    steps: Sequence[Step], source: ModelSketch, source_key: str, seed: int, baseline: bool = False,
) -> Step:  # fmt: skip
    keys = {name: source_key if i == SOURCE else steps[i].key for name, i in inputs.items()}
    identity = {
        "stage": stage.name,
        "version": stage.version,
        "options": option_identity(options),
        "inputs": keys,
        "seed": seed,
    }
    return Step(
        position,
        label,
        stage,
        options,
        dict(inputs),
        key_of(identity),
        identity,
        baseline,
        _sketch_before(inputs, steps, source),
    )


def _sketch_before(inputs: Mapping[str, int], steps: Sequence[Step], source: ModelSketch) -> ModelSketch:
    """The model as this step gets it: from its checkpoint input, else from whatever its inputs were made of."""
    made = {i: source if i == SOURCE else steps[i].sketch for i in inputs.values()}
    checkpoints = [i for i in inputs.values() if i == SOURCE or steps[i].writes_weights]
    sketch = made[checkpoints[0]] if checkpoints else next(iter(made.values()), source)
    bits = next((made[i].planned_bits for i in inputs.values() if made[i].planned_bits), None)
    sketch = replace(sketch, planned_bits=bits)
    plans = [made[i] for i in inputs.values() if i != SOURCE and made[i].planned]
    if not plans:
        return replace(sketch, planned=None)
    uneven = sketch.uneven or plans[0].uneven
    return replace(sketch, planned=plans[0].planned, uneven=uneven, within_groups=plans[0].within_groups)


def _on_source(step: Step, source: ModelSketch, source_key: str, steps: Sequence[Step], seed: int) -> Step | None:
    """The same evaluation on the source model, unless that is what it evaluates already."""
    inputs = {
        name: SOURCE if issubclass(step.stage.inputs[name].type, Checkpoint) else i for name, i in step.inputs.items()
    }
    if inputs == step.inputs:
        return None
    return _step(
        step.position,
        f"{step.label} (source)",
        step.stage,
        step.options,
        inputs,
        steps,
        source,
        source_key,
        seed,
        True,
    )


def _waits(step: Step, steps: Sequence[Step], wrong: Collection[int]) -> bool:
    """Whether the step carries out a plan that cannot be made: what it would find wrong only repeats that."""
    origins = [steps[index] for index in step.inputs.values() if index != SOURCE]
    return any(o.position in wrong and issubclass(o.stage.output, ExpertPlan | BitPlan) for o in origins)


def _model_problems(recipe: Recipe, step: Step, steps: Sequence[Step]) -> Iterator[Diagnostic]:
    own = list(step.options.problems(step.sketch.facts))
    for problem in own:
        yield Diagnostic(problem.message, _place(recipe, step.position, problem), problem.hint)
    if any(not problem.option for problem in own):  # the stage has no place here at all
        return
    changes = not issubclass(step.stage.output, CalibrationText | Evaluation)  # statistics are such text
    if changes and step.sketch.config.get(WIDTHS_KEY) and not step.options.any_width:
        yield Diagnostic(
            f"`{step.stage.name}` takes experts of one width, here they differ",
            recipe.located.place(f"stages.{step.position}.run"),
            "write `widths: uniform` in the `slim/...` stage above",
        )
        return
    if step.stage.kind == "eval":  # may look back at what made the model
        return
    yield from _not_collected(recipe, step, steps)
    facts = step.sketch.facts
    for name, index in step.inputs.items():
        kind = step.stage.inputs[name].type
        if index == SOURCE or not issubclass(kind, CalibrationStats | ExpertPlan | BitPlan):
            continue
        seen, made = steps[index].sketch.facts, steps[index].stage.output
        here, there, again = facts.router_rows, seen.router_rows, "calibrate/statistics"
        if issubclass(made, ExpertPlan):
            again = "cluster/..."
        elif issubclass(made, BitPlan):
            here, there, again = facts.experts, seen.experts, "allocate/..."
        if here != there:
            place = recipe.located.place(f"stages.{step.position}.run")
            line = f" above line {place.line}" if place else ""
            yield Diagnostic(
                f"`{name}` comes from a model with {there} experts, the model here has {here}",
                place, f"add a `{again}` stage{line}",
            )  # fmt: skip


def _not_collected(recipe: Recipe, step: Step, steps: Sequence[Step]) -> Iterator[Diagnostic]:
    """Statistics that the stage needs and that the calibration it reads was told to leave out."""
    for name, wanted in step.stage.inputs.items():
        index = step.inputs.get(name, SOURCE)
        if index == SOURCE or wanted.optional or not issubclass(wanted.type, CalibrationStats):
            continue
        found = steps[index].options.collects()
        for missing in [] if found is None else sorted(set(step.stage.needs(step.options)).difference(found)):
            base = f"stages.{steps[index].position}"
            place = recipe.located.place(f"{base}.with.statistics") or recipe.located.place(f"{base}.run")
            yield Diagnostic(
                f"`{step.stage.name}` needs the statistic `{missing}`, which is not collected here", place,
                f"add `{missing}`, or write `statistics: auto`",
            )  # fmt: skip


def _forecast(recipe: Recipe, step: Step) -> tuple[Step, list[Diagnostic]]:
    try:
        return replace(step, sketch=step.options.forecast(step.sketch)), []
    except MoecliError as error:
        place = recipe.located.place(f"stages.{step.position}.run")
        return step, [Diagnostic(error.message, place, error.hint)]


def _place(recipe: Recipe, position: int, problem: Problem) -> Any:
    base = f"stages.{position}"
    if not problem.option:
        return recipe.located.place(f"{base}.run")
    return recipe.located.place(f"{base}.with.{problem.option}") or recipe.located.place(f"{base}.run")


def option_identity(options: Options) -> dict[str, Any]:
    """Options as they enter a key: run settings left out, local files replaced by a digest of their content, and
    whatever the options themselves put in place of their values.
    """
    from moecli.io.sources import digest_path

    values = options.model_dump(mode="json")
    for name, info in type(options).model_fields.items():
        if any(isinstance(mark, RunSetting) for mark in info.metadata):
            del values[name]
        elif any(isinstance(mark, SourcePath) for mark in info.metadata) and values[name] is not None:
            path = Path(values[name]).expanduser()
            if path.exists():
                values[name] = f"sha256:{digest_path(path)}"
    return values | options.identity(digest_path)


def key_of(identity: Mapping[str, Any]) -> str:
    """sha256 over canonical JSON, as hexadecimal."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
