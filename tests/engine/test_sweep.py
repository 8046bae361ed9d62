"""A swept model is the whole model, bit for bit; statistics equal those of a second, slow computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moecli.core.artifacts import LayerStats
from moecli.core.errors import StageFailed, UsageError
from moecli.engine import probe
from moecli.engine.collectors import FORWARD, collectors
from moecli.engine.data import Batch
from moecli.engine.sweep import sweep
from moecli.families.adapter import load_model
from tests import tiny
from tests.engine import oracle
from tests.engine.memory import MemoryCheckpoint, aliased, open_folder
from tests.engine.texts import random_batches

Maker = Callable[..., Path]


def whole(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def logits_of(model: Any, batches: list[Batch]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in batches]


def run_through(swept: Any) -> list[torch.Tensor]:
    for _ in swept:
        pass
    return list(swept.logits())


def observe_first(source: Any, batches: list[Batch]) -> LayerStats:
    layers = iter(sweep(source, batches))
    return next(layers).observe(collectors(FORWARD))


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, "float32") for f in tiny.FAMILIES] + [(f, "bfloat16") for f in ("qwen3_moe", "gpt_oss", "deepseek_v3")],
)
def test_logits_are_those_of_the_whole_model(family: str, dtype: str, tiny_model: Maker) -> None:
    folder, batches = tiny_model(family, dtype=dtype), random_batches()
    assert same(run_through(sweep(open_folder(folder), batches)), logits_of(whole(folder), batches))


def test_hidden_states_are_those_of_the_whole_model(tiny_model: Maker) -> None:
    folder, batches = tiny_model("glm4_moe"), random_batches((4,))
    model, seen = whole(folder), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    logits_of(model, batches)
    swept = [layer.outputs()[0] for layer in sweep(open_folder(folder), batches)]
    assert same(swept, seen)


def test_tied_embeddings(tmp_path: Path) -> None:
    folder, batches = tiny.make("qwen3_moe", tmp_path, tie_word_embeddings=True), random_batches()
    assert "lm_head.weight" not in open_folder(folder).names()
    assert same(run_through(sweep(open_folder(folder), batches)), logits_of(whole(folder), batches))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_statistics_equal_a_loop_over_tokens(family: str, tiny_model: Maker) -> None:
    folder, batches = tiny_model(family), random_batches((3, 1), length=16)
    source = open_folder(folder)
    expected = oracle.statistics(whole(folder), source, batches)
    found = {s.index: s.observe(collectors(FORWARD)) for s in sweep(source, batches) if s.is_moe}

    assert list(found) == list(expected) == list(source.facts.moe_layers)
    for layer, stats in found.items():
        assert stats.tokens == int(expected[layer].pop("tokens")) == 61
        assert set(FORWARD) <= set(expected[layer]), "the oracle knows every statistic"
        assert {n for n in [*stats.extra, "count", "gate_sum"] if not n.endswith("_key")} == set(FORWARD)
        oracle.assert_same(stats, expected[layer], f"layer {layer}")


def test_statistics_keep_their_dtypes(tiny_model: Maker) -> None:
    stats = observe_first(open_folder(tiny_model("qwen3_moe", dtype="bfloat16")), random_batches())
    assert stats.count_E.dtype == torch.int64
    assert stats["absmax"].dtype == torch.float32
    kinds: dict[torch.dtype, set[str]] = {}
    for name, value in stats.extra.items():
        kinds.setdefault(value.dtype, set()).add(name)
    maxima = {name for name, kind in FORWARD.items() if kind.reduce == "max"}
    grams = {"x_cov", "gx_cov", "x_cov_pool", "h_cov", "gh_cov", "ph_cov"}
    assert kinds[torch.float32] == maxima | grams
    assert kinds[torch.int64] == {"coactivation", "transition", "tok_reservoir_key", "act_sample_key"}
    assert kinds[torch.bfloat16] == {"tok_reservoir", "act_sample"}, "the model's own dtype"
    assert (kinds[torch.int16], kinds[torch.float16]) == ({"topk_idx"}, {"topk_w"})
    assert kinds.keys() == {torch.float64, torch.float32, torch.int64, torch.bfloat16, torch.int16, torch.float16}


def every_statistic(source: Any, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
    layers = [s.observe(collectors(FORWARD)) for s in sweep(source, batches) if s.is_moe]
    return [{name: stats[name].double() for name in FORWARD} | {"n": torch.tensor(stats.tokens)} for stats in layers]


def test_statistics_do_not_depend_on_batches_padding_or_chunks(
    tiny_model: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(tiny_model("deepseek_v3"))
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    one = [Batch(ids, torch.ones_like(ids))]
    expected = every_statistic(source, one)

    split = [Batch(part, torch.ones_like(part)) for part in ids.split(1)]
    wide = torch.nn.functional.pad(ids, (0, 5), value=7)
    padded = [Batch(wide, (torch.arange(17) < 12).long().expand(4, 17))]
    for other in (split, padded):
        torch.testing.assert_close(every_statistic(source, other), expected, rtol=1e-4, atol=2e-5)
    monkeypatch.setattr(probe, "CHUNK_BYTES", 5 * 64 * 4)
    torch.testing.assert_close(every_statistic(source, one), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_an_alias_model_is_its_expanded_model(family: str, tiny_model: Maker) -> None:
    small, large = aliased(open_folder(tiny_model(family)), [6, 1, 3, 4, 7], [0, 1, 1, 2, 3, 0, 0, 4])
    batches = random_batches()
    found = logits_of(load_model(small), batches)
    # Merged experts see longer runs of tokens than their copies do, which moves the last bits of a product.
    torch.testing.assert_close(found, logits_of(load_model(large), batches), rtol=1e-5, atol=1e-5)
    assert same(run_through(sweep(small, batches)), found)


def test_statistics_of_an_alias_model_are_per_stored_expert(tiny_model: Maker) -> None:
    alias = [0, 1, 1, 2, 3, 0, 0, 4]
    small, large = aliased(open_folder(tiny_model("qwen3_moe")), [6, 1, 3, 4, 7], alias)
    batches = random_batches()
    left = observe_first(small, batches)
    right = observe_first(large, batches)

    def folded(value_E: torch.Tensor) -> torch.Tensor:
        return torch.zeros(5, dtype=value_E.dtype).index_add(0, torch.tensor(alias), value_E)

    for name in ("gate_sum", "gean_sum", "easy"):
        torch.testing.assert_close(left[name], folded(right[name]), rtol=1e-6, atol=1e-6)
    assert torch.equal(left["prob_sum"], right["prob_sum"])
    assert torch.equal(left["y_mean"], right["y_mean"][[0, 1, 3, 4, 7]])
    twice = folded(right.count_E) - left.count_E  # tokens with both slots on one expert are one visit
    assert twice.sum() > 0
    assert (twice[[2, 3, 4]] == 0).all()


def test_replaced_weights_reach_later_layers(tiny_model: Maker) -> None:
    folder, batches = tiny_model("qwen3_moe"), random_batches()
    model = whole(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(0.5)
    source = MemoryCheckpoint.of(open_folder(folder))
    untouched = {name: tensor.clone() for name, tensor in source.tensors.items()}

    swept = sweep(source, batches)
    for layer in swept:
        if layer.index == 0:
            before = layer.observe(collectors(["gean_sum"]))
            layer.replace({"mlp.experts.down_proj": layer.module.mlp.experts.down_proj * 0.5})
            after = layer.observe(collectors(["gean_sum"]))
    assert same(list(swept.logits()), logits_of(model, batches))
    torch.testing.assert_close(after["gean_sum"] * 2, before["gean_sum"], rtol=1e-6, atol=0)
    assert all(torch.equal(source.tensors[name], tensor) for name, tensor in untouched.items())


def test_replace_checks_shapes_before_it_changes_anything(tiny_model: Maker) -> None:
    layers = iter(sweep(open_folder(tiny_model("qwen3_moe")), random_batches((1,))))
    layer = next(layers)
    with pytest.raises(ValueError, match=r"`mlp.gate.weight` is \[8, 64\], got \[6, 64\]"):
        layer.replace({"mlp.gate.weight": torch.zeros(6, 64)})


def test_an_edit_may_store_fewer_experts(tiny_model: Maker) -> None:
    def keep_four(module: Any) -> None:
        experts, gate = module.mlp.experts, module.mlp.gate
        experts.num_experts = 4
        for name in ("gate_up_proj", "down_proj"):
            setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:4], requires_grad=False))
        gate.weight = torch.nn.Parameter(gate.weight[:4], requires_grad=False)

    layers = iter(sweep(open_folder(tiny_model("qwen3_moe")), random_batches((1,))))
    layer = next(layers)
    layer.edit(keep_four)
    stats = layer.observe(collectors(["prob_sum"]))
    assert stats.count_E.shape == stats["prob_sum"].shape == (4,)
    assert int(stats.count_E.sum()) == 2 * stats.tokens


def test_only_one_layer_is_resident(tiny_model: Maker) -> None:
    swept = sweep(open_folder(tiny_model("qwen3_moe", layers=3)), random_batches((1,)))
    for layer in swept:
        real = {n.split(".")[2] for n, p in swept._model.named_parameters() if not p.is_meta}
        assert real == {str(layer.index)}
    list(swept.logits())
    assert all(p.is_meta for p in swept._model.parameters())


def test_progress_is_told(tiny_model: Maker) -> None:
    told: list[tuple[list[int], str]] = []

    def track(items: Any, label: str) -> Any:
        told.append((list(items), label))
        return items

    for _ in sweep(open_folder(tiny_model("qwen3_moe")), random_batches((1,)), track=track):
        pass
    assert told == [([0, 1], "layers")]


def test_a_dense_layer_has_nothing_to_observe(tiny_model: Maker) -> None:
    layers = iter(sweep(open_folder(tiny_model("deepseek_v3")), random_batches((1,))))
    first = next(layers)
    assert (first.index, first.is_moe) == (0, False)
    with pytest.raises(StageFailed, match="layer 0 has no experts to observe"):
        first.observe()


def test_a_sweep_runs_once_and_logits_come_last(tiny_model: Maker) -> None:
    swept = sweep(open_folder(tiny_model("qwen3_moe")), random_batches((1,)))
    with pytest.raises(RuntimeError, match="0 of 2 layers have run"):
        next(swept.logits())
    for _ in swept:
        break
    with pytest.raises(RuntimeError, match="a sweep runs once"):
        next(iter(swept))


def test_unknown_statistics_are_named() -> None:
    with pytest.raises(UsageError, match="unknown statistic `gean`") as caught:
        collectors(["count", "gean"])
    assert "gean_sum" in caught.value.hint
