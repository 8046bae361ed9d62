"""The fused pass, run on the CPU through its PyTorch twins, gives the stock modules' hidden states and statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.engine import fused as fused_module
from moecli.engine.collectors import FORWARD, collectors
from moecli.engine.fused import fused
from moecli.engine.sweep import sweep
from moecli.families.adapter import load_model, moe_parts
from tests import tiny
from tests.engine import oracle
from tests.engine.memory import aliased, open_folder
from tests.engine.texts import random_batches

Maker = Callable[..., Path]
PLAIN = [
    "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "phimoe", "granitemoe",
    "ernie4_5_moe", "minimax_m2", "lfm2_moe", "qwen3_next",
]  # fmt: skip


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused pass on any device and in any dtype."""
    monkeypatch.setattr(fused_module, "suits", lambda tensor: True)


def observed(source: Any, batches: list[Any]) -> tuple[dict[int, Any], list[torch.Tensor]]:
    swept = sweep(source, batches)
    stats = {s.index: s.observe(collectors(FORWARD)) for s in swept if s.is_moe}
    return stats, list(swept.logits())


def test_which_families_it_fits(tiny_model: Maker, everywhere: None) -> None:
    fits = []
    for family in tiny.FAMILIES:
        layers = load_model(open_folder(tiny_model(family))).model.layers
        parts = moe_parts(layers[-1])
        with fused(layers[-1], parts, keep=False) as fast:
            fits += [family] if fast.experts is not None else []
        assert not any("forward" in vars(module) for module in layers.modules())
    assert fits == [family for family in tiny.FAMILIES if family in PLAIN]


def test_it_stays_away_from_the_cpu(tiny_model: Maker) -> None:
    layer = load_model(open_folder(tiny_model("qwen3_moe", dtype="bfloat16"))).model.layers[0]
    with fused(layer, moe_parts(layer), keep=False) as fast:
        assert fast.experts is None
        assert not any("forward" in vars(module) for module in layer.modules())


@pytest.mark.parametrize("family", PLAIN)
def test_statistics_equal_a_loop_over_tokens(family: str, tiny_model: Maker, everywhere: None) -> None:
    source, batches = open_folder(tiny_model(family)), random_batches((3, 1), length=16)
    model = load_model(source)
    expected = oracle.statistics(model, source, batches)
    found, logits = observed(source, batches)
    for layer, stats in found.items():
        assert stats.tokens == int(expected[layer].pop("tokens")) == 61
        oracle.assert_same(stats, expected[layer], f"layer {layer}")
    with torch.no_grad():
        whole = [model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in batches]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(2,), (3, 1)])
def test_alias_statistics(lengths: tuple[int, ...], tiny_model: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], [0, 1, 1, 2, 3, 0, 0, 4])
    batches = random_batches(lengths)
    expected, whole = observed(small, batches)
    monkeypatch.setattr(fused_module, "suits", lambda tensor: True)
    found, logits = observed(small, batches)
    for layer, stats in expected.items():
        assert torch.equal(found[layer].count_E, stats.count_E)
        for name in FORWARD:
            torch.testing.assert_close(found[layer][name], stats[name], rtol=1e-4, atol=2e-5, msg=f"{layer} {name}")
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_norms_that_scale_by_one_plus_weight_stay_stock(tiny_model: Maker, everywhere: None) -> None:
    layer = load_model(open_folder(tiny_model("qwen3_next"))).model.layers[0]
    norm = layer.input_layernorm
    assert type(norm).__name__.endswith("RMSNorm")
    with fused(layer, moe_parts(layer), keep=False):
        assert "forward" not in vars(norm)


@pytest.mark.parametrize(("family", "early"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_plain_norms_are_replaced_and_round_where_the_stock_ones_do(
    family: str, early: bool, tiny_model: Maker, everywhere: None
) -> None:
    layer = load_model(open_folder(tiny_model(family, dtype="bfloat16"))).model.layers[0]
    norm = layer.input_layernorm
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = norm(x)
    with fused(layer, moe_parts(layer), keep=False):
        assert "forward" in vars(norm)
        assert fused_module._EARLY[type(norm)] is early
        assert (norm(x) != wanted).float().mean() < 0.02


@pytest.fixture(autouse=True)
def nothing_tried_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "_EARLY", {})
