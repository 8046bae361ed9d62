"""The memory plan, where hidden states wait, and what happens when memory does not suffice."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.errors import StageFailed, SurroundingsError
from moecli.engine import memory
from moecli.engine.collectors import FORWARD, collectors
from moecli.engine.memory import Plan, Shelf, Sizes, choose, sizes_of
from moecli.engine.sweep import SweptLayer, sweep
from moecli.families import adapter
from tests.engine.memory import open_folder
from tests.engine.texts import random_batches

Maker = Callable[..., Path]
CPU = torch.device("cpu")
SIZES = Sizes(layer=100, states=50, sequence=20, batch=8)


@pytest.mark.parametrize(
    ("on_device", "in_memory", "expected"),
    [
        (None, 1000, Plan("memory", 8, False, 50)),
        (None, 150, Plan("file", 8, False, 50)),
        (1000, 1000, Plan("device", 8, True, 50)),
        (500, 1000, Plan("device", 6, True, 50)),
        (360, 1000, Plan("pinned", 5, True, 50)),
        (360, 150, Plan("file", 5, True, 50)),
        (200, 1000, Plan("pinned", 3, False, 50)),
        (100, 1000, Plan("pinned", 1, False, 50)),
    ],
)
def test_the_plan_for_free_memory(on_device: int | None, in_memory: int, expected: Plan) -> None:
    assert choose(SIZES, on_device, in_memory) == expected


def test_statistics_take_their_room_first() -> None:
    sizes = Sizes(layer=100, states=50, sequence=20, batch=8, statistics=150)
    assert choose(sizes, 1000, 1000) == Plan("device", 8, True, 50, 150)
    assert choose(sizes, 600, 1000) == Plan("pinned", 8, True, 50, 150)
    assert choose(sizes, 400, 1000) == Plan("pinned", 4, False, 50, 150)
    assert choose(sizes, None, 1000) == Plan("memory", 8, False, 50)
    with pytest.raises(SurroundingsError, match=r"one layer and its statistics need 0.0 GiB of GPU memory") as caught:
        choose(sizes, 249, 1000)
    assert "`*_cov`" in caught.value.hint


def test_matrices_of_experts_are_counted(tiny_model: Maker) -> None:
    source = open_folder(tiny_model("qwen3_moe"))
    model, facts = adapter.empty_model(source.config), source.facts
    held = [
        sizes_of(model, facts, random_batches(), names).statistics for names in ((), ("x_cov",), ("h_cov", "count"))
    ]
    assert held == [0, 8 * 64 * 64 * 4, 8 * 32 * 32 * 4 + 8 * 8]
    assert str(Plan("device", 4, False, 0, 1 << 30)).endswith("at a time, 1.00 GiB for statistics")


def test_a_plan_is_a_line_for_the_report() -> None:
    line = "hidden states in pinned CPU memory (2 x 1.50 GiB), at most 4 sequences at a time, the next layer read ahead"
    assert str(Plan("pinned", 4, True, 3 << 29)) == line
    line = "hidden states in a memory-mapped file (2 x 1.00 GiB), at most 1 sequence at a time"
    assert str(Plan("file", 1, False, 1 << 30)) == line


def test_sizes_come_from_config_and_text(tiny_model: Maker) -> None:
    source = open_folder(tiny_model("qwen3_moe", dtype="bfloat16"))
    found = sizes_of(adapter.empty_model(source.config), source.facts, random_batches((3, 2), length=20))
    stored = sum(source.spec(name).bytes for name in source.names() if name.startswith("model.layers.0."))
    assert (found.layer, found.states, found.batch) == (stored, 5 * 20 * 64 * 2, 3)


def test_a_mapped_file_holds_both_sides() -> None:
    shelf = Shelf("file", CPU, states=1 << 10)
    one, two = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    before = shelf.put(0, one)
    shelf.turn()
    after = shelf.put(0, two)
    assert torch.equal(before, one)
    assert torch.equal(after, two)
    shelf.turn()
    assert shelf.put(0, one).data_ptr() == before.data_ptr()
    folder = Path(shelf._folder.name)
    assert len(list(folder.iterdir())) == 2
    shelf.close()
    assert not folder.exists()


def test_a_full_disk_is_told_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = memory.shutil.disk_usage("/")._replace(free=1 << 30)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SurroundingsError, match=r"hidden states need 4.0 GiB in `.*`, 1.0 GiB are free"):
        Shelf("file", CPU, states=2 << 30)


def run(source: Any, **options: Any) -> tuple[list[Any], list[torch.Tensor], Any]:
    swept = sweep(source, random_batches((4, 3)), **options)
    stats = [layer.observe(collectors(FORWARD)) for layer in swept if layer.is_moe]
    return stats, list(swept.logits()), swept


def assert_close(found: tuple, wanted: tuple) -> None:
    for mine, stats in zip(found[0], wanted[0], strict=True):
        assert mine.tokens == stats.tokens
        assert torch.equal(mine.count_E, stats.count_E)
        for name in FORWARD:
            torch.testing.assert_close(mine[name], stats[name], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


def test_states_in_a_file_change_no_bit(tiny_model: Maker) -> None:
    source = open_folder(tiny_model("qwen3_moe"))
    (stats, logits, swept), (expected, whole, _) = run(source, plan=Plan("file", 8, False, 1 << 20)), run(source)
    assert swept.report() == [
        "hidden states in a memory-mapped file (2 x 0.00 GiB), at most 8 sequences at a time",
    ]
    assert all(torch.equal(a, b) for a, b in zip(logits, whole, strict=True))
    for mine, other in zip(stats, expected, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in FORWARD)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_micro_batches_change_nothing(family: str, tiny_model: Maker) -> None:
    source = open_folder(tiny_model(family))
    assert_close(run(source, plan=Plan("memory", 2, False, 0)), run(source))


class TooSmall:
    """A device that takes at most so many sequences from a layer on."""

    def __init__(self, sequences: int, layer: int) -> None:
        self.sequences, self.layer, self.stock = sequences, layer, SweptLayer._forward

    def forward(self, layer: SweptLayer, index: int) -> torch.Tensor:
        if layer.index >= self.layer and len(layer._flow.hidden[index]) > self.sequences:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.stock(layer, index)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_out_of_memory_halves_the_micro_batch(family: str, tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_folder(tiny_model(family))
    wanted = run(source)
    assert wanted[2].report() == []
    small = TooSmall(sequences=1, layer=1)
    monkeypatch.setattr(SweptLayer, "_forward", lambda layer, index: small.forward(layer, index))
    found = run(source)
    assert_close(found, wanted)
    assert found[2].report() == [
        "layer 1 ran out of memory; from there at most 2 sequences at a time",
        "layer 1 ran out of memory; from there at most 1 sequence at a time",
    ]


def test_out_of_memory_with_one_sequence_is_the_end(tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    small = TooSmall(sequences=0, layer=1)
    monkeypatch.setattr(SweptLayer, "_forward", lambda layer, index: small.forward(layer, index))
    with pytest.raises(StageFailed, match="out of memory with one sequence at a time") as caught:
        run(open_folder(tiny_model("qwen3_moe")))
    assert caught.value.where == "layer 1"


def test_a_disk_that_is_full_is_said_before_anything_is_mapped(monkeypatch):
    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    shelf = Shelf("file", torch.device("cpu"))
    with pytest.raises(SurroundingsError, match=r"moecli-states-.*` needs 3.7e-06 GiB, .* free"):
        shelf.put(0, torch.ones(1000))
    shelf.close()
