"""A stage called by hand: options, artifacts, and a context that keeps what it was told."""

from __future__ import annotations

import pytest
import torch

from moecli.families import facts_of
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.io.store import SharedParts, StageFolder


class HandContext:
    """The Context of a stage that runs in a test."""

    device = torch.device("cpu")
    seed = 0

    def __init__(self, folder):
        self.folder = StageFolder(folder)
        self.folder.begin()
        self.rng = torch.Generator().manual_seed(0)
        self.notes, self.records = [], {}
        self.input_keys = {"model": "0123456789abcdef"}
        self.parts = SharedParts(folder.parent / "parts")

    def part(self, name, kind, make):
        return self.folder.part(name, kind, make)

    def has_part(self, name):
        return self.folder.has_part(name)

    def shared_part(self, key, kind, make):
        return self.parts.part(key, kind, make)

    def has_shared_part(self, key):
        return self.parts.has(key)

    def track(self, items, label):
        return iter(items)

    def progress(self, label, done, total):
        pass

    def note(self, text):
        self.notes.append(text)

    def record(self, name, value):
        self.records[name] = value

    def writer(self, parent, config=None):
        return OverlayWriter(self.folder.work, parent, config)

    def finish(self, parent):
        """The checkpoint the stage wrote, as a later stage reads it."""
        self.folder.finish({})
        return OverlayCheckpoint(self.folder.path, parent)


@pytest.fixture
def context(tmp_path):
    """`context("name")`: a fresh context with a folder of its own."""
    return lambda name="stage": HandContext(tmp_path / "stages" / "prune-test" / name)


@pytest.fixture
def checkpoint(tiny_model):
    """`checkpoint("mixtral")`: an open toy model."""
    return lambda model_type="qwen3_moe", **options: FolderCheckpoint(tiny_model(model_type, **options), facts_of)
