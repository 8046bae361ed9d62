"""Every byte of a model is counted once: from the headers of toy models of each family, whole, packed and merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecli.core.artifacts import Checkpoint, sketch_of
from moecli.families.count import count_of
from moecli.ops.roofline import ModelCount
from tests import tiny
from tests.engine.memory import open_folder
from tests.runner.chains import merged, quantized


def bytes_of(count: ModelCount) -> float:
    layers = count.layers
    return (
        sum(matrix.bytes for layer in layers for matrix in layer.linears)
        + sum(layer.experts * matrix.bytes for layer in layers for matrix in layer.expert)
        + sum(layer.small_bytes for layer in layers)
    )


def bytes_in_layers(model: Checkpoint) -> int:
    names = [name for name in model.names() if name.startswith("model.layers.") and not name.endswith(".alias_map")]
    return sum(model.spec(name).bytes for name in names)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_byte_of_a_layer_is_counted_once(family: str, tiny_model: Any, tmp_path: Path) -> None:
    source = open_folder(tiny_model(family))
    count = count_of(sketch_of(source))
    assert count is not None
    assert bytes_of(count) == bytes_in_layers(source)
    assert count.stored_bytes == sketch_of(source).bytes
    facts = source.facts
    for layer in facts.moe_layers:
        assert count.layers[layer].experts == facts.experts
        inputs = [matrix.inputs for matrix in count.layers[layer].expert]
        assert inputs == [facts.hidden] * (len(inputs) - 1) + [facts.expert_width]
        assert sum(matrix.outputs for matrix in count.layers[layer].expert) == 2 * facts.expert_width + facts.hidden
    assert (count.head.inputs, count.head.outputs) == (facts.hidden, facts.vocab)


def test_the_cache_of_each_kind_of_attention(tiny_model: Any) -> None:
    def widths(family: str) -> list[tuple[int, int | None]]:
        count = count_of(sketch_of(open_folder(tiny_model(family))))
        assert count is not None
        return [(layer.kv_width, layer.window) for layer in count.layers]

    assert widths("qwen3_moe") == [(2 * 2 * 16, None)] * 2
    assert widths("deepseek_v3") == [(16 + 8, None)] * 3
    assert widths("gpt_oss") == [(64, 16), (64, None)]
    assert widths("qwen3_next") == [(0, None), (64, None)]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_packed_weights_keep_their_shapes_and_have_their_own_bytes(
    family: str, tiny_model: Any, tmp_path: Path
) -> None:
    source = open_folder(tiny_model(family))
    packed = quantized(source, tmp_path / "packed", bits=4)
    before, after = count_of(sketch_of(source)), count_of(sketch_of(packed))
    assert before is not None and after is not None
    assert bytes_of(after) == bytes_in_layers(packed) < bytes_of(before)
    planned = sketch_of(packed)
    planned = replace(planned, config={k: v for k, v in planned.config.items() if k != "quantization_config"})
    for found in (after, count_of(planned)):
        assert found is not None
        for old, new in zip(before.layers, found.layers, strict=True):
            assert [m[:2] for m in new.expert] == [m[:2] for m in old.expert]
            assert sorted(m[:2] for m in new.linears) == sorted(m[:2] for m in old.linears)
            assert new.kv_width == old.kv_width


def test_merged_models_have_fewer_experts_to_read(tiny_model: Any, tmp_path: Path) -> None:
    small = merged(open_folder(tiny_model("qwen3_moe")), tmp_path / "merged", 3)
    count = count_of(sketch_of(small))
    assert count is not None
    assert [layer.experts for layer in count.layers] == [3, 3]
    assert bytes_of(count) == bytes_in_layers(small)


def test_without_headers_nothing_is_counted(tiny_model: Any) -> None:
    assert count_of(replace(sketch_of(open_folder(tiny_model("qwen3_moe"))), specs={})) is None
