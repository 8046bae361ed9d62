"""Routing analysis against the whole model, hooks and loops."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.core.errors import UsageError
from moecli.engine.analysis import LRU, Settings, analyse, expert_bytes
from moecli.families import adapter, expert_forward, family_of
from moecli.ops.locality import cache_hits
from moecli.ops.super_experts import super_experts
from tests.engine.memory import aliased, open_folder
from tests.runner.chains import quantized

Maker = Callable[..., Path]
SMALL = Settings(windows=(2, 4), cache_samples=4, pooled_samples=2)


def text(samples: int = 4, tokens: int = 12, seed: int = 0) -> CalibrationText:
    ids = torch.randint(3, 40, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    return CalibrationText(ids, torch.ones_like(ids), f"{seed}")


def inputs_of(source: Checkpoint, ids_NT: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each MoE block is given, [N T, D], by the whole model."""
    model, family = adapter.load_model(source), family_of(source.config)
    seen: dict[int, torch.Tensor] = {}
    for layer in source.facts.moe_layers:
        block = model.get_submodule(family.moe_block(layer))
        block.register_forward_pre_hook(lambda _, args, layer=layer: seen.__setitem__(layer, args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids_NT, use_cache=False)
    return seen


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_every_number_is_that_of_a_loop_over_tokens(model_type: str, tiny_model: Maker) -> None:
    source, both = open_folder(tiny_model(model_type)), {"a": text(), "b": text(3, seed=1)}
    family, facts = family_of(source.config), source.facts
    ids_NT = torch.cat([one.ids for one in both.values()])
    found = analyse(source, both, SMALL, batch_size=2).document
    absmax = {}
    for layer, x_TD in inputs_of(source, ids_NT).items():
        mine = found["layers"][layer]
        routing = family.route_tokens(source, layer, x_TD)
        weights = [family.read_expert(source, layer, e) for e in range(facts.experts)]
        count, gates, largest, first, seen = Counter(), Counter(), Counter(), Counter(), set()
        for t, (gate, experts) in enumerate(zip(*(t.tolist() for t in routing), strict=True)):
            for e, g in zip(experts, gate, strict=True):
                top = float(expert_forward(family, weights[e], x_TD[t : t + 1]).abs().max())
                count[e] += 1
                gates[e] += g
                largest[e] = max(largest[e], top)
                if (t // 12, e) not in seen:
                    first[e] = max(first[e], top)
                seen.add((t // 12, e))
        assert mine["count"] == [count[e] for e in range(facts.experts)]
        assert mine["frequency"] == pytest.approx([count[e] / (84 * facts.top_k) for e in range(facts.experts)])
        assert mine["absmax"] == pytest.approx([largest[e] for e in range(facts.experts)], rel=1e-4)
        assert mine["absmax_first"] == pytest.approx([first[e] for e in range(facts.experts)], rel=1e-4)
        for e in range(facts.experts):
            assert mine["mean_gate"][e] == (pytest.approx(gates[e] / count[e], rel=1e-4) if count[e] else None)
        p_TE = family.router_logits(source, layer, x_TD).softmax(-1).double()
        entropy = -(p_TE * p_TE.log()).sum(-1).mean() / math.log(facts.experts)
        assert mine["routing_entropy"] == pytest.approx(float(entropy), rel=1e-4)
        assert mine["top_k_mass"] == pytest.approx(float(p_TE.topk(facts.top_k).values.sum(-1).mean()), rel=1e-4)
        absmax[layer] = torch.tensor(mine["absmax"])
        by_weight = routing.experts_Tk.gather(1, routing.weights_Tk.argsort(dim=-1, descending=True, stable=True))
        trace = by_weight.reshape(7, 12, -1)[[0, 2, 4, 6]].numpy()
        assert found["locality"]["cache"]["layers"][layer][LRU] == pytest.approx(
            cache_hits(trace, facts.experts, 0).rate_NE.mean(0).tolist()
        )
    assert found["super_experts"] == super_experts(absmax, facts.layers)
    assert json.loads(json.dumps(found, allow_nan=False))["top_k"] == facts.top_k


def test_several_texts_are_told_apart(tiny_model: Maker) -> None:
    found = analyse(open_folder(tiny_model("qwen3_moe")), {"a": text(), "b": text(3, seed=1)}, SMALL).document
    layer = found["layers"][0]
    assert {name for name in layer["domain"] if name} <= {"a", "b"}
    assert set(found["locality"]["srp"]["model"]["2"]["texts"]) == {"a", "b"}
    alone = analyse(open_folder(tiny_model("qwen3_moe")), {"b": text(3, seed=1)}, SMALL).document
    assert found["locality"]["srp"]["model"]["2"]["texts"]["b"] == alone["locality"]["srp"]["model"]["2"] | {
        name: pytest.approx(alone["locality"]["srp"]["model"]["2"][name]) for name in ("low", "high")
    }
    assert "domain" not in alone["layers"][0]


def test_merged_experts_are_counted_as_stored(tiny_model: Maker) -> None:
    alias = [0, 1, 1, 2, 3, 0, 0, 4]
    small, large = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], alias)
    mine, other = (analyse(m, {"a": text()}, SMALL) for m in (small, large))
    assert mine.coactivation[0].shape == (5, 5)
    assert len(mine.document["layers"][0]["count"]) == 5
    together = [[row for row, to in enumerate(alias) if to == e] for e in range(5)]
    for ours, theirs in zip(mine.document["layers"].values(), other.document["layers"].values(), strict=True):
        assert ours["absmax"] == pytest.approx([max(theirs["absmax"][r] for r in rows) for rows in together], rel=1e-4)
        assert ours["absmax_first"][2] == pytest.approx(theirs["absmax_first"][3], rel=1e-4)  # an expert of one row
        assert all(a <= b + 1e-6 for a, b in zip(ours["absmax_first"], ours["absmax"], strict=True))
        assert ours["count"][2] == theirs["count"][3]
    assert mine.document["locality"]["cache"]["model"][LRU]["rate"][-1] == 1


def test_an_expert_takes_what_it_takes_on_disk(tiny_model: Maker, tmp_path: Path) -> None:
    source: Any = open_folder(tiny_model("qwen3_moe"))
    facts = source.facts
    assert set(expert_bytes(source).values()) == {3 * facts.hidden * facts.expert_width * 4}
    packed = expert_bytes(quantized(source, tmp_path / "packed", bits=4))
    codes, scales = 3 * facts.hidden * facts.expert_width // 2, 3 * facts.hidden * facts.expert_width // 16 * 4
    assert set(packed.values()) == {codes + scales + 3 * 16}


def test_padding_is_refused(tiny_model: Maker) -> None:
    padded = text()
    padded.mask[0, -1] = 0
    with pytest.raises(UsageError, match="without padding"):
        analyse(open_folder(tiny_model("qwen3_moe")), {"a": padded})
