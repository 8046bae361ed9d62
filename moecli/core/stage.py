"""A stage is a typed function: options and artifacts in, one artifact out.

@stage("prune/reap", version=1, needs=("gean_sum",))
def reap(opt: Reap, stats: CalibrationStats, model: Checkpoint, ctx: Context) -> Checkpoint: ...

Inputs are matched by type: the newest earlier artifact of that type in the recipe (`use:` overrides).
An input annotated `X | None` is optional.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from moecli.core.artifacts import Artifact
from moecli.core.context import Context
from moecli.core.errors import Problem
from moecli.core.model import ModelFacts, ModelSketch

KINDS = (
    "calibrate", "cluster", "prune", "merge", "slim", "allocate", "router",
    "quantize", "compensate", "recover", "encode", "eval",
)  # fmt: skip
"""Kinds of stage in the order recipes usually use them; each is a folder under `moecli/methods/`."""


class RunSetting:
    """Marks an option that does not change the result (`Annotated[int, RunSetting()]`): never part of a key."""


class SourcePath:
    """Marks an option that may name a local file or folder: the key holds a digest of its content, not its name."""


class Options(BaseModel):
    """Options of one stage: frozen, strict, no unknown names. Each field's docstring is its documentation."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    any_width: ClassVar[bool] = False
    """Whether a stage that decides on experts or writes them takes a model whose experts differ in width."""

    def resolve(self, needs: tuple[str, ...]) -> Self:
        """These options with what depends on later stages written out; `needs` are their statistics, sorted."""
        return self

    def identity(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Values that enter the key in place of some options' own; `digest` gives the sha256 of a file or folder."""
        return {}

    def collects(self) -> Collection[str] | None:
        """Of a calibration: names of the statistics it will hold; None when not known."""
        return None

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        """What cannot work for this model, from facts alone. Facts are those at this point of the recipe."""
        return iter(())

    def ready(self) -> None:
        """Raise SurroundingsError when this machine lacks something the stage needs: a package, a file, a task.

        Asked of every stage that will run before the first one starts, so that the last does not fail hours later.
        """

    def forecast(self, model: ModelSketch) -> ModelSketch:
        """The model after this stage, without reading a weight. The default changes nothing.

        Raises MoecliError for what only tensor shapes can tell; the runner points it at this stage.
        """
        return model


@dataclass(frozen=True, slots=True)
class Input:
    """One artifact a stage takes."""

    type: type[Artifact]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A registered stage. Made by `@stage`; still callable as the function it wraps."""

    name: str
    version: int
    """Raised when the same inputs give different results."""
    options: type[Options]
    inputs: Mapping[str, Input]
    output: type[Artifact]
    run: Callable[..., Artifact]
    needs: Callable[[Options], tuple[str, ...]]
    """Calibration statistics this stage reads, by catalogue name."""
    on_source_too: bool
    """True for evaluations: the runner also runs the stage on the source model, for comparison."""
    every_rank: bool = False
    """True when a run in several processes calls the stage in all of them (`engine.ranks`); else the first runs it and
    the others wait."""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Artifact:
        return self.run(*args, **kwargs)


def stage(
    name: str,
    *,
    version: int,
    needs: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = (),
    on_source_too: bool = False,
    every_rank: bool = False,
) -> Callable[[Callable[..., Artifact]], Stage]:
    """Register a function as the stage `name` ("kind/method", also its file's path).

    Raises TypeError when the signature is not (opt: Options, <artifacts>, ctx: Context) -> Artifact.
    """
    if name.partition("/")[0] not in KINDS:
        raise TypeError(f"stage `{name}`: the kind must be one of {', '.join(KINDS)}")

    def register(run: Callable[..., Artifact]) -> Stage:
        hints = typing.get_type_hints(run)
        output = hints.pop("return", None)
        parameters = list(inspect.signature(run).parameters)
        if parameters[:1] != ["opt"] or parameters[-1:] != ["ctx"] or hints["ctx"] is not Context:
            raise TypeError(f"stage `{name}`: expected (opt, <artifacts>, ctx: Context)")
        if not (isinstance(hints["opt"], type) and issubclass(hints["opt"], Options)):
            raise TypeError(f"stage `{name}`: `opt` must be annotated with an Options class")
        if not (isinstance(output, type) and issubclass(output, Artifact)):
            raise TypeError(f"stage `{name}`: it must be annotated to return an Artifact")
        inputs = {p: _input(name, p, hints[p]) for p in parameters[1:-1]}
        wanted = needs if callable(needs) else (lambda _: needs)
        return Stage(name, version, hints["opt"], inputs, output, run, wanted, on_source_too, every_rank)

    return register


def _input(stage_name: str, parameter: str, annotation: Any) -> Input:
    optional = False
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        optional, annotation = len(members) == 1, members[0]
    if not (isinstance(annotation, type) and issubclass(annotation, Artifact)):
        raise TypeError(f"stage `{stage_name}`: `{parameter}` must be annotated with an Artifact class")
    return Input(annotation, optional)
