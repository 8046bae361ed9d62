"""The sweep on a CUDA device against the CPU, and its memory against one layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.engine import sweep as sweep_module
from moecli.engine.collectors import CATALOGUE, collectors
from moecli.engine.data import Batch
from moecli.engine.sweep import sweep
from moecli.families.adapter import load_model
from tests import tiny
from tests.engine.memory import aliased, open_folder
from tests.engine.texts import random_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Maker = Callable[..., Path]
STATISTICS = [name for name in CATALOGUE if name != "count"]


def run(source: Any, batches: list[Batch], device: str) -> tuple[dict[int, Any], list[torch.Tensor]]:
    swept = sweep(source, batches, device=device)
    stats = {s.index: s.observe(collectors(CATALOGUE)) for s in swept if s.is_moe}
    return stats, [logits.float().cpu() for logits in swept.logits()]


def assert_close(left: tuple, right: tuple, rtol: float, atol: float) -> None:
    for layer, stats in left[0].items():
        assert stats.tokens == right[0][layer].tokens
        found, wanted = ({n: side[0][layer][n] for n in STATISTICS} for side in (left, right))
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(left[1], right[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fp32_equals_the_cpu(family: str, tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model(family)), random_batches()
    on_cpu, on_gpu = run(source, batches, "cpu"), run(source, batches, "cuda")
    assert all(torch.equal(s.count_E, on_gpu[0][i].count_E) for i, s in on_cpu[0].items())
    assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_whole_model_on_the_device(family: str, dtype: str, tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model(family, dtype=dtype)), random_batches()
    model = load_model(source, "cuda")
    with torch.no_grad():
        expected = [model(input_ids=b.input_ids.cuda(), attention_mask=b.attention_mask.cuda()).logits for b in batches]
    swept = sweep(source, batches, device="cuda")
    for layer in swept:
        if layer.is_moe:
            layer.observe(collectors(CATALOGUE))
    for found, wanted in zip(swept.logits(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_alias_statistics(tiny_model: Maker) -> None:
    small, _ = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], [0, 1, 1, 2, 3, 0, 0, 4])
    batches = random_batches()
    assert_close(run(small, batches, "cuda"), run(small, batches, "cpu"), rtol=1e-3, atol=1e-3)


def test_two_runs_give_the_same_bytes(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe", dtype="bfloat16")), random_batches()
    assert_close(run(source, batches, "cuda"), run(source, batches, "cuda"), rtol=0, atol=0)


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_memory_is_bounded_by_one_layer(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Eight layers of 64 experts: the peak is about one layer while it is fused, not eight."""
    folder = tiny.make(
        "qwen3_moe", tmp_path, layers=8, experts=64, dtype="bfloat16", hidden_size=512,
        moe_intermediate_size=256,
    )  # fmt: skip
    source, batches = open_folder(folder), random_batches((4,), length=64)
    layer_bytes = sum(source.spec(n).bytes for n in source.names() if n.startswith("model.layers.0."))
    monkeypatch.setattr(sweep_module, "_home", lambda model, batches, device: torch.device(home))
    monkeypatch.setattr(sweep_module, "CHUNK_BYTES", 4 << 20)

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for layer in sweep(source, batches, device="cuda"):
        layer.observe(collectors(["gean_sum", "y_mean"]))
    peak = torch.cuda.max_memory_allocated() - before
    record_property("layer_mib", layer_bytes / 2**20)
    record_property("peak_mib", peak / 2**20)
    assert peak < 2 * layer_bytes + (64 << 20) < 8 * layer_bytes
