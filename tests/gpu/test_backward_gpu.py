"""The way back on a CUDA device against the CPU, its kernels against their twins, and its memory against one layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.engine import fused as fused_module
from moecli.engine.backward import Room, backward_sweep
from moecli.engine.collectors.gradients import GRADIENTS
from moecli.engine.data import Batch
from moecli.engine.memory import Plan
from tests import tiny
from tests.engine.memory import aliased, open_folder
from tests.engine.texts import random_batches
from tests.ops.gradient_cases import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Maker = Callable[..., Path]
NAMES = tuple(kind.name for kind in GRADIENTS)


def run(source: Any, batches: list[Batch], device: str, **options: Any) -> tuple[float, dict[int, Any]]:
    swept = backward_sweep(source, batches, device=device, **options)
    stats = {s.index: s.observe(kind() for kind in GRADIENTS) for s in swept.back() if s.is_moe}
    return swept.loss, dict(sorted(stats.items()))


def apart(found: dict[int, Any], wanted: dict[int, Any]) -> float:
    """Largest relative difference of a statistic of a layer, by its norm."""
    return max(
        float((found[i][name] - wanted[i][name]).norm() / wanted[i][name].norm()) for i in wanted for name in NAMES
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_their_twins(dtype: torch.dtype) -> None:
    from moecli.ops.kernels import gradients as fast

    compare(fast, dtype, "cuda")
    compare(fast, dtype, "cuda", visits=61, width=768)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fp32_equals_the_cpu(family: str, tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model(family)), random_batches()
    on_cpu, on_gpu = run(source, batches, "cpu"), run(source, batches, "cuda")
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-5)
    assert all(torch.equal(s.count_E, on_gpu[1][i].count_E) for i, s in on_cpu[1].items())
    assert apart(on_gpu[1], on_cpu[1]) < 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_bf16_is_near_the_pass_without_our_kernels(
    family: str, tiny_model: Maker, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    source, batches = open_folder(tiny_model(family, dtype="bfloat16")), random_batches((4, 4))
    found = run(source, batches, "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(fused_module, "suits", lambda tensor: False)
        wanted = run(source, batches, "cuda")
    record_property("apart", apart(found[1], wanted[1]))
    assert found[0] == pytest.approx(wanted[0], rel=2e-3)
    assert apart(found[1], wanted[1]) < 0.1


def test_an_alias_model_in_bf16(tiny_model: Maker) -> None:
    alias = [0, 1, 1, 2, 3, 0, 0, 4]
    small, _ = aliased(open_folder(tiny_model("qwen3_moe", dtype="bfloat16")), [6, 1, 3, 4, 7], alias)
    found, wanted = (run(small, random_batches((4,)), device)[1] for device in ("cuda", "cpu"))
    assert apart(found, wanted) < 0.1


def test_the_same_bytes_on_every_run_and_wherever_states_wait(tiny_model: Maker) -> None:
    source, batches = open_folder(tiny_model("qwen3_moe", dtype="bfloat16")), random_batches((4, 3))
    first = run(source, batches, "cuda", plan=Plan("device", 2, True, 1 << 20))
    size = 2 * 20 * tiny.HIDDEN * 2
    for home, room in (("device", Room(1 << 30, 0)), ("pinned", Room(size, 2 * size)), ("file", Room(0, 0))):
        other = run(source, batches, "cuda", plan=Plan(home, 2, True, 1 << 20), room=room)
        assert other[0] == first[0]
        assert all(torch.equal(other[1][i][name], first[1][i][name]) for i in first[1] for name in NAMES)


def test_memory_is_bounded_by_layers_not_by_depth(tmp_path: Path, record_property: Any) -> None:
    peaks = []
    batches = random_batches((4,), length=64)
    for layers in (2, 8):
        folder = tiny.make(
            "qwen3_moe", tmp_path / str(layers), layers=layers, experts=64, dtype="bfloat16", hidden_size=512,
            moe_intermediate_size=256,
        )  # fmt: skip
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(open_folder(folder), batches, "cuda", plan=Plan("device", 4, True, 1 << 20), room=Room(0, 1 << 30))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    record_property("peak_mib", [peak / 2**20 for peak in peaks])
    assert peaks[1] < peaks[0] * 1.05 + (1 << 20)
