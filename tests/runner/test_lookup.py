"""A stage's name is its path; outside packages add theirs by entry point."""

import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pytest

from moecli.core.artifacts import Checkpoint
from moecli.core.context import Context
from moecli.core.errors import UsageError
from moecli.core.stage import KINDS, Options, stage
from moecli.runner import lookup


def test_every_file_of_a_kind_is_a_stage_of_that_name():
    for name in lookup.names():
        assert lookup.find(name).name == name
        assert lookup.source_path(name).is_file()


def test_names_come_in_recipe_order():
    kinds = [name.partition("/")[0] for name in lookup.names()]
    assert kinds == sorted(kinds, key=KINDS.index)


def test_listing_imports_no_method_and_no_torch():
    code = (
        "import sys; from moecli.runner import lookup; [lookup.summary(n) for n in lookup.names()]; "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('moecli.methods.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_near_miss_is_named():
    with pytest.raises(UsageError, match="unknown stage `prune/reep`") as caught:
        lookup.find("prune/reep")
    assert caught.value.hint == "did you mean `prune/reap`?"


class Nothing(Options):
    """No options."""


@stage("prune/outside", version=1)
def outside(opt: Nothing, model: Checkpoint, ctx: Context) -> Checkpoint:
    return model


def test_outside_packages_register_by_entry_point(monkeypatch):
    module = types.ModuleType("outside_package")
    module.outside = outside
    monkeypatch.setitem(sys.modules, "outside_package", module)
    point = EntryPoint("prune/outside", "outside_package", lookup.ENTRY_POINT_GROUP)
    monkeypatch.setattr(lookup, "entry_points", lambda group: [point])
    for cached in (lookup._outside, lookup.names):
        cached.cache_clear()
    try:
        assert "prune/outside" in lookup.names()
        assert lookup.find("prune/outside") is outside
    finally:
        monkeypatch.undo()
        for cached in (lookup._outside, lookup.names):
            cached.cache_clear()
