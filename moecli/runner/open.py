"""From a recipe file to a plan and an open source model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moecli.core.artifacts import Checkpoint, sketch_of
from moecli.families import facts_of, family_of
from moecli.io.reader import FolderCheckpoint
from moecli.io.sources import Source, resolve
from moecli.recipe.schema import Recipe, load
from moecli.runner import lookup
from moecli.runner.plan import Plan, make_plan


@dataclass(frozen=True, slots=True)
class OpenedRecipe:
    """A plan with the model it starts from."""

    plan: Plan
    source: Checkpoint
    origin: Source


def load_recipe(path: Path | str, sets: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file. Raises RecipeError with every problem that needs no model."""
    return load(path, lambda name: lookup.find(name).options, lookup.names(), sets)


def open_recipe(path: Path | str, sets: Sequence[str] = ()) -> OpenedRecipe:
    """Read a recipe, open its model (headers only) and make the plan.

    Raises RecipeError for what is wrong with the recipe and SurroundingsError for what is wrong with the model.
    """
    return open_loaded(load_recipe(path, sets))


def open_loaded(recipe: Recipe) -> OpenedRecipe:
    """As `open_recipe`, for a recipe that is validated already."""
    origin, source = open_model(recipe.model, recipe.revision)
    plan = make_plan(recipe, sketch_of(source), origin.digest)
    return OpenedRecipe(plan, source, origin)


def open_model(name: str, revision: str | None = None) -> tuple[Source, FolderCheckpoint]:
    """Find a model (folder, hub id or `demo`) and read its headers.

    Raises SurroundingsError when files are missing or damaged, when tensors contradict `config.json`, or when
    transformers refuses it.
    """
    from moecli.families.adapter import parse_config

    origin = resolve(name, revision)
    source = FolderCheckpoint(origin.folder, facts_of)
    family_of(source.config).check(source)
    parse_config(source.config)
    return origin, source
