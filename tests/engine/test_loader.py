"""What the engine loads is what transformers' own conversion loads, for every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.engine import loader as loader_module
from moecli.engine.data import Batch
from moecli.engine.loader import Loader, Piece, Staging, spans
from moecli.engine.sweep import sweep
from moecli.families import adapter
from moecli.families.slots import Slots
from moecli.io.overlay import OverlayWriter
from tests import tiny
from tests.engine.memory import MemoryCheckpoint, aliased, open_folder
from tests.engine.texts import random_batches

Maker = Callable[..., Path]


def contents(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def loaded(source: Checkpoint, dtype: torch.dtype | None = None) -> list[dict[str, torch.Tensor]]:
    """Every layer, one after the other, as the engine loads it."""
    model = adapter.empty_model(source.config, dtype)
    names = adapter.tensor_map(model, source)
    assert all(Slots(model, source, names).of(layer) is not None for layer in names.layers)
    loader, found = Loader(model, source, names, torch.device("cpu"), ahead=True), []
    for layer in names.layers:
        found.append(contents(loader.load(layer)))
        loader.free(layer)
    loader.close()
    assert all(p.is_meta for p in model.parameters())
    return found


def assert_same(found: list[dict[str, torch.Tensor]], source: Checkpoint, dtype: torch.dtype | None = None) -> None:
    wanted = [contents(layer) for layer in adapter.decoder_layers(adapter.load_model(source, dtype=dtype))[1]]
    assert [layer.keys() for layer in found] == [layer.keys() for layer in wanted]
    for mine, stock in zip(found, wanted, strict=True):
        assert [n for n in mine if mine[n].dtype != stock[n].dtype or not torch.equal(mine[n], stock[n])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str, dtype: str, tiny_model: Maker) -> None:
    source = open_folder(tiny_model(family, dtype=dtype))
    assert_same(loaded(source), source)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_another_dtype(family: str, tiny_model: Maker) -> None:
    source = open_folder(tiny_model(family))
    assert_same(loaded(source, torch.bfloat16), source, torch.bfloat16)


def test_alias_layers(tiny_model: Maker) -> None:
    small, _ = aliased(open_folder(tiny_model("mixtral")), [0, 3, 5], [0, 1, 1, 2, 2, 0, 0, 1])
    assert_same(loaded(small), small)


def test_an_overlay(tiny_model: Maker, tmp_path: Path) -> None:
    source = open_folder(tiny_model("qwen3_moe"))
    first, second = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (2, 5))
    with OverlayWriter(tmp_path / "overlay", source) as out:
        out.part("swap", lambda part: (part.put(first, source.get(first) * 2), part.rename(second, first)))
    assert out.checkpoint.entry(second) == source.entry(first)
    assert_same(loaded(out.checkpoint), out.checkpoint)


@pytest.mark.parametrize("span_bytes", [1 << 10, 20_000, 16 << 20])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_spans_land_in_their_places(
    family: str, span_bytes: int, tiny_model: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that run on CUDA, on the CPU; small spans cut tensors, large ones join them."""
    monkeypatch.setattr(loader_module, "SPAN_BYTES", span_bytes)
    source = open_folder(tiny_model(family))
    model = adapter.empty_model(source.config, torch.bfloat16)
    names = adapter.tensor_map(model, source)
    loader, found = Loader(model, source, names, torch.device("cpu"), ahead=False), []
    loader._staging, loader._ahead = Staging(torch.device("cpu")), True
    for layer in names.layers:
        found.append(contents(loader.load(layer)))
    loader.close()
    assert_same(found, source, torch.bfloat16)


def test_spans_join_what_lies_side_by_side(tiny_model: Maker) -> None:
    source = open_folder(tiny_model("qwen3_moe"))
    names = sorted(source.names(), key=lambda name: source.entry(name).start)
    pieces = [Piece(source.entry(n), 0, torch.empty(source.spec(n).numel)) for n in names]
    assert [len(span) for span in spans(pieces[::-1])] == [len(names)]
    left = [len(span) for span in spans(pieces[:3] + pieces[4:9])]
    assert left == [3, 5]


def test_computed_tensors_are_sent_too(tiny_model: Maker) -> None:
    source = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    name, target = "model.norm.weight", torch.empty(64, dtype=torch.bfloat16)
    staging = Staging(torch.device("cpu"))
    for job in staging.send(source, [(name, None, target.view(-1))]):
        job.result()
    staging.close()
    assert torch.equal(target, source.get(name).bfloat16())


def test_other_layouts_go_through_the_conversion(tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe")), random_batches((1,))
    expected = [layer.outputs()[0] for layer in sweep(source, batches)]
    monkeypatch.setattr(Slots, "of", lambda self, layer: None)
    found = [layer.outputs()[0] for layer in sweep(source, batches)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.experts.3.up_proj.weight"])
def test_missing_tensors_are_named(name: str, tiny_model: Maker) -> None:
    source = MemoryCheckpoint.of(open_folder(tiny_model("qwen3_moe")))
    del source.tensors[f"model.layers.1.{name}"]
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(SurroundingsError, match="the checkpoint does not fit `qwen3_moe`: 1 tensor"):
        for _ in sweep(source, [Batch(ids, ids)]):
            pass
