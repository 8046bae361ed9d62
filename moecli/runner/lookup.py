"""Stage names and where they live: a name is a path, so nothing is scanned and nothing imported until asked for."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from moecli.core.errors import UsageError
from moecli.core.stage import KINDS, Stage

ENTRY_POINT_GROUP = "moecli.methods"
_METHODS = Path(__file__).parent.parent / "methods"


@cache
def _outside() -> dict[str, EntryPoint]:
    """Stages of other packages: entry points named "kind/name" in the group `moecli.methods`."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


@cache
def names() -> tuple[str, ...]:
    """Every stage name, kinds in recipe order, names in alphabetical order; nothing is imported."""
    inside = [
        f"{kind}/{file.stem.replace('_', '-')}"
        for kind in KINDS
        for file in sorted((_METHODS / kind).glob("*.py"))
        if not file.stem.startswith("_")
    ]
    found = dict.fromkeys([*inside, *_outside()])
    return tuple(sorted(found, key=lambda name: (_kind_order(name), name)))


def _kind_order(name: str) -> int:
    kind = name.partition("/")[0]
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def module_name(name: str) -> str:
    """`cluster/hc-smoe` -> `moecli.methods.cluster.hc_smoe`, or the module an entry point names."""
    if name in _outside():
        return _outside()[name].module
    return "moecli.methods." + name.replace("/", ".").replace("-", "_")


def find(name: str) -> Stage:
    """The stage of that name. Raises UsageError with the nearest name when there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "`moecli methods` lists them"
        raise UsageError(f"unknown stage `{name}`", hint=hint)
    return _stage_in(importlib.import_module(module_name(name)), name)


def _stage_in(module: ModuleType, name: str) -> Stage:
    for value in vars(module).values():
        if isinstance(value, Stage) and value.name == name:
            return value
    raise TypeError(f"{module.__name__} defines no stage named `{name}`")


def source_path(name: str) -> Path:
    """The file a stage lives in; nothing of ours is imported."""
    if name not in _outside():
        return _METHODS / f"{name.replace('-', '_')}.py"
    spec = importlib.util.find_spec(module_name(name))
    if spec is None or spec.origin is None:
        raise TypeError(f"stage `{name}` has no source file")
    return Path(spec.origin)


def docstring(name: str) -> str:
    """The module docstring of a stage, read without importing it."""
    return ast.get_docstring(ast.parse(source_path(name).read_text(encoding="utf-8"))) or ""


def summary(name: str) -> str:
    """First line of the stage's documentation, read without importing it."""
    return docstring(name).partition("\n")[0]
